"""A module with all that makes stacking hard, and members of an ensemble trained alone by plain Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from problems import fitted
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_bpfree as bpf

State = dict[str, torch.Tensor]


class Small(pl.LightningModule):
    """Dropout, BatchNorm, metrics of three kinds, a scheduler; no bias before the BatchNorm.

    The gradient of such a bias is zero but for rounding, which Adam would blow up to full steps.
    """

    def __init__(self, optimizer: str = "adam", dropout: float = 0.3, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 3)
        )
        self.optimizer = optimizer
        self.accuracy, self.batch_accuracy, self.val_accuracy = (MulticlassAccuracy(3, average="micro") for _ in "abc")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx: int):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy.update(logits, y)
        self.log("train_acc", self.accuracy, on_step=False, on_epoch=True)
        self.log("batch_acc", self.batch_accuracy(logits, y), on_step=False, on_epoch=True)
        self.log_dict({"train_loss": loss}, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "adam": lambda p: torch.optim.Adam(p, 1e-2),
            "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
            "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
            "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
            "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
        }
        optimizer = kinds[self.optimizer](self.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Judged(Small):
    """With steps of evaluation; without data for them, Lightning would warn."""

    def validation_step(self, batch, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.val_accuracy(logits, y)
        self.log("val_acc", self.val_accuracy)
        self.log("val_loss", F.cross_entropy(logits, y))

    test_step = validation_step

    def predict_step(self, batch, batch_idx: int):
        return self(batch[0]).softmax(-1)


def tensors(rows: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 6, generator=generator)
    return TensorDataset(x, (x @ torch.randn(6, 3, generator=generator)).argmax(1))


def shuffled(data: Any = None, batch_size: int = 16) -> DataLoader:
    """A loader with a generator of its own: nothing but the module draws from the global stream."""
    generator = torch.Generator().manual_seed(1)
    return DataLoader(data or tensors(), batch_size, shuffle=True, generator=generator)


def plain(rows: int = 32) -> DataLoader:
    return DataLoader(tensors(rows), 16)


class Snapshot(pl.Callback):
    """Keeps the members as they are before training."""

    def __init__(self, ensemble: bpf.DeepEnsemble) -> None:
        self.ensemble = ensemble
        self.states: list[State] = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.states = self.ensemble.member_states()


class Seeded(pl.Callback):
    """Puts the global stream where a member's starts, and scales the learning rate."""

    def __init__(self, seed: int, lr_factor: float = 1.0) -> None:
        self.seed, self.lr_factor = seed, lr_factor

    def on_fit_start(self, trainer, pl_module) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] *= self.lr_factor
            group["initial_lr"] *= self.lr_factor
        for config in trainer.lr_scheduler_configs:
            config.scheduler.base_lrs = [lr * self.lr_factor for lr in config.scheduler.base_lrs]

    def on_train_start(self, trainer, pl_module) -> None:
        pl.seed_everything(self.seed, verbose=False)


def train(make: Callable[[], pl.LightningModule], ensemble: bpf.DeepEnsemble, data=None, *more, **settings: Any):
    """Train an ensemble; returns the Trainer, the module and the members before and after."""
    torch.manual_seed(7)
    module, before = make(), Snapshot(ensemble)
    trainer = fitted(module, data or shuffled(), ensemble, before, *more, **settings)
    return trainer, module, before.states, ensemble.member_states()


def alone(
    make: Callable[[], pl.LightningModule], state: State, seed: int, data=None, *, lr_factor: float = 1.0, **settings
) -> State:
    """Return the state of one member after training by plain Lightning."""
    module = make().to(next(iter(state.values())).dtype)
    module.load_state_dict({**module.state_dict(), **state})
    fitted(module, data or shuffled(), Seeded(seed, lr_factor), **settings)
    return {name: tensor for name, tensor in module.state_dict().items() if name in state}


def largest_difference(a: State, b: State) -> float:
    """Return the largest difference of two states, relative to each tensor's largest entry."""
    gaps = [(a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-6) for n in b if b[n].is_floating_point()]
    return float(max(gaps))
