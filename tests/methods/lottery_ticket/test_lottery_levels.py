"""Levels within one fit: exact masks, exact rewinds, exact zeros, tickets and what loggers hold."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conformance import assert_equal
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lottery_problems import Watch, fit, initial, plain, wide
from problems import Problem, Tied, fitted, loader
from torch import nn

from lightning_bpfree import Backprop, ForwardGradient, LotteryTicket

WEIGHTS = ["net.inner.weight", "net.head.weight"]  # of `Tied`: 36 + 18; frozen and one-dimensional ones are left


# --- levels ----------------------------------------------------------------------------------------------------------


def test_twenty_levels_are_nested_and_exact_and_leave_biases_alone(tmp_path):
    module = wide()
    tickets = LotteryTicket("magnitude", levels=20, scope="layer")
    watch = Watch(tickets)
    before = initial(module)
    fit(tmp_path, tickets, watch, module=module, data=loader(rows=16))
    for level, (masks, start, result) in enumerate(zip(watch.masks, watch.starts, tickets.results, strict=True)):
        for name, value in start.items():
            survivors = masks[name] if masks is not None and name in masks else torch.ones_like(value, dtype=torch.bool)
            assert torch.equal(value, torch.where(survivors, before[name], 0.0))
        if masks is not None:
            sizes = {n: p.numel() for n, p in module.named_parameters() if p.dim() > 1}
            assert masks.counts == {n: round(size * (1 - (1 - 0.8**level))) for n, size in sizes.items()}
            assert result["kept"] == masks.kept
        if level > 1:
            assert not any((masks[n] & ~watch.masks[level - 1][n]).any() for n in masks)


def test_a_rewind_is_bit_for_bit_buffers_included(tmp_path):
    module = plain(optimizer="adamw")
    before = initial(module)
    tickets = LotteryTicket("magnitude", levels=3, keep=0.5, epochs_per_level=2)
    watch = Watch(tickets)
    fit(tmp_path, tickets, watch, module=module)
    assert len(watch.starts) == 3
    assert int(module.net.norm.num_batches_tracked) == 8  # the last level's own
    for masks, start in zip(watch.masks, watch.starts, strict=True):
        kept = {} if masks is None else masks
        assert_equal(start, {n: torch.where(kept[n], t, 0.0) if n in kept else t for n, t in before.items()})
    assert [masks and masks.kept for masks in watch.masks] == [None, 27, 14]
    assert list(watch.masks[1]) == WEIGHTS


class Noisy(torch.optim.SGD):
    """Moves every weight, whatever its gradient."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(torch.randn_like(parameter), alpha=0.01)
        return loss


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [("adamw", {}), ("sgd", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}), ("noisy", {})],
)
@pytest.mark.parametrize("rule", [None, ForwardGradient], ids=["plain", "forward_gradient"])
def test_pruned_weights_stay_exactly_zero(optimizer, settings, rule, tmp_path):
    module = plain(optimizer=optimizer)
    if optimizer == "noisy":
        module.configure_optimizers = lambda: Noisy(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    tickets = LotteryTicket("magnitude", levels=3, keep=0.5)
    watch = Watch(tickets)
    fit(tmp_path, tickets, watch, *([rule()] if rule else []), module=module, **settings)
    assert watch.checked == 8


def test_gradients_of_pruned_weights_reach_neither_clipping_nor_moments(tmp_path):
    module = plain(optimizer="adamw")
    tickets = LotteryTicket("magnitude", levels=2, keep=0.5)
    _, trainer = fit(tmp_path, tickets, module=module)
    for name, gradient in module.gradients[-1].items():
        if name in tickets.masks:
            assert not gradient[~tickets.masks[name]].any()
            assert gradient[tickets.masks[name]].any()
    named = dict(module.named_parameters())
    for name, mask in tickets.masks.items():
        assert not trainer.optimizers[0].state[named[name]]["exp_avg_sq"][~mask].any()


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_optimizers_and_schedules_begin_anew(interval, tmp_path):
    module = plain()

    def configure():
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": interval}}

    module.configure_optimizers = configure
    tickets = LotteryTicket("magnitude", levels=3, keep=0.5, epochs_per_level=2)
    watch = Watch(tickets)
    fit(tmp_path, tickets, watch, module=module)
    assert watch.optimizer_states == [0, 0, 0]
    one = [0.1 * 0.5 ** (batch if interval == "step" else batch // 4) for batch in range(8)]
    assert watch.rates == pytest.approx(one * 3)


def test_the_last_level_stays_trained_and_trains_on(tmp_path):
    tickets = LotteryTicket("magnitude", levels=2, keep=0.5)
    module, _ = fit(tmp_path, tickets, max_epochs=4)
    ticket = tickets.tickets[-1]
    assert ticket.level == tickets.level == 1
    assert_equal(ticket.mean, dict(module.named_parameters()))
    assert int(module.net.norm.num_batches_tracked) == 12
    assert ticket.info["epochs_trained"] == 3


def test_tickets_and_results(tmp_path):
    torch.manual_seed(0)
    module = plain()
    before = initial(module)
    tickets = LotteryTicket("magnitude", levels=3, keep=0.5, dirpath=tmp_path / "here", seed=5)
    fit(tmp_path, tickets, Backprop(), module=module)
    assert [p.name for p in sorted((tmp_path / "here").iterdir())] == [f"level_0{i}.pt" for i in range(3)]
    assert [r["kept"] for r in tickets.results] == [54, 27, 14]
    for level, (ticket, result) in enumerate(zip(tickets.tickets, tickets.results, strict=True)):
        assert ticket.level == result["level"] == level
        assert ticket.masks.kept == result["kept"]
        assert result["weights_left"] == result["kept"] / 54
        assert result["metrics"]["train_loss"] == ticket.metrics["train_loss"] > 0
        assert result["metrics"]["bpfree/ticket/level"] == level
        assert result["metrics"]["bpfree/ticket/weights_left"] == pytest.approx(result["weights_left"])
        assert_equal({**ticket.init, **ticket.buffers}, before)
        assert int(ticket.mean_buffers["net.norm.num_batches_tracked"]) == 4
        assert (ticket.info["rule"], ticket.info["score"], ticket.info["seed"]) == ("Backprop", "magnitude", 5)
        assert ticket.std is None
    losses = [r["metrics"]["train_loss"] for r in tickets.results]
    assert len(set(losses)) == 3
    other = plain()
    tickets.tickets[2].apply_to(other, "mean")
    assert_equal(dict(other.named_parameters()), dict(module.named_parameters()))


def test_loggers_hold_rule_and_ticket(tmp_path):
    for order in (0, 1):
        logger = CSVLogger(tmp_path / str(order), version="")
        tickets = LotteryTicket("magnitude", levels=1, exclude="net.head.*")
        both = [tickets, ForwardGradient(2)]
        fitted(
            plain(), loader(), *(both[::-1] if order else both), logger=logger, default_root_dir=tmp_path / str(order)
        )
        text = (Path(logger.log_dir) / "hparams.yaml").read_text()
        assert "rule: ForwardGradient" in text
        assert "num_directions: 2" in text
        assert "score: magnitude" in text
        assert "exclude: net.head.*" in text


# --- which weights ---------------------------------------------------------------------------------------------------


def test_params_exclude_and_the_rules_own_choice(tmp_path):
    for i, (arguments, rule, names) in enumerate(
        [
            ({}, [], WEIGHTS),
            ({"params": "net.head.*"}, [], WEIGHTS[1:]),
            ({"exclude": ["net.head.*"]}, [], WEIGHTS[:1]),
            ({}, [ForwardGradient(params="net.head.*")], WEIGHTS[1:]),
        ]
    ):
        tickets = LotteryTicket("magnitude", levels=2, keep=0.5, **arguments)
        fit(tmp_path / str(i), tickets, *rule)
        assert list(tickets.masks) == names


def test_fresh_weights_come_from_the_modules_own_method_and_spare_frozen_ones(tmp_path):
    class Own(Problem):
        def reset_parameters(self):
            for parameter in self.parameters():
                nn.init.constant_(parameter, float(torch.rand(())))

    torch.manual_seed(0)
    module = Own(Tied(dropout=0.0))
    before = initial(module)
    tickets = LotteryTicket("magnitude", levels=2, keep=0.5, weights="fresh")
    watch = Watch(tickets)
    streams = []

    class Streams(pl.Callback):
        def on_train_epoch_start(self, trainer, module) -> None:
            streams.append(torch.get_rng_state())

    fit(tmp_path / "fresh", tickets, watch, Streams(), module=module)
    fit(tmp_path, LotteryTicket("magnitude", levels=2), Streams())
    assert torch.equal(streams[1], streams[3])
    start = watch.starts[1]
    assert torch.equal(start["net.frozen.weight"], before["net.frozen.weight"])
    assert start["net.head.bias"].unique().numel() == 1
    assert not torch.equal(start["net.head.bias"], before["net.head.bias"])
    assert torch.equal(start["net.norm.running_mean"], torch.zeros(6))


def test_what_cannot_be_made_fresh_is_named(tmp_path):
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(6, 3))

        def forward(self, x):
            return x @ self.matrix

    with pytest.raises(MisconfigurationException, match=r"net\.1: has parameters.*Give Problem a reset_parameters"):
        fit(
            tmp_path,
            LotteryTicket("random", levels=2, weights="fresh"),
            module=Problem(nn.Sequential(nn.Linear(6, 6), Bare())),
        )

    class Replaces(Problem):
        def reset_parameters(self):
            self.net[0].weight = nn.Parameter(torch.randn(6, 6))

    module = Replaces(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)))
    with pytest.raises(MisconfigurationException, match=r"replaced the tensors of net\.0\.weight"):
        fit(tmp_path, LotteryTicket("magnitude", levels=2, keep=0.5, weights="fresh"), module=module)
    attention = nn.MultiheadAttention(6, 2, batch_first=True)

    class Attends(Problem):
        def training_step(self, batch, index):
            return self.net(batch[0][None], batch[0][None], batch[0][None])[0].square().mean()

    fit(tmp_path / "new", LotteryTicket("magnitude", levels=2, keep=0.5, weights="fresh"), module=Attends(attention))
