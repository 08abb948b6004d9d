"""A trained module's metrics."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_bpfree.training.gradient_alignment import GradientAlignment
from lightning_bpfree.training.trainer_attributes import callbacks_of

STAGES = {"validate": ("val_dataloader", "validation_step"), "test": ("test_dataloader", "test_step")}


def evaluated(
    stage: Literal["validate", "test"],
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: pl.LightningDataModule | None,
) -> dict[str, float]:
    """Return the metrics of the validation or test set with the current weights; empty if there is no such set."""
    loader, step = STAGES[stage]
    if not is_overridden(step, module):
        return {}
    if not any(is_overridden(loader, part) for part in (module, data) if part is not None):
        return {}
    run = trainer.validate if stage == "validate" else trainer.test
    results = run(module, datamodule=data, verbose=False)
    return {name: float(value) for result in results for name, value in result.items()}


def mean_cosine(trainer: pl.Trainer) -> float | None:
    """Return GradientAlignment's mean cosine of the fit; None without this callback, or if it measured nothing."""
    for alignment in callbacks_of(trainer, GradientAlignment):
        if alignment.measured:
            return alignment.mean_cosine
    return None


def larger_is_better(metric: str) -> bool:
    """Whether larger values of a metric of this name are better.

    Examples:
        >>> larger_is_better("test_acc"), larger_is_better("val_loss"), larger_is_better("test_mse")
        (True, False, False)
    """
    return not any(mark in metric.lower() for mark in ("loss", "err", "mse", "mae", "perplexity", "nll"))
