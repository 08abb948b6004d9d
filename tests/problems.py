"""Small modules with everything that makes re-evaluation hard: dropout, BatchNorm, metrics, tied and frozen weights."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class Tied(nn.Module):
    """Encoder and decoder share one matrix; a third, frozen layer stands beside them."""

    def __init__(self, dropout: float = 0.0, batch_norm: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.inner.weight
        self.norm = nn.BatchNorm1d(6) if batch_norm else nn.LayerNorm(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.act = nn.Tanh()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.act(self.again(self.norm(self.frozen(self.inner(x)))))))


class Shared(nn.Module):
    """One layer for those who cut a network: two tied matrices with a frozen one between them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.again = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again.weight = self.inner.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.frozen(self.inner(x)))


class Chain(nn.Sequential):
    """The same difficulties as in `Tied`, in a network that can be cut into blocks by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.act, self.drop = Shared(), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3)
        self.second, self.again, self.head = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)


# Of every `Problem`, by its id: what a module holds itself is put back after extra evaluations.
CALLS: dict[int, list[int]] = {}


class Problem(pl.LightningModule):
    """A classifier that logs its loss, counts a metric, and can return its loss in several shapes."""

    def __init__(
        self, net: nn.Module | None = None, lr: float = 0.1, optimizer: str = "sgd", returns: str = "tensor"
    ) -> None:
        super().__init__()
        self.net = self.make_net() if net is None else net
        self.lr, self.optimizer, self.returns = lr, optimizer, returns
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.gradients: list[dict[str, torch.Tensor]] = []  # as the optimizer gets them, before clipping
        CALLS[id(self)] = []

    def make_net(self) -> nn.Module:
        return Tied(dropout=0.3)

    def training_step(self, batch: list[torch.Tensor], index: int):
        self.calls.append(index)
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("train_acc", self.accuracy, on_step=False, on_epoch=True)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.log("steps_logged", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        if self.returns == "none" and index % 2:
            return None
        return {"loss": loss, "logits": logits.detach()} if self.returns == "dict" else loss

    @property
    def calls(self) -> list[int]:
        """Batch indices of all evaluations of the step, those among them that leave no trace."""
        return CALLS.setdefault(id(self), [])  # a copy begins to count anew

    @property
    def evaluations(self) -> int:
        return len(self.calls)

    def on_before_optimizer_step(self, optimizer) -> None:
        grads = {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}
        self.gradients.append(grads)

    def configure_optimizers(self):
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class CallsTwice(Problem):
    """Calls its network twice in a step."""

    def training_step(self, batch: list[torch.Tensor], index: int):
        return self.net(batch[0]).sum() + self.net(batch[0]).sum()


class NeverCalls(Problem):
    """Goes past its network to the layers."""

    def training_step(self, batch: list[torch.Tensor], index: int):
        return self.net.layers(batch[0]).square().mean()


def loader(rows: int = 64, batch_size: int = 16, shuffle: bool = False, seed: int = 0) -> DataLoader:
    """A learnable problem: three classes by the largest of three random projections."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle)


def fitted(module: pl.LightningModule, data: DataLoader, *callbacks: pl.Callback, ckpt_path=None, **settings):
    """Fit on the CPU, silently; returns the Trainer."""
    options = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    trainer = pl.Trainer(callbacks=list(callbacks), **{**options, **settings})
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer
