"""An optimizer that holds a part of the parameters: only these are estimated."""

from __future__ import annotations

import pytest
import torch
from differentiating_modules import (
    WITHOUT_BACKWARD,
    AllDirections,
    Classifier,
    every_rule,
    smooth,
)
from foreign_problems import vector_data
from problems import fitted

import lightning_bpfree as bpf

# --- an optimizer that holds a part of the parameters ----------------------------------------------------------------


class HeadOnly(Classifier):
    def __init__(self) -> None:
        super().__init__(smooth())

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[2].parameters(), lr=0.1)


@pytest.mark.parametrize("rule", ["forward", "loop", "central"])
def test_only_what_an_optimizer_holds_is_estimated(rule):
    """Along all 18 directions of the head, the estimate is the head's gradient: no direction leaves it."""
    rules = {
        "forward": lambda: bpf.ForwardGradient(18, orthogonal=True),
        "loop": lambda: bpf.ForwardGradient(18, orthogonal=True, chunk_size=1),
        "central": lambda: bpf.ZerothOrder(18, sigma=1e-4, orthogonal=True),
    }
    module = HeadOnly()
    fitted(module, vector_data(), rules[rule](), AllDirections(), limit_train_batches=1, precision="64-true")
    assert module.net[0].weight.grad is None


@pytest.mark.parametrize("algorithm", ["openai_es", "snes"])
def test_a_search_has_the_coordinates_that_an_optimizer_holds(algorithm):
    rule = bpf.EvolutionStrategy(algorithm, population_size=8)
    fitted(HeadOnly(), vector_data(), rule)
    assert rule._coordinates.dim == 18


class Grows(HeadOnly):
    """Hands the optimizer further parameters at the second epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.optimizers(use_pl_optimizer=False).add_param_group({"params": self.net[0].parameters()})


@every_rule
def test_parameters_that_an_optimizer_gets_later_train_from_then_on(rule):
    module = Grows()
    before = module.net[0].weight.detach().clone()
    fitted(module, vector_data(), WITHOUT_BACKWARD[rule]())
    assert torch.equal(module.net[0].weight, before)
    fitted(module, vector_data(), WITHOUT_BACKWARD[rule](), max_epochs=2)
    assert not torch.equal(module.net[0].weight, before)
