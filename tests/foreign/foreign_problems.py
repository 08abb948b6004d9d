"""Rules, slopes and small modules for the tests of modules that nobody here wrote."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from problems import fitted
from shipped import cases
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.core.directions import Directions
from lightning_bpfree.core.params import dot, norm

STEPS = 3


RULES: dict[str, Callable[[], bpf.TrainingRule]] = cases("ANY_MODULE")


class Slopes(pl.Callback):
    """Compares every estimate with `mean_k <g, v_k> v_k`, for the gradient `g` of backprop on the same noise."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def setup(self, trainer, pl_module, stage) -> None:
        (self.rule,) = [callback for callback in trainer.callbacks if isinstance(callback, bpf.TrainingRule)]
        self.rule.observers.append(self)

    def due(self, trainer) -> bool:
        return True

    def observe(self, trainer, module, step, estimate) -> None:
        params = [slot.parameter for slot in step.trained]
        with torch.enable_grad():
            grads = torch.autograd.grad(step.loss(recorded=False), params, allow_unused=True, materialize_grads=True)
        truth = {slot.name: grad for slot, grad in zip(step.trained, grads, strict=True)}
        directions = Directions(step.params, self.rule.num_directions, step.seed)
        slopes = [float(dot(truth, v)) for v in directions]
        expected = {
            name: sum(slope * v[name] for slope, v in zip(slopes, directions, strict=True)) / len(slopes)
            for name in truth
        }
        found = estimate.resolved()
        difference = norm({name: found[name] - expected[name] for name in expected})
        # An inner product is rounded relative to |g| |v|, be it itself small or not.
        self.errors.append(float(difference / norm(truth) / max(norm(v) for v in directions) ** 2))


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


def assert_trains(module: pl.LightningModule, data: Any, rule: bpf.TrainingRule, **settings: Any) -> list[float]:
    """Train for a few steps: losses are finite, and all that is to be trained has moved."""
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    losses = Losses()
    fitted(module, data, rule, losses, limit_train_batches=STEPS, limit_val_batches=0, **settings)
    assert len(losses.values) == STEPS
    assert all(map(math.isfinite, losses.values))
    for name, parameter in module.named_parameters():
        assert bool(torch.isfinite(parameter).all()), name
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    return losses.values


def assert_slopes_are_backprops(module: pl.LightningModule, data: Any, rule: str) -> None:
    """Compare all estimates of a few steps with backprop, in float64."""
    slopes = Slopes()
    made = bpf.ZerothOrder(2, sigma=1e-5) if rule == "zeroth_order" else RULES[rule]()
    fitted(module, data, made, slopes, limit_train_batches=STEPS, limit_val_batches=0, precision="64-true")
    assert len(slopes.errors) == STEPS
    # Equal math in float64. Zeroth order: what a central difference neglects, chiefly at the kinks of ReLU within
    # sigma |v| < 1e-3 of the parameters; other dropout noise in one of its evaluations gives 1e-2 and more.
    assert max(slopes.errors) < (1e-4 if rule == "zeroth_order" else 1e-10), slopes.errors


def tokens(rows: int, length: int, vocabulary: int = 20) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def language_data() -> DataLoader:
    drawn = tokens(12, 9)
    return DataLoader(TensorDataset(drawn[:, :-1], drawn[:, 1:]), batch_size=4)


def vectors(rows: int = 24, features: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, features, generator=generator)
    return x, (x @ torch.randn(features, 3, generator=generator)).argmax(1)


def vector_data() -> DataLoader:
    return DataLoader(TensorDataset(*vectors()), batch_size=8)


class Small(pl.LightningModule):
    """Base of the modules below."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class DictBatch(Small):
    """Takes a dictionary and returns one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        logits = self.net(batch["x"])
        return {"loss": F.cross_entropy(logits, batch["y"]), "logits": logits.detach()}


class Wrapped(Small):
    """A classifier whose first layer has been treated."""

    def __init__(self, treat: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(treat(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


def compiled(layer: nn.Module) -> nn.Module:
    return torch.compile(layer, backend="eager")
