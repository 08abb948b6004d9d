"""Means over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import lightning.pytorch as pl
from torch import Tensor


def mean_over_ranks(trainer: pl.Trainer) -> Callable[[Tensor], Tensor] | None:
    """Return a function that averages a tensor over ranks, on its device; None on one rank.

    All ranks must call it, in the same order.

    Examples:
        >>> mean_over_ranks(pl.Trainer(barebones=True, accelerator="cpu", devices=1)) is None
        True
    """
    if trainer.world_size == 1:
        return None

    def mean(tensor: Tensor) -> Tensor:
        there = tensor.to(trainer.strategy.root_device)
        return cast("Tensor", trainer.strategy.reduce(there, reduce_op="mean")).to(tensor.device)

    return mean
