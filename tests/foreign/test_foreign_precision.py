"""Sigma follows the precision in which the step computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from differentiating_modules import (
    Classifier,
)
from foreign_problems import vector_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import fitted
from torch import Tensor, nn

import lightning_bpfree as bpf

# --- precision within the step ---------------------------------------------------------------------------------------


class Casts(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().training_step(batch, batch_idx)


class CastsByDecorator(Classifier):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx)


class CastsFunctions(Classifier):
    """No layer is called."""

    def logits(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(x, self.net.weight, self.net.bias).float()


class CastsAHead(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3).bfloat16()))

    def logits(self, x):
        return self.net[1](self.net[0](x).bfloat16()).float()


HALF = [Casts, CastsByDecorator, CastsFunctions, CastsAHead]


@pytest.mark.parametrize("kind", HALF)
def test_sigma_follows_what_the_step_computes(kind):
    rule = bpf.ZerothOrder(2)
    fitted(kind(), vector_data(), rule)
    assert rule._sigma_used == 1e-2


@pytest.mark.parametrize("rule", [lambda: bpf.ZerothOrder(sigma=1e-3),
                                  lambda: bpf.EvolutionStrategy(bpf.OpenAIES(sigma=1e-3), 8)])  # fmt: skip
@pytest.mark.parametrize("kind", HALF)
def test_a_sigma_that_the_step_swallows_is_refused(kind, rule):
    module = kind()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=r"lost in the rounding of torch\.bfloat16"):
        fitted(module, vector_data(), rule())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class StoredInHalf(Classifier):
    def logits(self, x):
        return self.net(x.half().float())


class SwitchedOff(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [Classifier, StoredInHalf, SwitchedOff])
def test_sigma_stays_where_nothing_is_computed_in_half_precision(kind):
    rule = bpf.ZerothOrder(2)
    fitted(kind(), vector_data(), rule)
    assert rule._sigma_used == 1e-3
