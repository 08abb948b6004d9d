"""An objective from which there is nothing to learn is said to be flat, once and with the cure."""

from __future__ import annotations

import warnings

import pytest
import torch.nn.functional as F
from differentiating_modules import (
    Classifier,
)
from foreign_problems import vector_data
from problems import fitted
from torch import Tensor

import lightning_bpfree as bpf

# --- nothing to learn from -------------------------------------------------------------------------------------------


class Errors(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return 1 - (self.net(batch[0]).argmax(1) == batch[1]).float().mean()


class Constant(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * 0 + 1


class Dead(Classifier):
    def logits(self, x):
        return F.relu(self.net(x) - 1e6)


FLAT = {
    "zeroth_order": (lambda: bpf.ZerothOrder(4), "larger sigma"),
    "one_sided": (lambda: bpf.ZerothOrder(4, scheme="forward"), "larger sigma"),
    "forward_gradient": (lambda: bpf.ForwardGradient(4), "EvolutionStrategy"),
    "loop": (lambda: bpf.ForwardGradient(1), "EvolutionStrategy"),
    "evolution": (lambda: bpf.EvolutionStrategy(population_size=8), "larger sigma"),
}


@pytest.mark.parametrize("rule", FLAT)
@pytest.mark.parametrize("kind", [Constant, Dead])
def test_a_flat_objective_is_said_once_with_the_cure(kind, rule):
    make, cure = FLAT[rule]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        fitted(kind(), vector_data(), make(), max_epochs=2)
    said = [str(w.message) for w in heard if type(make()).__name__ in str(w.message)]
    assert len(said) == 1
    assert cure in said[0]


def test_an_objective_of_few_values_is_said_to_be_flat():
    with pytest.warns(UserWarning, match=r"ZerothOrder: the loss is flat along all 4 directions in batch 0"):
        fitted(Errors(), vector_data(), bpf.ZerothOrder(4))


@pytest.mark.parametrize("rule", ["zeroth_order", "forward_gradient", "loop"])
def test_nothing_is_said_of_an_ordinary_objective(rule, recwarn):
    fitted(Classifier(), vector_data(), FLAT[rule][0]())
    assert not [w for w in recwarn if "flat" in str(w.message)]
