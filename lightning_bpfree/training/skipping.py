"""Batches with non-finite numbers, for which all ranks raise or skip together; and parameters that DDP waits for."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_bpfree.core.exchange import ScalarExchange
from lightning_bpfree.core.step import NonFiniteLossError, Step
from lightning_bpfree.training.record import Record


def gradients_cross_ranks(trainer: pl.Trainer) -> bool:
    """Return whether gradients of several ranks are averaged, as DDP does."""
    return trainer.world_size > 1 and not isinstance(trainer.strategy, ScalarExchange)


def waited_for(trainer: pl.Trainer, step: Step) -> list[Tensor]:
    """Return parameters for which DDP's reducer waits although the rule does not train them."""
    if not gradients_cross_ranks(trainer):
        return []
    trained = {slot.name for slot in step.trained}
    others = [*step.slots.rest, *(slot for slot in step.slots if slot.name not in trained)]
    return [slot.parameter for slot in others if slot.parameter.requires_grad]


def is_skipped(trainer: pl.Trainer, record: Record, failure: NonFiniteLossError | None, on_nonfinite: str) -> bool:
    """Return whether all ranks skip the batch because one of them has a non-finite number.

    Args:
        trainer: the Trainer.
        record: the rule's record, which counts skipped batches.
        failure: the failure of this rank, or None.
        on_nonfinite: ``"raise"`` or ``"skip"``.

    Raises:
        RuntimeError: for a failure with ``on_nonfinite="raise"``.
    """
    batch = record.batches - 1
    if on_nonfinite == "raise":
        if failure is None:
            return False
        raise RuntimeError(
            f"{record.rule}: {failure} in batch {batch}. No parameter has changed. Lower the learning rate or sigma, "
            "or skip such batches with on_nonfinite='skip'."
        ) from failure
    failed = failure is not None
    if gradients_cross_ranks(trainer):
        # Ranks must skip together, or the others wait in DDP's reducer forever.
        flag = torch.tensor(float(failed), device=trainer.strategy.root_device)
        failed = bool(trainer.strategy.reduce(flag, reduce_op="sum"))
    if failed:
        record.skipped += 1
        rank_zero_warn(f"{record.rule}: {failure or 'another rank failed'}; batch {batch} is skipped.")
    return failed
