"""Every member of an ensemble is what it would be alone: bit for bit in turn, up to rounding side by side."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from ensemble_problems import Seeded, Small, Snapshot, alone, largest_difference, shuffled, tensors, train
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import fitted
from shipped import shipped_rules
from torch import nn
from torch.utils.data import Subset

import lightning_bpfree as bpf
from lightning_bpfree.functional import bootstrap_rows

FULL = {"max_epochs": 2, "gradient_clip_val": 0.2, "accumulate_grad_batches": 2}
ROUNDING = 1e-5  # equal mathematics in float32, in another order of operations


def compare(make, ensemble: bpf.DeepEnsemble, exact: bool, data=None, lr_factors=None, **settings) -> None:
    _, _, before, after = train(make, ensemble, data() if data else None, **settings)
    for member, (start, end) in enumerate(zip(before, after, strict=True)):
        factor = lr_factors[member] if lr_factors else 1.0
        other = alone(make, start, ensemble.seeds[member], data() if data else None, lr_factor=factor, **settings)
        assert any(not torch.equal(start[name], end[name]) for name in start), "it has moved"
        if exact:
            assert all(torch.equal(end[name], other[name]) for name in end), member
        else:
            assert largest_difference(end, other) < ROUNDING, member


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adagrad"])
@pytest.mark.parametrize("route", ["sequential", "stacked"])
def test_dropout_batchnorm_scheduler_clipping_and_accumulation(route, optimizer):
    ensemble = bpf.DeepEnsemble(3, route=route, seed=3)
    compare(lambda: Small(optimizer), ensemble, route == "sequential", **FULL)
    assert ("side by side" in ensemble.route) == (route == "stacked")


@pytest.mark.parametrize("route", ["sequential", "stacked"])
def test_a_learning_rate_for_each(route):
    factors = [0.5, 1.0, 2.0]
    ensemble = bpf.DeepEnsemble(3, route=route, seed=3, lr_factors=factors)
    compare(Small, ensemble, route == "sequential", lr_factors=factors, max_epochs=2, accumulate_grad_batches=3)


@pytest.mark.parametrize("route", ["sequential", "stacked"])
def test_clipping_by_value_without_accumulation(route):
    settings = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
    compare(Small, bpf.DeepEnsemble(2, route=route, seed=3), route == "sequential", **settings)


class Decoupled(Small):
    """Weight decay for matrices only, by their dimensions; a frozen layer; tied weights; a schedule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x):
        return self.net(torch.tanh(self.frozen(self.second(torch.tanh(self.first(x))))))

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.5},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "lr": 1e-3},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [2e-2, 2e-3], total_steps=6)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


@pytest.mark.parametrize("route", ["sequential", "stacked"])
def test_parameter_groups_by_dimension_tied_and_frozen_weights(route):
    ensemble = bpf.DeepEnsemble(3, route=route, seed=3)
    compare(Decoupled, ensemble, route == "sequential", max_epochs=2)
    frozen = [state["frozen.weight"] for state in ensemble.member_states()]
    assert torch.equal(frozen[0], frozen[1])


@pytest.mark.parametrize("route", ["sequential", "stacked"])
def test_bootstrap_samples(route):
    ensemble = bpf.DeepEnsemble(3, route=route, seed=3, bootstrap=True)
    _, _, before, after = train(Small, ensemble, **FULL)
    assert len({tuple(bootstrap_rows(48, seed).tolist()) for seed in ensemble.seeds}) == 3, "samples differ"
    for member, (start, end) in enumerate(zip(before, after, strict=True)):
        seed = ensemble.seeds[member]
        sample = Subset(tensors(), bootstrap_rows(48, seed).tolist())
        other = alone(Small, start, seed, shuffled(sample), **FULL)
        if route == "sequential":
            assert all(torch.equal(end[name], other[name]) for name in end)
        else:
            assert largest_difference(end, other) < ROUNDING


