"""Learning rates of layers, lateral weights, precision and resuming: TeamReinforce through the Trainer."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from problems import fitted, loader
from resume_worker import Batches, Net
from team_problems import QUIET, Plain, estimate, problem, untouched, vectors
from torch import Tensor, nn

import lightning_bpfree as bpf
from lightning_bpfree.demos.modules import MLP
from lightning_bpfree.methods.team_reinforce.settings import CREDITS

# --- learning rates of layers ----------------------------------------------------------------------------------------


class Steps(pl.Callback):
    """Compares every step of the optimizer with the same step written by hand, bit for bit."""

    def __init__(self, factors: dict[str, float], lr: float) -> None:
        self.factors, self.lr, self.compared = factors, lr, 0

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.before = {n: p.detach().clone() for n, p in module.named_parameters()}
        self.gradients = {n: p.grad.clone() for n, p in module.named_parameters()}

    def on_before_zero_grad(self, trainer, module, optimizer):
        if hasattr(self, "before"):
            self.compare(module)

    def compare(self, module):
        for name, parameter in module.named_parameters():
            before, factor = self.before[name], self.factors[name.rpartition(".")[0]]
            plain = before.add(self.gradients[name], alpha=-self.lr)
            expected = plain if factor == 1 else before + factor * (plain - before)
            assert torch.equal(parameter, expected), name
            close = before - self.lr * factor * self.gradients[name]
            torch.testing.assert_close(parameter.detach(), close, rtol=1e-5, atol=1e-7)  # float32
            assert torch.equal(parameter, before) == (factor == 0)
        self.compared += 1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"credit": "weight_max"}], ids=["reward", "weight_max"])
def test_factors_scale_every_step_of_their_segment_from_the_first_on(settings, accumulate):
    torch.manual_seed(0)
    module = Plain(MLP(6, [8, 8], 3), lr=0.1)
    watch = Steps({"net.layers.0": 0.5, "net.layers.2": 0.0, "net.layers.4": 3.0}, 0.1)
    rule = bpf.TeamReinforce(learning_rates=[0.5, 0.0, 3.0], **settings)
    trainer = fitted(module, loader(rows=128), rule, watch, max_epochs=2, accumulate_grad_batches=accumulate)
    watch.compare(module)  # the last step
    assert watch.compared >= trainer.global_step == 16 / accumulate


def test_one_factor_is_that_from_each_layer_to_the_next():
    several, one = problem(lr=0.1), problem(lr=0.1)
    fitted(several, loader(), bpf.TeamReinforce(learning_rates=[1.0, 0.5, 0.25], seed=1))
    fitted(one, loader(), bpf.TeamReinforce(learning_rates=0.5, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(several.parameters(), one.parameters(), strict=True))


def test_factors_end_with_the_rules_epochs():
    plain, factored = (problem(lr=0.1) for _ in range(2))
    fitted(plain, loader())
    fitted(factored, loader(), bpf.TeamReinforce(start_epoch=1, learning_rates=[0, 1, 1]))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), factored.parameters(), strict=True))


def test_factors_are_those_of_the_module_in_training():
    rule = bpf.TeamReinforce(learning_rates=[0.0, 0.0, 0.0])
    fitted(problem(lr=0.1), loader(), rule)
    module = problem(lr=0.1)
    before = [parameter.clone() for parameter in module.parameters()]
    fitted(module, loader(), rule)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


# --- lateral weights and critics in a fit ----------------------------------------------------------------------------


def lateral_weights(rule: bpf.TeamReinforce) -> dict[str, Tensor]:
    return {name: saved["module"]["weight"] for name, saved in rule.rule_state()["lateral"].items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"exploration": bpf.Boltzmann(2, 2)},
        {"exploration": bpf.Boltzmann(2, 3), "negative_phase": True, "unit": "sign"},
        {"exploration": bpf.Boltzmann(2, 2, whole_network=True)},
        {"exploration": bpf.Boltzmann(2, 2), "baseline": "per_layer", "num_samples": 1},
    ],
    ids=["leave_one_out", "negative_phase", "whole_network", "per_layer"],
)
def test_lateral_weights_learn_and_stay_symmetric_between_colors(settings):
    rule = bpf.TeamReinforce(lateral_lr=0.05, **settings)
    fitted(problem(7, 8, lr=0.1), loader(), rule)
    weights = lateral_weights(rule)
    assert weights.keys() == {"lateral/net.layers.1", "lateral/net.layers.3"}
    for name, weight in weights.items():
        assert len(weight) == (7 if name.endswith("1") else 8)
        assert torch.equal(weight, weight.T)
        groups = settings["exploration"].groups(len(weight))
        assert not any(bool(weight[group, group].any()) for group in groups)
        zeros = sum((group.stop - group.start) ** 2 for group in groups)
        assert int((weight == 0).sum()) == zeros  # all others have moved


def test_recurrent_weights_learn_without_symmetry():
    rule = bpf.TeamReinforce(exploration="recurrent", lateral_lr=0.05)
    fitted(problem(lr=0.1), loader(), rule)
    for weight in lateral_weights(rule).values():
        assert bool(weight.any())
        assert not torch.equal(weight, weight.T)


def test_what_the_rule_owns_steps_when_the_optimizer_does():
    rule = bpf.TeamReinforce(exploration="boltzmann", baseline="per_layer", lateral_lr=0.05)
    trainer = fitted(problem(lr=0.1), loader(), rule, accumulate_grad_batches=2)
    assert trainer.global_step == 2
    state = rule.rule_state()
    several = [*state["lateral"].values(), *state["critics"].values()]
    assert len(several) == 2 + 3
    for saved in several:
        assert {int(moments["step"]) for moments in saved["optimizer"]["state"].values()} == {2}
    once = bpf.TeamReinforce(exploration="boltzmann", lateral_lr=0.05)
    fitted(problem(lr=0.1), loader(), once, accumulate_grad_batches=4)
    for weight in lateral_weights(once).values():
        # The first step of Adam is the learning rate, unless the gradient is as small as its epsilon; in float32.
        moved = weight[weight != 0].abs()
        assert float(moved.max()) <= 0.05 * (1 + 1e-3)
        assert float(moved.median()) == pytest.approx(0.05, rel=1e-3)


def test_a_rule_without_draws_of_its_own_leaves_lateral_weights_alone():
    rule = bpf.TeamReinforce(exploration="boltzmann", start_epoch=5)
    fitted(problem(lr=0.1), loader(), rule)
    assert lateral_weights(rule) == {}


# --- precision -------------------------------------------------------------------------------------------------------

EVERY: dict[str, dict[str, Any]] = {
    "reward": {},
    "weight_max": {"credit": "weight_max"},
    "exact_weight_max": {"credit": bpf.WeightMax(exact=True)},
    "map_propagation": {"unit": "gaussian", "credit": "map_propagation"},
    "ste": {"credit": "ste"},
    "identity": {"credit": bpf.StraightThrough("identity")},
    "pathwise": {"unit": "gaussian", "credit": "pathwise"},
    "loss": {"output": None, "reward": "loss"},
    "boltzmann": {"exploration": "boltzmann"},
    "whole_network": {"exploration": bpf.Boltzmann(whole_network=True)},
    "recurrent": {"exploration": "recurrent"},
    "critic": {"baseline": "critic"},
    "per_layer": {"baseline": "per_layer"},
}


@pytest.mark.parametrize("name", EVERY)
def test_mixed_precision_trains_in_single(name):
    assert set(CREDITS) <= set(EVERY)
    module = problem(lr=0.1)
    fitted(module, loader(rows=32), bpf.TeamReinforce(**EVERY[name]), precision="bf16-mixed")
    assert len(module.gradients[0]) == 6
    for gradients in module.gradients:
        for gradient in gradients.values():
            assert gradient.dtype == torch.float32
            assert bool(torch.isfinite(gradient).all())
            assert bool(gradient.any())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in EVERY for dtype in (torch.bfloat16, torch.float64)],
)
def test_true_half_and_double_precision_train(name, dtype):
    torch.manual_seed(0)
    module = Plain(MLP(6, [8, 8], 3).to(dtype))
    found = estimate(bpf.TeamReinforce(**EVERY[name]), module, vectors(dtype=dtype))
    for gradient in found.values():
        assert gradient.dtype == dtype
        assert bool(torch.isfinite(gradient).all())
        assert bool(gradient.any())


# --- a resume inside an epoch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"exploration": "boltzmann", "negative_phase": True},
        {"exploration": "recurrent", "evaluation": "samples"},
        {"learning_rates": (1.0, 0.1)},
        {"start_epoch": 1},
        {"stop_epoch": 1},
    ],
    ids=lambda settings: next(iter(settings)) if "exploration" not in settings else settings["exploration"],
)
def test_a_run_that_is_resumed_inside_an_epoch_is_the_same_run(settings, tmp_path):
    def part(ckpt_path=None):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(5)
        checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        rule = bpf.TeamReinforce(**({"lateral_lr": 0.05} if "exploration" in settings else {}), **settings)
        options = {**QUIET, "enable_checkpointing": True}
        trainer = pl.Trainer(callbacks=[rule, checkpoints], max_epochs=2, **options)
        trainer.fit(Net(), Batches(), ckpt_path=ckpt_path)
        return trainer.lightning_module, rule

    whole, whole_rule = part()
    again, again_rule = part(tmp_path / "step=9.ckpt")  # two batches into the second epoch
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    one, other = lateral_weights(whole_rule), lateral_weights(again_rule)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert untouched(whole) == untouched(again)


# --- several fits, several rules -------------------------------------------------------------------------------------


def test_a_second_fit_begins_anew():
    module, rule = problem(lr=0.05), bpf.TeamReinforce(exploration="boltzmann", lateral_lr=0.05)
    fitted(module, loader(), rule)
    fitted(module, loader(), rule)
    assert rule.record.batches == 4
    assert all(len(part._forward_hooks) == 1 for part in module.modules() if isinstance(part, nn.Linear))
    for saved in rule.rule_state()["lateral"].values():
        assert int(saved["optimizer"]["state"][0]["step"]) == 4
    fitted(module, loader(), bpf.TeamReinforce())  # by another object
    assert all(len(part._forward_hooks) == 1 for part in module.modules() if isinstance(part, nn.Linear))


@pytest.mark.parametrize("settings", [{"exploration": "boltzmann", "lateral_lr": 0.1}, {"baseline": "per_layer"}])
@pytest.mark.parametrize("widths", [(5, 5), (8, 8)])
def test_a_second_module_starts_afresh_and_leaves_the_first_as_it_is(widths, settings):
    rule, one, two = bpf.TeamReinforce(**settings), problem(lr=0.1), problem(*widths, lr=0.1)
    fitted(one, loader(), rule)
    x = torch.randn(3, 6)
    expected = one.net(x)
    fitted(two, loader(), rule)
    assert torch.equal(one.net(x), expected)
    state = rule.rule_state()
    for saved in [*state["lateral"].values(), *state["critics"].values()]:
        assert int(saved["optimizer"]["state"][0]["step"]) == 4


@pytest.mark.parametrize("other", [bpf.Backprop, bpf.ForwardGradient, bpf.ForwardForward])
def test_another_rule_does_not_train_through_a_team_unnoticed(other):
    module, rule = problem(lr=0.01), bpf.TeamReinforce()
    fitted(module, loader(), rule)
    with pytest.raises(
        MisconfigurationException, match=r"TeamReinforce still replaces its forward pass.*uninstall\(module\) f"
    ):
        fitted(module, loader(), other())
    rule.uninstall(module)
    fitted(module, loader(), other())


def test_a_team_does_not_train_through_another_rule_unnoticed():
    module, rule = problem(lr=0.01), bpf.ForwardForward()
    fitted(module, loader(), rule)
    with pytest.raises(MisconfigurationException, match=r"ForwardForward still replaces.*uninstall\(module\) first"):
        fitted(module, loader(), bpf.TeamReinforce())
    rule.uninstall()
    fitted(module, loader(), bpf.TeamReinforce())


def test_alignment_says_that_there_is_nothing_to_compare_with():
    alignment = bpf.GradientAlignment(every_n_steps=1)
    fitted(problem(), loader(), bpf.TeamReinforce(), alignment)
    assert alignment.measured == 0


def test_the_cost_of_every_draw_is_counted():
    found = []
    for num_samples in (2, 6):
        rule = bpf.TeamReinforce(num_samples=num_samples)
        fitted(problem(), loader(), rule)
        found.append(rule.record.forward_evals / 4)
    assert found == [2 * 2, 6 * 2]  # a forward pass, and a product of matrices a layer behind it
