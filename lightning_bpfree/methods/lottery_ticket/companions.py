"""Callbacks in combination with ``LotteryTicket``: those that it refuses, and those that restart at every level."""

from __future__ import annotations

import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging

from lightning_bpfree.training.trainer_attributes import callbacks_of

# By name, for a Trainer from `pytorch_lightning` brings its own classes of the same names.
_REFUSED = {
    "StochasticWeightAveraging": "averages weights over levels, and restores pruned weights at the end",
    "BaseFinetuning": "unfreezes layers in the first level, and never freezes them again for the others",
}


def check_companions(trainer: pl.Trainer) -> None:
    """Raise MisconfigurationException for callbacks that would make levels unequal or pruned weights nonzero."""
    for callback in callbacks_of(trainer, Callback):
        for kind in type(callback).__mro__:
            if kind.__name__ in _REFUSED:
                raise MisconfigurationException(
                    f"LotteryTicket with {type(callback).__name__}, which {_REFUSED[kind.__name__]}: remove it "
                    "here. Train a finished ticket with it in a separate fit, after "
                    "Ticket.load(path).apply_to(module)."
                )


def check_launcher(trainer: pl.Trainer) -> None:
    """Raise MisconfigurationException if results of a run would be lost in processes that end with it."""
    launcher = type(trainer.strategy.launcher).__name__
    if launcher == "_MultiProcessingLauncher":
        raise MisconfigurationException(
            "LotteryTicket: strategy='ddp_spawn' and similar ones (ddp_fork, ddp_notebook) train in processes whose "
            "callbacks are lost, so that results would be empty: use strategy='ddp'."
        )


def check_writable(folder: Path) -> None:
    """Raise MisconfigurationException if no file can be written into ``folder``, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MisconfigurationException(
            f"LotteryTicket cannot write tickets into {folder} ({error}): pass another dirpath."
        ) from error


def restart_averages(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let Lightning's WeightAveraging begin with the weights of now: an average over levels has no zeros."""
    for callback in callbacks_of(trainer, WeightAveraging):
        averaged = callback._average_model
        if averaged is None:
            continue
        averaged.module.load_state_dict(module.state_dict())
        averaged.n_averaged.zero_()


def begin_level(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let callbacks that watch a metric or average weights start again: a denser level is another model."""
    restart_averages(trainer, module)
    for stopping in callbacks_of(trainer, EarlyStopping):
        stopping.wait_count = stopping.stopped_epoch = 0
        worst = float("inf") if stopping.mode == "min" else -float("inf")
        stopping.best_score = torch.tensor(worst)
    for keeping in callbacks_of(trainer, ModelCheckpoint):
        if keeping.monitor is None:
            continue
        keeping.best_k_models, keeping.kth_best_model_path, keeping.best_model_path = {}, "", ""
        keeping.best_model_score = keeping.current_score = None
        keeping.kth_value = torch.tensor(float("inf") if keeping.mode == "min" else -float("inf"))
