"""Lightning's own demonstrations."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel, ManualOptimBoringModel
from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from suite_base import BATCHES, ROWS, case, loader, words
from torch import Tensor


class Boring:
    settings: dict[str, Any] = {}  # noqa: RUF012
    digits = 1e-10

    def train_dataloader(self) -> Any:
        return loader(torch.randn(ROWS * BATCHES, 32, generator=torch.Generator().manual_seed(3)))

    def val_dataloader(self) -> Any:
        return []


@case
class OfLightning(Boring, BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0], batch_idx)


@case
class DemoOfLightning(Boring, DemoModel):
    def training_step(self, batch: Any, batch_nb: int) -> Any:
        return {"loss": self(batch[0]).square().mean()}


@case
class ManualOfLightning(Boring, ManualOptimBoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[0], batch_idx)


class Language:
    settings: dict[str, Any] = {}  # noqa: RUF012
    digits = 1e-10

    def prepare_data(self) -> None:
        """Download nothing."""

    def train_dataloader(self) -> Any:
        ids = words(6)
        return loader(ids[:, :-1], ids[:, 1:])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@case
class TransformerOfLightning(Language, LightningTransformer):
    def __init__(self) -> None:
        super().__init__(vocab_size=20)
        self.model = Transformer(vocab_size=20, ninp=4, nhid=4, nlayers=1)


@case
class LstmOfLightning(Language, LightningLSTM):
    def __init__(self) -> None:
        super().__init__(vocab_size=20)
        self.model = SimpleLSTM(vocab_size=20, ninp=4, nhid=4, nlayers=1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)
