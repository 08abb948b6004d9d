"""A training that is killed; `test_kill_and_resume.py` runs this file, and resumes from what is left.

    python resume_worker.py DIR

Every case trains in a process of its own, forked after the slow imports, which ends itself by SIGKILL: no `finally`, no
teardown hook and no flushing of files takes place.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from shipped import cases
from torch import nn

import lightning_bpfree as bpf

BATCHES, EPOCHS, EVERY = 7, 3, 3  # batches of an epoch, epochs, optimizer steps between checkpoints
KILLED_AT = (1, 5)  # epoch, batch; the last checkpoint before it lies in the same epoch

CASES: dict[str, tuple[Callable[[], bpf.TrainingRule], dict[str, Any]]] = cases("KILLED")


class Batches:
    """An ordered loader that can say, and be told, where it is; Lightning saves that in its checkpoints."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(BATCHES, 16, 6, generator=generator)
        self.y = (self.x @ torch.randn(6, 3, generator=generator)).argmax(-1)
        self.position = self.start = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        start, self.start = self.start, 0
        for self.position in range(start + 1, BATCHES + 1):
            yield [self.x[self.position - 1], self.y[self.position - 1]]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"] % BATCHES


class Net(pl.LightningModule):
    """BatchNorm, noise of three kinds, momentum, a schedule by steps: all that a resume may forget."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        x = x + 0.1 * (random.random() + np.random.random())  # augmentation, as many do it
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Kill(pl.Callback):
    """Ends this process at a given batch, between its backward pass and its optimizer step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.current_epoch == KILLED_AT[0] and trainer.fit_loop.batch_idx >= KILLED_AT[1]:
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    case: str, folder: Path, *callbacks: pl.Callback, resume_from: Path | None = None
) -> tuple[pl.Trainer, bpf.TrainingRule]:
    """Train one case to its end, or to its kill, with checkpoints in `folder`."""
    make_rule, settings = CASES[case]
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(5)
    rule = make_rule()
    checkpoints = ModelCheckpoint(folder, "{step}", every_n_train_steps=EVERY, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[rule, checkpoints, *callbacks],
        **settings,
    )
    trainer.fit(Net(), Batches(), ckpt_path=resume_from)
    return trainer, rule


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for case in CASES:
        child = os.fork()
        if child == 0:
            train(case, folder / case, Kill())
            os._exit(0)  # it outlived its kill, and the parent will see that
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{case} was not killed"
        assert os.WTERMSIG(status) == signal.SIGKILL


if __name__ == "__main__":
    main(Path(sys.argv[1]))