class Noisy(Small):
    """Draws in training_step: noise, a permutation for mixup, and a mask."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.1 * torch.randn_like(x)
        order, share = torch.randperm(len(x)), torch.rand(())
        logits = self(share * x + (1 - share) * x[order]) * torch.bernoulli(torch.full((3,), 0.9))
        return share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[order])


@pytest.mark.parametrize("route", ["sequential", "stacked"])
def test_random_numbers_in_the_step_are_each_members_own(route):
    compare(Noisy, bpf.DeepEnsemble(3, route=route, seed=3), route == "sequential", max_epochs=2)


class Recurrent(Small):
    """Carries a hidden state and a counter from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.steps = None, 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.steps += 1
        hidden = x if self.hidden is None else x + 0.5 * self.hidden
        self.hidden = torch.tanh(self.net[0](hidden)[:, :6]).detach()
        return F.cross_entropy(self(hidden), y) / self.steps


def test_what_a_step_assigns_is_kept_for_each_member():
    ensemble = bpf.DeepEnsemble(3, seed=3)
    compare(Recurrent, ensemble, True, max_epochs=2)
    assert "training_step keeps a tensor in Recurrent.hidden" in ensemble.route


@pytest.mark.parametrize("route", ["sequential", "stacked"])
def test_each_member_has_its_activation(route):
    names = ["relu", "elu", "gelu"]
    kinds = {"relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU}
    ensemble = bpf.DeepEnsemble(6, activations=names, route=route, seed=3)
    _, module, before, after = train(Small, ensemble, **FULL)
    assert type(module.net[2]) is nn.ReLU
    assert "forward" not in module.net[2].__dict__, "put back"

    for member, (start, end) in enumerate(zip(before, after, strict=True)):

        def make(name=names[member // 2]):
            module = Small()
            module.net[2] = kinds[name]()
            return module

        other = alone(make, start, ensemble.seeds[member], **FULL)
        if route == "sequential":
            assert all(torch.equal(end[name], other[name]) for name in end)
        else:
            assert largest_difference(end, other) < ROUNDING


class Watched(Small):
    """Hooks that look at gradients and change them."""

    def on_before_optimizer_step(self, optimizer) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.5)

    def on_after_backward(self) -> None:
        for p in self.parameters():
            p.grad = p.grad.clamp(-0.1, 0.1)


def test_hooks_of_the_module_are_called_for_each_member():
    ensemble = bpf.DeepEnsemble(3, seed=3)
    compare(Watched, ensemble, True, **FULL)
    assert "Watched defines on_before_optimizer_step" in ensemble.route


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_precisions(precision):
    compare(Small, bpf.DeepEnsemble(2, route="sequential", seed=3), True, precision=precision, **FULL)
    if precision == "64-true":
        ensemble = bpf.DeepEnsemble(2, route="stacked", seed=3)
        _, _, before, after = train(Small, ensemble, precision=precision, **FULL)
        for member, (start, end) in enumerate(zip(before, after, strict=True)):
            other = alone(Small, start, ensemble.seeds[member], precision=precision, **FULL)
            assert largest_difference(end, other) < 1e-10  # equal mathematics in float64


SETTINGS = {
    "ForwardGradient(guess)": partial(bpf.ForwardGradient, guess=bpf.LocalLoss("mlp", lr=0.01)),
    "EvolutionStrategy(snes)": partial(bpf.EvolutionStrategy, "snes", 4),
    "ZerothOrder(2)": partial(bpf.ZerothOrder, 2),
    "DirectFeedbackAlignment(layerwise)": partial(bpf.DirectFeedbackAlignment, feedback="layerwise"),
}
RULES: dict[str, Any] = {kind.__name__: kind for kind in shipped_rules()} | SETTINGS
APART = [name for name, make in RULES.items() if make().estimates_user_loss]


@pytest.mark.parametrize(("rule", "first"), [*((rule, "rule") for rule in APART), ("ZerothOrder", "ensemble")])
def test_a_training_rule_trains_each_member_apart(rule, first):
    torch.manual_seed(7)
    module, ensemble, own = Small("sgd"), bpf.DeepEnsemble(3, seed=3), RULES[rule]()
    before = Snapshot(ensemble)
    callbacks = [own, ensemble] if first == "rule" else [ensemble, own]
    fitted(module, shuffled(), *callbacks, before, **FULL)
    assert f"{type(own).__name__} evaluates each member by itself" in ensemble.route
    seeds = [own.record.seed, *[copy.record.seed for copy in ensemble.rule_copies]]
    assert len(set(seeds)) == 3, "directions of their own"
    for member, (start, end) in enumerate(zip(before.states, ensemble.member_states(), strict=True)):
        assert any(not torch.equal(start[name], end[name]) for name in start), "it has moved"
        alone_module = Small("sgd")
        alone_module.load_state_dict({**alone_module.state_dict(), **start})
        fitted(alone_module, shuffled(), RULES[rule](seed=seeds[member]), Seeded(ensemble.seeds[member]), **FULL)
        other = alone_module.state_dict()
        assert all(torch.equal(end[name], other[name]) for name in end), member


@pytest.mark.parametrize("rule", sorted(RULES.keys() - APART))
def test_a_rule_that_cannot_train_members_apart_is_refused_with_the_reason(rule):
    module = Small("sgd")
    reason = f"by {rule}, which puts its own layers and losses into the one module that all members share"
    with pytest.raises(MisconfigurationException, match=reason):
        fitted(module, shuffled(), RULES[rule](), bpf.DeepEnsemble(2))
    assert "training_step" not in module.__dict__


def test_a_rule_of_one_epoch_leaves_the_others_to_backprop():
    ensemble, own = bpf.DeepEnsemble(2, seed=3), bpf.ZerothOrder(stop_epoch=1)
    _, _, before, after = train(lambda: Small("sgd"), ensemble, None, own, max_epochs=2)
    seeds = [own.record.seed, ensemble.rule_copies[0].record.seed]
    for member, (start, end) in enumerate(zip(before, after, strict=True)):
        alone_module = Small("sgd")
        alone_module.load_state_dict({**alone_module.state_dict(), **start})
        rule = bpf.ZerothOrder(stop_epoch=1, seed=seeds[member])
        fitted(alone_module, shuffled(), rule, Seeded(ensemble.seeds[member]), max_epochs=2)
        assert all(torch.equal(end[name], value) for name, value in alone_module.state_dict().items() if name in end)


def test_members_differ_and_the_first_is_the_module():
    ensemble = bpf.DeepEnsemble(3, seed=3)
    torch.manual_seed(7)
    own = {name: tensor.clone() for name, tensor in Small().state_dict().items()}
    _, module, before, after = train(Small, ensemble)
    assert all(torch.equal(before[0][name], own[name]) for name in before[0])
    assert not torch.equal(before[1]["net.0.weight"], before[2]["net.0.weight"])
    assert torch.equal(before[0]["net.1.running_var"], before[1]["net.1.running_var"])
    assert all(torch.equal(after[0][name], module.state_dict()[name]) for name in after[0])


def test_initialization_is_a_function_of_the_seed_and_moves_no_stream():
    ensemble = bpf.DeepEnsemble(2, seed=3)
    _, _, before, _ = train(Small, ensemble)
    pl.seed_everything(ensemble.seeds[1], verbose=False)
    fresh = Small()
    for part in reversed(list(fresh.net)):
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    pl.seed_everything(ensemble.seeds[1], verbose=False)
    for part in reversed(list(fresh.modules())):
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert torch.equal(before[1]["net.0.weight"], fresh.net[0].weight)


def test_initialization_by_a_function_and_none_at_all():
    def ones(module):
        nn.init.constant_(module.net[4].bias, torch.rand(()).item())

    _, _, before, _ = train(Small, bpf.DeepEnsemble(2, seed=3, initialize=ones))
    assert torch.equal(before[0]["net.0.weight"], before[1]["net.0.weight"])
    assert not torch.equal(before[0]["net.4.bias"], before[1]["net.4.bias"])
    _, _, before, _ = train(Small, bpf.DeepEnsemble(2, seed=3, initialize="same"))
    assert all(torch.equal(before[0][name], before[1][name]) for name in before[0])
