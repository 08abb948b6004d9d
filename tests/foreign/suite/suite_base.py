"""What the modules of the suite share: their base, and their data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES, ROWS, BATCHES = 6, 3, 4, 3

CASES: dict[str, type[pl.LightningModule]] = {}


def case(kind: type[pl.LightningModule]) -> type[pl.LightningModule]:
    """Add a module to the suite."""
    before = CASES.setdefault(kind.__name__, kind)
    # A file that is looked through for doctests is imported once more, under a longer name.
    assert before.__module__.rpartition(".")[2] == kind.__module__.rpartition(".")[2], kind.__name__
    return kind


def table(rows: int = ROWS * BATCHES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, FEATURES, generator=generator)
    return x, (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)


def words(length: int = 5, vocabulary: int = 20, rows: int = ROWS * BATCHES) -> Tensor:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def pictures(size: int = 8, channels: int = 1, rows: int = ROWS * BATCHES) -> Tensor:
    return torch.randn(rows, channels, size, size, generator=torch.Generator().manual_seed(2))


def loader(*tensors: Tensor, **settings: Any) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), batch_size=ROWS, **settings)


def of_items(make: Callable[[Tensor, Tensor], Any]) -> DataLoader:
    """Return a loader that hands out what ``make`` does of the rows of a batch."""
    x, y = table()
    rows = zip(x.split(ROWS), y.split(ROWS), strict=True)
    return DataLoader([make(*pair) for pair in rows], batch_size=None, collate_fn=lambda item: item)  # type: ignore[arg-type]


def mlp(hidden: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))


class Foreign(pl.LightningModule):
    """A classifier of two layers; what a module of the suite does otherwise is in its own lines."""

    settings: dict[str, Any] = {}  # noqa: RUF012  # of the Trainer
    digits = 1e-10  # relative, to which results in float64 agree: larger where the module itself computes in float32

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.prepare()

    def prepare(self) -> None:
        """Make what the module has beside."""

    def train_dataloader(self) -> Any:
        return loader(*table())

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(*batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
