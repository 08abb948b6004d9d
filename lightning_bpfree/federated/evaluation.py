"""Evaluation of a server's weights by the module's own validation and test steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.training.quiet_lightning import quiet_lightning

# Of devices and workers, in every round.
_ANNOUNCED = (".*does not have many workers.*", "GPU available but not used.*")


class Evaluation:
    """Runs the module's validation or test step with given weights.

    Args:
        module: the module.
        datamodule: provides the samples.
    """

    def __init__(self, module: pl.LightningModule, datamodule: pl.LightningDataModule) -> None:
        self.module, self.datamodule = module, datamodule
        with quiet_lightning(*_ANNOUNCED):
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
        with quiet_lightning(*_ANNOUNCED), _holding(self.module, params):
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
