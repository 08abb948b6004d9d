"""Modules whose training step moves something, and the comparison of a rule's fit with a plain one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from problems import fitted
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf

FEATURES, CLASSES, BATCHES = 3, 2, 4

RULES: dict[str, Callable[[], bpf.TrainingRule]] = {
    "backprop": bpf.Backprop,
    "forward_gradient": partial(bpf.ForwardGradient, 2),
    "one_by_one": partial(bpf.ForwardGradient, 2, chunk_size=1),
    "zeroth_order": partial(bpf.ZerothOrder, 2, sigma=0.3),  # wide: an evaluation beside the recorded one is seen
    "evolution_strategy": partial(bpf.EvolutionStrategy, population_size=4),
}


def table() -> tuple[Tensor, Tensor]:
    """Rows of four batches of four: new tensors at each call, for some steps write to them."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4 * BATCHES, FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (4 * BATCHES,), generator=generator)


def pairs() -> DataLoader:
    return DataLoader(TensorDataset(*table()), batch_size=4)


def batches() -> list[tuple[Tensor, Tensor]]:
    x, y = table()
    return list(zip(x.split(4), y.split(4), strict=True))


def loaded(items: list[Any]) -> DataLoader:
    """Return a loader that hands out the very objects."""
    return DataLoader(items, batch_size=None, collate_fn=lambda item: item)  # type: ignore[arg-type]


class Once(pl.LightningModule):
    """Base of the modules: eight weights, which do not move unless ``lr`` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(FEATURES, CLASSES)
        self.lr = 0.0
        self.prepare()

    def prepare(self) -> None:
        """Make what the step moves."""

    def data(self) -> Any:
        return pairs()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(*batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def trace(self) -> Any:
        """Return what the fit has left behind."""
        return None


class Seen(pl.Callback):
    """The losses that Lightning gets, and the gradients that the optimizer does."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def outcome(make: Callable[[], Once], *callbacks: pl.Callback, **settings: Any) -> dict[str, Any]:
    """Return everything that a fit leaves behind and that the rule has no part in, in float64."""
    torch.manual_seed(0)
    module, seen = make(), Seen()
    trainer = fitted(module, module.data(), *callbacks, seen, precision="64-true", **settings)
    return {
        "trace": module.trace(),
        "losses": seen.losses,
        "logged": {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("bpfree/")},
        "buffers": dict(module.named_buffers()),
        "frozen": {n: p.detach() for n, p in module.named_parameters() if not p.requires_grad},
        "next draw": torch.rand(()),
    }


def first_gradient(make: Callable[[], Once], *callbacks: pl.Callback) -> Tensor:
    torch.manual_seed(0)
    module, seen = make(), Seen()
    fitted(module, module.data(), *callbacks, seen, precision="64-true", max_steps=1)
    return torch.cat([grad.flatten() for _, grad in sorted(seen.gradients[0].items())])


def exact_rule(make: Callable[[], Once]) -> bpf.ForwardGradient:
    """As many orthonormal directions as parameters: the estimate is the gradient itself."""
    coordinates = sum(p.numel() for p in make().parameters() if p.requires_grad)
    return bpf.ForwardGradient(coordinates, orthogonal=True)


def difference(a: Any, b: Any, where: str = "") -> str:
    """Return where two traces differ, or an empty string."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        # Equal math in float64: an evaluation in forward mode may sum in another order.
        same = a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-10, atol=1e-12, equal_nan=True)
        return "" if same else f"{where}: {a} is not {b}"
    if isinstance(a, float):
        return "" if math.isclose(a, b, rel_tol=1e-10, abs_tol=1e-12) or a != a != b else f"{where}: {a} is not {b}"
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"{where}: {sorted(a)} is not {sorted(b)}"
        return next(filter(None, (difference(a[key], b[key], f"{where}[{key}]") for key in a)), "")
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{where}: {len(a)} elements, not {len(b)}"
        return next(
            filter(None, (difference(p, q, f"{where}[{i}]") for i, (p, q) in enumerate(zip(a, b, strict=True)))), ""
        )
    return "" if a == b else f"{where}: {a} is not {b}"
