"""Training from a ticket, and what a LotteryTicket refuses."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lottery_problems import Search, Watch, fit, wide
from problems import Problem, Tied, loader
from torch import nn

from lightning_bpfree import EvolutionStrategy, ForwardGradient, LotteryTicket

# --- from a ticket ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_file", [False, True])
def test_training_from_a_ticket(as_file, tmp_path):
    source = LotteryTicket("magnitude", levels=2, keep=0.5)
    fit(tmp_path / "source", source)
    ticket = source.tickets[1]
    given = str(tmp_path / "source" / "tickets" / "level_01.pt") if as_file else ticket
    torch.manual_seed(77)
    module = Problem(Tied(dropout=0.0))
    target = LotteryTicket("magnitude", levels=2, keep=0.5, init_from=given)
    watch = Watch(target)
    fit(tmp_path / "target", target, watch, ForwardGradient(), module=module)
    first, second = watch.starts
    assert watch.masks[0] == ticket.masks
    for name, value in {**ticket.init, **ticket.buffers}.items():
        assert torch.equal(first[name], value * ticket.masks[name] if name in ticket.masks else value)
    assert [r["kept"] for r in target.results] == [27, 14]  # the plan goes on from the ticket's sparsity
    assert torch.equal(second["net.head.weight"], ticket.init["net.head.weight"] * watch.masks[1]["net.head.weight"])
    assert not (watch.masks[1]["net.head.weight"] & ~ticket.masks["net.head.weight"]).any()


def test_a_ticket_alone_with_other_weights_or_pruned_further(tmp_path):
    source = LotteryTicket("magnitude", levels=2, keep=0.5)
    fit(tmp_path / "source", source)
    ticket = source.tickets[1]
    runs = {}
    for weights in ("init", "fresh", "permuted"):
        target = LotteryTicket("magnitude", levels=1, init_from=ticket, weights=weights)
        watch = Watch(target)
        fit(tmp_path / weights, target, watch)
        assert watch.masks == [ticket.masks]
        runs[weights] = watch.starts[0]["net.inner.weight"]
        assert not runs[weights][~ticket.masks["net.inner.weight"]].any()
    assert not torch.equal(runs["fresh"], runs["init"])
    assert torch.equal(runs["permuted"].flatten().sort().values, runs["init"].flatten().sort().values)
    further = LotteryTicket("snip", sparsities=[0.75], init_from=ticket)
    fit(tmp_path / "further", further)
    assert further.masks.kept == 14
    assert not any((further.masks[n] & ~ticket.masks[n]).any() for n in ticket.masks)


def test_a_ticket_that_does_not_go_with_the_arguments(tmp_path):
    source = LotteryTicket("magnitude", levels=2, keep=0.5)
    fit(tmp_path, source)
    ticket = source.tickets[1]
    with pytest.raises(ValueError, match=r"sparsities=\[0\.2, 0\.7\].*0\.5 of its weights.*pruned weights stay pruned"):
        fit(tmp_path / "a", LotteryTicket("magnitude", sparsities=[0.2, 0.7], init_from=ticket))
    with pytest.raises(ValueError, match=r"exclude='net\.head\.\*' select.*leave both out"):
        fit(tmp_path / "b", LotteryTicket("magnitude", levels=1, exclude="net.head.*", init_from=ticket))
    with pytest.raises(ValueError, match=r"net\.inner\.weight \(6, 6\) \| missing"):
        fit(tmp_path / "c", LotteryTicket("magnitude", levels=1, init_from=ticket), module=wide())
    with pytest.raises(ValueError, match="no weight has a deviation yet"):
        fit(tmp_path / "d", LotteryTicket("snr", sparsities=[0.7, 0.8], init_from=ticket), Search())


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "snrr"}, "score='snrr': choose 'snr'"),
        ({"scope": "all"}, "scope='all'"),
        ({"weights": "late"}, "weights='late'"),
        ({"levels": 0}, "levels=0"),
        ({"epochs_per_level": 1.5}, r"epochs_per_level=1\.5"),
        ({"keep": 1.0}, r"keep=1\.0.*\(0, 1\)"),
        ({"sparsities": []}, r"sparsities=\[\]"),
        ({"sparsities": [0.0, 1.0]}, r"\[0, 1\)"),
        ({"sparsities": [0.5, 0.2], "score": "magnitude"}, "non-decreasing"),
        ({"sparsities": [0.5, 0.7]}, r"no weight has a deviation yet: begin with 0\.0"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        LotteryTicket(**arguments)


def test_what_a_fit_refuses(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"4 levels of 2 epochs, 8 in all.*max_epochs=7.*max_epochs=8"):
        fit(tmp_path, LotteryTicket("magnitude", levels=4, epochs_per_level=2), max_epochs=7)
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `LotteryTicket`"):  # Lightning's
        fit(tmp_path, LotteryTicket("magnitude", levels=1), LotteryTicket("magnitude", levels=1))
    for argument in ("params", "exclude"):
        with pytest.raises(ValueError, match=rf"{argument}='net\.haed\.\*' matches none.*net\.head"):
            fit(tmp_path, LotteryTicket("magnitude", levels=1, **{argument: "net.haed.*"}))
    with pytest.raises(MisconfigurationException, match=r"params='\*\.bias'.*leaves nothing to prune.*not biases"):
        fit(tmp_path, LotteryTicket("magnitude", levels=1, params="*.bias"))
    lazy = Problem(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)))
    with pytest.raises(MisconfigurationException, match=r"lazy ones \(LazyLinear\).*Call the module on a batch"):
        fit(tmp_path, LotteryTicket("magnitude", levels=1, params="net.1.*"), module=lazy)


def test_a_layer_that_would_vanish_is_named_and_the_finished_level_kept(tmp_path):
    tickets = LotteryTicket("magnitude", sparsities=[0.0, 0.98])
    with pytest.raises(ValueError, match=r"level 1 of 2: sparsity=0\.98 would prune all of net\.\w+\.weight.*exclude="):
        fit(tmp_path, tickets)
    assert [ticket.level for ticket in tickets.tickets] == [0]


def test_an_earlier_run_is_not_written_over_in_silence(tmp_path):
    fit(tmp_path, LotteryTicket("magnitude", levels=1))
    with pytest.warns(UserWarning, match="holds tickets of an earlier run"):
        fit(tmp_path, LotteryTicket("magnitude", levels=1))


def test_one_batch_to_try(tmp_path):
    tickets = LotteryTicket("magnitude", levels=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, tickets, fast_dev_run=True)
    assert not (tmp_path / "tickets").exists()


def test_without_logging(tmp_path):
    class Silent(Problem):
        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    tickets = LotteryTicket("magnitude", levels=2, keep=0.5, dirpath=tmp_path)
    trainer = pl.Trainer(accelerator="cpu", barebones=True, max_epochs=2, callbacks=[tickets])
    trainer.fit(Silent(), loader())
    assert [r["kept"] for r in tickets.results] == [54, 27]


def test_levels_are_told(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(tmp_path, LotteryTicket("magnitude", levels=2, keep=0.5), max_epochs=3)
    text = caplog.text
    assert "LotteryTicket needs 2 epochs; the last level trains on, to epoch 3." in text
    assert "LotteryTicket, level 0 of 2, all weights" in text
    assert "LotteryTicket, level 1 of 2, 27 of 54 weights left (50.00%): net.inner.weight" in text


def test_the_same_object_serves_several_fits(tmp_path):
    tickets = LotteryTicket("magnitude", levels=2, keep=0.5)
    fit(tmp_path / "a", tickets)
    one = tickets.masks
    fit(tmp_path / "b", tickets)
    assert tickets.masks == one
    assert [r["level"] for r in tickets.results] == [0, 1]


# --- with the search itself ------------------------------------------------------------------------------------------


def test_what_cannot_search_under_masks_is_refused_at_once(tmp_path):
    rule = EvolutionStrategy(population_size=8, rank=1)
    with pytest.raises(ValueError, match=r"rank with masks.*rank=None"):
        fit(tmp_path, LotteryTicket("magnitude", levels=2), rule)
    assert rule.record.batches == 0
    with pytest.raises(MisconfigurationException, match="score='magnitude'"):
        fit(tmp_path, LotteryTicket("snr", levels=2), EvolutionStrategy(population_size=8))
