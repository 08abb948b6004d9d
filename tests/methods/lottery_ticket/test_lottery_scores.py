"""Scores that prune: magnitude, random masks, fresh weights, SNIP, and signal to noise of a search."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from conformance import assert_equal, state
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel
from lottery_problems import Search, Watch, fit, initial, plain, wide
from problems import Problem, loader
from torch import nn

from lightning_bpfree import Backprop, ForwardForward, ForwardGradient, LotteryTicket, ZerothOrder
from lightning_bpfree.methods.lottery_ticket.masks import Restricts
from lightning_bpfree.methods.lottery_ticket.pruning import top_masks

# --- baselines -------------------------------------------------------------------------------------------------------


def levels_of(folder, *callbacks, module=None, **arguments):
    tickets = LotteryTicket(**{"levels": 3, "keep": 0.6, "seed": 4, **arguments})
    watch = Watch(tickets)
    module = wide() if module is None else module
    before = initial(module)
    fit(folder, tickets, *callbacks, watch, module=module)
    return before, watch, tickets


def nested(watch: Watch) -> bool:
    pairs = zip(watch.masks[1:], watch.masks[2:], strict=False)
    return not any((new[n] & ~old[n]).any() for old, new in pairs for n in new)


def test_magnitude_keeps_the_largest_trained_weights(tmp_path):
    _, _, tickets = levels_of(tmp_path, score="magnitude")
    for ticket, following in zip(tickets.tickets, tickets.tickets[1:], strict=False):
        scores = {n: ticket.mean[n].abs() for n in ticket.masks}
        assert following.masks == top_masks(scores, following.info["sparsity"], ticket.masks)


def test_random_reinit_redraws_masks_and_weights(tmp_path):
    before, watch, tickets = levels_of(tmp_path, score="random", weights="fresh")
    assert not nested(watch)
    assert [r["kept"] for r in tickets.results] == [1312, 787, 472]
    first, second, third = watch.starts
    assert_equal(first, before)
    for name in ("net.0.bias", "net.2.weight"):
        assert not torch.equal(second[name], first[name])
        assert not torch.equal(third[name], second[name])
    # torch's own initialization of the first layer is uniform within 1/sqrt(6)
    assert 0.35 < float(second["net.0.weight"].abs().max()) <= 6**-0.5
    _, again, _ = levels_of(tmp_path / "again", score="random", weights="fresh")
    assert_equal(again.starts[2], third)
    _, other, _ = levels_of(tmp_path / "other", score="random", weights="fresh", seed=5)
    assert other.masks[2] != watch.masks[2]


def test_random_masks_of_rewound_weights_are_nested(tmp_path):
    before, watch, _ = levels_of(tmp_path, score="random")
    assert nested(watch)
    assert torch.equal(watch.starts[2]["net.2.weight"], before["net.2.weight"] * watch.masks[2]["net.2.weight"])


def test_mask_reinit_has_the_masks_of_magnitude_and_fresh_weights(tmp_path):
    before, watch, _ = levels_of(tmp_path, score="magnitude", weights="fresh")
    _, magnitude, _ = levels_of(tmp_path / "m", score="magnitude")
    assert watch.masks[1] == magnitude.masks[1]
    assert nested(watch)
    kept = watch.masks[1]["net.2.weight"]
    assert not (watch.starts[1]["net.2.weight"] == before["net.2.weight"])[kept].any()


@pytest.mark.parametrize("permute_masks", [False, True])
def test_permuted_weights_are_those_of_the_first_initialization_in_another_order(permute_masks, tmp_path):
    before, watch, tickets = levels_of(
        tmp_path, score="magnitude", weights="permuted", permute_masks=permute_masks, scope="layer"
    )
    assert nested(watch) != permute_masks
    for masks, start in zip(watch.masks[1:], watch.starts[1:], strict=True):
        for name, mask in masks.items():
            assert torch.equal(start[name][mask].sort().values, before[name][mask].sort().values)
            assert not torch.equal(start[name][mask], before[name][mask])
            assert not start[name][~mask].any()
        assert torch.equal(start["net.0.bias"], before["net.0.bias"])
    assert [r["kept"] for r in tickets.results] == [1312, 787, 473]  # rounded layer by layer


def test_snip_equals_a_computation_by_hand_and_leaves_no_trace(tmp_path):
    module = wide()
    data = loader(shuffle=True)
    total = {n: torch.zeros_like(p) for n, p in module.named_parameters() if p.dim() > 1}
    batches = list(loader())
    for x, y in batches:
        loss = nn.functional.cross_entropy(module.net(x), y)
        gradients = torch.autograd.grad(loss, [dict(module.named_parameters())[n] for n in total])
        total = {n: t + g / len(batches) for (n, t), g in zip(total.items(), gradients, strict=True)}
    params = dict(module.named_parameters())
    scores = {n: (params[n] * g).abs().detach() for n, g in total.items()}
    tickets = LotteryTicket("snip", sparsities=[0.3, 0.6])
    torch.manual_seed(1)
    fit(tmp_path, tickets, module=module, data=data)
    for ticket, sparsity in zip(tickets.tickets, (0.3, 0.6), strict=True):
        expected = top_masks(scores, sparsity)
        # Batches come in another order, so that sums, and with them a pair at the threshold, may differ.
        assert sum(int((expected[n] != ticket.masks[n]).sum()) for n in expected) <= 2


@pytest.mark.parametrize("make_rule", [None, ZerothOrder, ForwardGradient, ForwardForward])
def test_scoring_by_snip_changes_nothing_else(make_rule, tmp_path):
    runs = {}
    for score in ("snip", "magnitude"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3))
        module = Problem(net if make_rule is not ForwardForward else nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)))
        rule = (
            [] if make_rule is None else [make_rule(label="embedding") if make_rule is ForwardForward else make_rule()]
        )
        generator = torch.Generator().manual_seed(2)
        data = torch.utils.data.DataLoader(loader().dataset, batch_size=16, shuffle=True, generator=generator)
        tickets = LotteryTicket(score, levels=2, keep=0.9, epochs_per_level=2)
        seen = {}

        class Sees(pl.Callback):
            def on_train_epoch_end(self, trainer, module, seen=seen) -> None:
                if trainer.current_epoch == 1:
                    seen.update(state(module), rng=torch.get_rng_state())
                    logged = {n: v for n, v in trainer.callback_metrics.items() if n != "bpfree/forward_evals"}
                    seen.update({n: torch.as_tensor(v) for n, v in logged.items()})

        fit(tmp_path / score, tickets, *rule, Sees(), module=module, data=data)
        runs[score] = seen
    assert_equal(runs["snip"], runs["magnitude"])


def test_snip_does_not_take_the_workers_of_the_first_epoch(tmp_path):
    module = plain()
    data = torch.utils.data.DataLoader(loader().dataset, batch_size=16, num_workers=1, persistent_workers=True)
    fit(tmp_path, LotteryTicket("snip", levels=2, epochs_per_level=1), module=module, data=data)
    assert len(module.gradients) == 8  # four batches in each of two epochs


def test_snip_needs_a_differentiable_loss(tmp_path):
    class Flat(Problem):
        def training_step(self, batch, index):
            return float(super().training_step(batch, index).detach())

    with pytest.raises(MisconfigurationException, match=r"no graph.*score='magnitude'"):
        fit(tmp_path, LotteryTicket("snip", levels=2), ZerothOrder(), module=Flat())
    data = torch.utils.data.DataLoader(torch.randn(8, 32), batch_size=4)
    with pytest.raises(MisconfigurationException, match="automatic_optimization=False"):
        fit(tmp_path, LotteryTicket("snip", levels=2), module=ManualOptimBoringModel(), data=data)


def test_manual_optimization_is_pruned_too(tmp_path):
    data = torch.utils.data.DataLoader(torch.randn(8, 32), batch_size=4)
    tickets = LotteryTicket("magnitude", levels=2, keep=0.5)
    module, _ = fit(tmp_path, tickets, module=ManualOptimBoringModel(), data=data)
    assert int((module.layer.weight == 0).sum()) == 32


# --- signal to noise -------------------------------------------------------------------------------------------------


def test_a_search_is_restricted_restarted_and_asked(tmp_path):
    rule = Search()
    assert isinstance(rule, Restricts)
    assert not isinstance(ZerothOrder(), Restricts)
    tickets = LotteryTicket("snr", levels=3, keep=0.6)
    fit(tmp_path, tickets, rule)
    level = ["std", "restrict", "restart"]
    # Twice at first, to see that it can search under masks; then the look after one batch; at the end it is free.
    assert rule.calls == ["restrict", "restrict", "restart", "std", *level, *level, "std", "restrict"]
    assert rule.searched is tickets.masks
    assert rule.masks is None
    for ticket, following in zip(tickets.tickets, tickets.tickets[1:], strict=False):
        scores = {n: ticket.mean[n].abs() / ticket.std[n] for n in ticket.masks}
        assert following.masks == top_masks(scores, following.info["sparsity"], ticket.masks)
        assert following.masks != top_masks({n: ticket.mean[n].abs() for n in scores}, following.info["sparsity"])


def test_a_search_is_restricted_under_any_score(tmp_path):
    rule = Search(scalar=True)
    tickets = LotteryTicket("magnitude", levels=2)
    fit(tmp_path, tickets, rule)
    assert rule.searched is tickets.masks
    assert tickets.tickets[0].std is None


def test_no_deviations_no_ratio(tmp_path):
    for rule, named in ((None, "plain backprop"), (ForwardGradient(), "ForwardGradient")):
        with pytest.raises(MisconfigurationException, match=rf"{named} has none.*score='magnitude'.*SNES"):
            fit(tmp_path, LotteryTicket(levels=2), *([rule] if rule else []))
    module = plain()
    with pytest.raises(MisconfigurationException, match=r"one deviation for all weights.*magnitude.*SNES"):
        fit(tmp_path, LotteryTicket(levels=2), Search(scalar=True), module=module)
    assert module.evaluations <= 4  # said after the first batch (a rehearsal, three forwards), not after a level

    class Partly(Search):
        def std(self):
            return {"net.head.weight": torch.ones(3, 6)}

    with pytest.raises(MisconfigurationException, match=r"no deviation of net\.inner\.weight.*exclude="):
        fit(tmp_path, LotteryTicket(levels=2), Partly())
    fit(tmp_path, LotteryTicket(levels=1), ForwardGradient())  # nothing is scored


def test_deviations_on_a_floor_are_said(tmp_path):
    with pytest.warns(UserWarning, match=r"7\d% of the deviations are 0\.9.*magnitude"):
        fit(tmp_path, LotteryTicket(levels=2), Search(floor=True))


# --- with the search itself ------------------------------------------------------------------------------------------


def test_the_pass_for_snip_is_counted(tmp_path):
    rule = Backprop()
    fit(tmp_path, LotteryTicket("snip", 1, sparsities=[0.5]), rule)
    assert rule.record.forward_evals == 2 * 4 * 3.0  # four batches for the scores, and four of training
