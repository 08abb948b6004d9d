"""Weights that the step reaches in other ways than through the module are perturbed, and stay where they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from once_modules_state import Meter, Owner, SlottedMeter
from once_problems import (
    CLASSES,
    FEATURES,
    RULES,
    Once,
    exact_rule,
    first_gradient,
)
from problems import fitted
from thinned import in_turn
from torch import Tensor, nn

import lightning_bpfree as bpf

# --- weights that the step reaches in other ways than through the module ----


class FromAList(Once):
    def prepare(self):
        self.penalized = list(self.net.parameters())

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + sum(p.square().sum() for p in self.penalized)


class FromADict(Once):
    """Calls its network by a dict that it has kept."""

    def prepare(self):
        self.weights = dict(self.net.named_parameters())

    def training_step(self, batch, batch_idx):
        logits = torch.func.functional_call(self.net, self.weights, (batch[0],))
        return F.cross_entropy(logits, batch[1]) + self.net.weight.square().sum()


class FromATuple(Once):
    def prepare(self):
        self.packed = (("weights", (self.net.weight, self.net.bias)), 1.0)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(F.linear(batch[0], *self.packed[0][1]), batch[1])


class FromAHelper(Once):
    def prepare(self):
        self.meter, self.slotted = Meter(), SlottedMeter()
        self.meter.weight, self.slotted.values = self.net.weight, [self.net.bias]

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(F.linear(batch[0], self.meter.weight, self.slotted.values[0]), batch[1])


class FromAnUnregisteredModule(Once):
    """A list holds a module that shares the weights."""

    def prepare(self):
        self.held = [nn.Linear(FEATURES, CLASSES)]
        self.held[0].weight, self.held[0].bias = self.net.weight, self.net.bias

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.held[0](batch[0]), batch[1])


class FromTheOptimizer(Once):
    def training_step(self, batch, batch_idx):
        groups = self.trainer.optimizers[0].param_groups
        penalty = sum(p.square().sum() for group in groups for p in group["params"])
        return super().training_step(batch, batch_idx) + penalty


class FromAModuleAttribute(Once):
    """Tied by hand: the attribute of another object, and a child that is there twice."""

    def prepare(self):
        self.same, self.net_again = Owner(self), self.net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net_again(batch[0]), batch[1]) + self.same.module.net.weight.square().sum()


ELSEWHERE = [
    FromAList, FromADict, FromATuple, FromAHelper, FromAnUnregisteredModule, FromTheOptimizer, FromAModuleAttribute,
]  # fmt: skip


@pytest.mark.parametrize("make", ELSEWHERE, ids=lambda make: make.__name__)
def test_weights_are_perturbed_wherever_the_step_takes_them_from(make):
    expected = first_gradient(make)
    # As many orthonormal directions as coordinates: the gradient itself, up to the solution of a small linear system.
    torch.testing.assert_close(first_gradient(make, exact_rule(make)), expected, rtol=1e-7, atol=1e-9)
    directions = {"num_directions": 2, "seed": 1}
    exact = first_gradient(make, bpf.ForwardGradient(**directions))
    found = first_gradient(make, bpf.ZerothOrder(**directions, sigma=1e-4))
    # Central differences: O(sigma^2) times a third derivative of a few units, and rounding of 1e-16 / sigma.
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("make", "rule"), in_turn(ELSEWHERE, RULES, fast=2))
def test_what_holds_the_weights_holds_them_behind_the_fit(make, rule):
    torch.manual_seed(0)
    module = make()
    kept = module.net.weight, module.net.bias
    fitted(module, module.data(), RULES[rule](), precision="64-true")
    assert module.net.weight is kept[0]
    assert module.net.bias is kept[1]
    for holder in ("penalized", "weights", "packed", "held"):
        assert all(any(p is k for k in kept) for p in _parameters_in(getattr(module, holder, ()))), holder


def _parameters_in(value: Any) -> list[Any]:
    if isinstance(value, nn.Module):
        return list(value.parameters())
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [value] if isinstance(value, Tensor) else [p for item in items for p in _parameters_in(item)]
