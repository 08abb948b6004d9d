"""Searches whose answer is known: how far back a kernel has to reach, and how many units a map of some rank takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from searched_networks import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_bpfree as bpf

LENGTH, TAPS, UNITS, SIDES = 32, 31, 16, 12


class PlantedLag:
    """Noise whose label is the sign of the sample so many steps back: ``lag + 1`` taps of a causal kernel suffice."""

    dimension, smallest = "kernel", LENGTH * 4 * (1 + 2) + 4 * 2  # multiply-accumulates with two taps

    def __init__(self, lag: int) -> None:
        self.lag = lag

    @property
    def suffices(self) -> int:
        return self.lag + 1

    def network(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(1, 4, 1),
            bpf.ContinuousConv(4, TAPS, 1, 16, spread=1.0, omega=3.0, causal=True),  # all taps at the start
            Last(),
            nn.Linear(4, 2),
        )

    def batch(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 1, LENGTH)
        return x, (x[:, 0, LENGTH - 1 - self.lag] > 0).long()

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y)

    def right(self, out: Tensor, y: Tensor) -> float:
        return float((out.argmax(1) == y).float().mean())


class Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., -1]


class PlantedRank:
    """A linear map of some rank, with equal singular values: two layers take so many units between them."""

    dimension, smallest = "width", 2 * SIDES  # multiply-accumulates with one unit

    def __init__(self, rank: int) -> None:
        self.rank = rank
        bases = [torch.linalg.qr(torch.randn(SIDES, SIDES))[0] for _ in range(2)]
        self.map = bases[0][:, :rank] @ bases[1][:rank]

    @property
    def suffices(self) -> int:
        return self.rank

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(SIDES, UNITS), nn.Linear(UNITS, SIDES))

    def batch(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, SIDES)
        return x, x @ self.map

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out, y)

    def right(self, out: Tensor, y: Tensor) -> float:
        """The explained share of the variance."""
        return 1 - float((out - y).square().sum() / y.square().sum())


class Fresh(IterableDataset):
    """New batches without end."""

    def __init__(self, task: Any) -> None:
        self.task = task

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.task.batch()


class Toy(pl.LightningModule):
    """Learns a task; sizes are no part of its optimizer."""

    def __init__(self, task: Any) -> None:
        super().__init__()
        self.net, self.task, self.rate = task.network(), task, 0.01

    def training_step(self, batch, index):
        return self.task.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam([p for name, p in self.named_parameters() if not name.endswith(".size")], self.rate)


def found(
    task: Any, *, weight: float, lr: float, share: float, steps: tuple[int, int] = (150, 400)
) -> tuple[int, float]:
    """Train a network at full size, then let the budget pull it toward the smallest one; returns its size and score.

    Args:
        task: planted lag or rank.
        weight: of the budget beside the loss.
        lr: of the sizes.
        share: of the weights' learning rate that is left while sizes move.
        steps: of training, and of the search.
    """
    module, data = Toy(task), DataLoader(Fresh(task), batch_size=None)
    trainer(max_epochs=1, limit_train_batches=steps[0]).fit(module, data)
    module.rate *= share
    callback = bpf.LearnableArchitecture(
        task.smallest, (task.dimension,), relative=False, network="net", example_inputs=task.batch()[0][:1],
        weight=weight, lr=lr, fix_at=1.0, tolerance=1e3, pictures=False,
    )  # fmt: skip
    trainer(callback, max_epochs=1, limit_train_batches=steps[1]).fit(module, data)
    x, y = (torch.cat(parts) for parts in zip(*(task.batch() for _ in range(8)), strict=True))
    with torch.no_grad():
        (size,) = callback.sizes.values()
        return size, task.right(callback.export().network(x), y)
