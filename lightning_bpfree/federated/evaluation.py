"""Evaluation of a server's weights by the module's own validation and test steps."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_bpfree.core.params import ParameterSlots


class Evaluation:
    """Runs the module's validation or test step at any weights.

    Args:
        module: the module.
        datamodule: of the samples.
    """

    def __init__(self, module: pl.LightningModule, datamodule: pl.LightningDataModule) -> None:
        self.module, self.datamodule = module, datamodule
        with _quiet():
            self.trainer = pl.Trainer(
                accelerator="gpu" if module.device.type == "cuda" else "cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )

    def __call__(self, stage: Literal["validate", "test"], params: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the metrics that the step logs.

        Args:
            stage: which step.
            params: the trained parameters to evaluate; the module has its own again afterwards.
        """
        was_training = self.module.training
        with _quiet(), _holding(self.module, params):
            run: Any = self.trainer.validate if stage == "validate" else self.trainer.test
            found = run(self.module, datamodule=self.datamodule, verbose=False)
        self.module.train(was_training)
        return {name: float(value) for part in found for name, value in part.items()}


@contextlib.contextmanager
def _holding(module: pl.LightningModule, params: Mapping[str, Tensor]) -> Iterator[None]:
    slots = {slot.name: slot.parameter for slot in ParameterSlots(module).trainable()}
    before = {name: slots[name].detach().clone() for name in params}
    with torch.no_grad():
        for name, value in params.items():
            slots[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                slots[name].copy_(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning from announcing devices and workers in every round."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message="GPU available but not used.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
