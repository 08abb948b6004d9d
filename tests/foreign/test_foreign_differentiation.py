"""Steps that differentiate within themselves train exactly, or are refused."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
from differentiating_modules import (
    DERIVATIVES,
    Physics,
    smooth,
)
from foreign_problems import Slopes, vector_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import fitted
from thinned import in_turn
from torch.utils.data import DataLoader

import lightning_bpfree as bpf

SLOPES: dict[str, Callable[[], bpf.TrainingRule]] = {
    "forward_gradient": lambda: bpf.ForwardGradient(2),
    "loop": lambda: bpf.ForwardGradient(2, chunk_size=1),
    "zeroth_order": lambda: bpf.ZerothOrder(2, sigma=1e-5),
}


def assert_slopes_are_exact(module: pl.LightningModule, data: DataLoader, rule: str) -> None:
    slopes = Slopes()
    fitted(module, data, SLOPES[rule](), slopes, limit_train_batches=3, precision="64-true")
    assert len(slopes.errors) == 3
    # Equal math in float64; zeroth order: rounding 1e-16 / sigma and sigma^2 times the third derivative, all smooth.
    assert max(slopes.errors) < (1e-7 if rule == "zeroth_order" else 1e-10), slopes.errors


@pytest.mark.parametrize("rule", SLOPES)
@pytest.mark.parametrize("kind", DERIVATIVES)
def test_slopes_are_exact_where_the_step_differentiates(kind, rule):
    assert_slopes_are_exact(kind(smooth()), vector_data(), rule)


@pytest.mark.parametrize(("kind", "algorithm"), in_turn(DERIVATIVES, ["openai_es", "snes"], fast=1))
def test_members_see_the_loss_that_differentiates(kind, algorithm):
    found = []
    for chunk_size in ("auto", 1):
        torch.manual_seed(1)
        module = kind(smooth())
        rule = bpf.EvolutionStrategy(algorithm, population_size=8, chunk_size=chunk_size)
        fitted(module, vector_data(), rule, limit_train_batches=3, precision="64-true")
        found.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    # Losses are compared in float32, 6e-8 of them; centered ranks divide out the rest.
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


class Measured(bpf.GradientAlignment):
    def _log(self, trainer, module, guess, truth):
        self.guess, self.truth = guess, truth
        super()._log(trainer, module, guess, truth)


@pytest.mark.parametrize("kind", DERIVATIVES)
def test_the_true_gradient_beside_backprop_is_the_same(kind):
    measured = Measured(1)
    fitted(kind(smooth()), vector_data(), bpf.Backprop(), measured, limit_train_batches=3)
    assert measured.measured == 3
    assert abs(measured.mean_cosine - 1) < 1e-5  # equal math in float32


@pytest.mark.parametrize("rule", [lambda: bpf.ForwardGradient(4, chunk_size=2),
                                  lambda: bpf.EvolutionStrategy(population_size=8, chunk_size=4)])  # fmt: skip
def test_a_chunk_size_beside_a_derivative_is_refused_with_the_cure(rule):
    with pytest.raises(MisconfigurationException, match=r"itself computes gradients.*chunk_size=1"):
        fitted(Physics(smooth()), vector_data(), rule())
