"""Steps of the sizes: how often crops change, scaled gradients, budgets from below, sizes that are too coarse."""

from __future__ import annotations

import itertools

import pytest
import torch
from searched_networks import Module, built, loader, search, trainer

import lightning_bpfree as bpf
from lightning_bpfree.demos.nets import MLP
from lightning_bpfree.methods.learnable_architecture.search import Search
from lightning_bpfree.methods.learnable_architecture.tracing.counting import CostBuilder


def made(**settings) -> Search:
    _, _, architecture = built("mlp")
    cost = CostBuilder(architecture).macs()
    return Search(architecture, cost, 0.3 * cost.full, **{"weight": 1.0, "lr": 0.05, "tolerance": 0.05, **settings})


def values(own: Search) -> list[float]:
    return [float(parameter.detach()) for parameter in own.parameters]


def test_crops_change_every_so_many_steps_and_masks_at_each():
    own = made(update_every=3, lr=0.2)  # so fast that three steps change crops of few units
    crops, sizes = [list(own.architecture.sizes().values())], [values(own)]
    for _ in range(6):
        own.step()
        crops.append(list(own.architecture.sizes().values()))
        sizes.append(values(own))
    assert all(a != b for a, b in itertools.pairwise(sizes))
    assert crops[0] == crops[1] == crops[2]
    assert crops[2] != crops[3] == crops[4] == crops[5]
    assert crops[5] != crops[6]


def test_the_scale_of_a_gradient_scaler_is_taken_out():
    ends = []
    for scale in (1.0, 1024.0):
        own = made()
        for place, parameter in enumerate(own.parameters):
            parameter.grad = torch.tensor(0.1 * scale * (-1) ** place)
        own.step(scale)
        ends.append(values(own))
    assert ends[0] == ends[1]  # a power of two


def test_a_step_of_gradients_that_are_not_finite_is_left_out():
    own = made()
    before = values(own)
    own.parameters[0].grad = torch.tensor(float("inf"))
    own.step()
    assert values(own) == before
    own.step()
    assert values(own) != before


def test_a_budget_is_met_from_below():
    """Kernels begin small, and grow to a budget that is above their first cost."""
    torch.manual_seed(0)
    network = bpf.CCNN((1, 32), 3, width=8, blocks=1, max_kernel=31, spread=0.08, crops=False)
    callback = search(0.8, ("kernel",), network="net", tolerance=0.01)
    trainer(callback, max_epochs=6).fit(Module(network), loader(1, 32))
    first = callback.search.history[0]
    assert first["cost"] < 0.7
    assert callback.export().macs == pytest.approx(0.8 * callback._budget.reference, rel=0.02)
    assert all(callback.architecture.shares()[name] > share for name, share in first["shares"].items())


def test_sizes_that_are_too_coarse_for_a_budget_are_reported():
    callback = search(0.6, network="net", tolerance=0.01)
    with pytest.warns(UserWarning, match=r"fixed at .* of the budget; .* too coarse"):
        trainer(callback, max_epochs=1).fit(Module(MLP(6, [4], 3)), loader(6))  # a unit is a quarter of the network
    assert callback.cost_over_budget == pytest.approx(2 / 4 / 0.6)
