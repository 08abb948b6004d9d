"""Settings of a callback among the hyperparameters that loggers show."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl


def log_settings(trainer: pl.Trainer, module: pl.LightningModule, entry: dict[str, Any]) -> None:
    """Log ``entry`` together with the hyperparameters of the user's own, which Lightning logs after ``on_fit_start``.

    TensorBoard shows one entry of a run: one of the callback's alone would hide the user's.

    Args:
        trainer: whose loggers are meant.
        module: the module in training.
        entry: plain values.
    """
    own: dict[str, Any] = {}
    for holder in (module, cast(Any, trainer).datamodule):
        if holder is not None and getattr(holder, "_log_hyperparams", False):
            own.update(holder.hparams_initial)
    own.pop("_class_path", None)  # LightningCLI's
    for logger in trainer.loggers:
        logger.log_hyperparams({**own, **entry})
