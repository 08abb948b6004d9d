"""Trains reversible stacks on two ranks; `test_reversible_on_two_ranks.py` runs this file.

    python reversible_worker.py ranks OUT_DIR

Lightning starts rank 1 by running the file again.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_bpfree import FunctionChangedWarning, ReversibleRecompute

WIDTH, SAMPLES, BATCH = 8, 32, 8  # samples of a batch over both ranks
MODES = {
    "default": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
}
SCHEDULES = ("sequential", "parallel")


class Encoder(pl.LightningModule):
    """A pre-norm encoder without dropout; one weight is used by no branch, which DDP must be told of."""

    def __init__(self, unused: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        for i, parameter in enumerate(self.encoder.parameters()):
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
        if unused:
            self.encoder.layers[1].forgotten = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(WIDTH, 1)
        nn.init.ones_(self.head.weight)
        self.fired: list[str] = []
        for name, parameter in self.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self.fired.append(name))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return (self.head(self.encoder(batch[0]).mean(1)) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def data() -> TensorDataset:
    x = torch.randn(SAMPLES, 4, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    return TensorDataset(x, x.mean((1, 2), keepdim=True)[:, 0])


def train(mode: str | None, schedule: str, accumulate: int = 2) -> Encoder:
    torch.manual_seed(0)
    module = Encoder(unused=mode == "find_unused")
    ranks = 1 if mode is None else 2
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="auto" if mode is None else DDPStrategy(**MODES[mode]),
        precision="64-true",
        max_epochs=2,
        # torch refuses to skip a reduction of a static graph, whatever the model.
        accumulate_grad_batches=1 if mode == "static_graph" else accumulate,
        logger=False,
        use_distributed_sampler=False,  # Lightning's own one shuffles
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ReversibleRecompute("all", schedule)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FunctionChangedWarning)
        own = DistributedSampler(data(), ranks, int(os.environ.get("LOCAL_RANK", "0")), shuffle=False)
        trainer.fit(module, DataLoader(data(), batch_size=BATCH // ranks, sampler=own))
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    for each in MODES:
        for how in SCHEDULES:
            left = train(each, how)
            count = sum(p.requires_grad for p in left.parameters())
            torch.save(
                {"weights": left.state_dict(), "first step": left.fired[:count]},
                Path(sys.argv[2]) / f"{each}.{how}.rank{rank}.pt",
            )
