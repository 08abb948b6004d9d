"""A module with a search, and its batches, for the tests of EvolutionStrategy."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn


class Net(pl.LightningModule):
    """Cross-entropy through any network; notes the gradients that reach the optimizer."""

    def __init__(self, net: nn.Module, lr: float = 0.0, **batch_kinds) -> None:
        super().__init__()
        self.net, self.lr = net, lr
        self.gradients: list[dict[str, torch.Tensor]] = []

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def on_before_optimizer_step(self, optimizer) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def batches(*shape: int, classes: int = 3, num: int = 1, integers: int | None = None):
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(num):
        if integers is None:
            x = torch.randn(8, *shape, generator=generator)
        else:
            x = torch.randint(0, integers, (8, *shape), generator=generator)
        made.append((x, torch.randint(0, classes, (8,), generator=generator)))
    return torch.utils.data.DataLoader(made, batch_size=None)
