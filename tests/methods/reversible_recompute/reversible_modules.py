"""A module with transformer layers, one with a reversible stack, and a short training of either."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bpfree import FunctionChangedWarning, ReversibleBlock, ReversibleSequential

SCHEDULES = ("autograd", "checkpoint", "sequential", "parallel")
WIDTH = 8


class Encoder(pl.LightningModule):
    """Regression of a sum by a pre-norm transformer with dropout."""

    def __init__(self, depth: int = 3, norm_first: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        for parameter in self.encoder.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.head = nn.Linear(WIDTH, 1)
        self.losses: list[float] = []

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))

    def training_step(self, batch, batch_idx):
        loss = (self(batch[0]) - batch[1]).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Stacked(Encoder):
    """The same task, by a stack that is reversible from the start."""

    def __init__(self) -> None:
        super().__init__(depth=1)

        def branch() -> nn.Module:
            return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1))

        self.encoder = ReversibleSequential([ReversibleBlock(branch(), branch()) for _ in range(3)], "autograd")


def loader() -> DataLoader:
    x = torch.randn(32, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum((1, 2), keepdim=True)[:, 0]), batch_size=4)


def fit(module, callbacks, tmp_path, resume=None, **settings):
    """Train one epoch of eight batches, or as `settings` say."""
    trainer = pl.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=callbacks,
        **{
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "log_every_n_steps": 4,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            **settings,
        },
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FunctionChangedWarning)
        trainer.fit(module, loader(), loader(), ckpt_path=resume)
    return trainer
