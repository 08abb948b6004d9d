"""Attributes of a Trainer that its class does not declare, so type checkers do not know them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import lightning.pytorch as pl

C = TypeVar("C")


def callbacks_of(trainer: pl.Trainer, kind: Callable[..., C]) -> list[C]:
    """Return the Trainer's callbacks of a class, in their order.

    Args:
        trainer: the Trainer.
        kind: the class; typed as a callable, since type checkers accept no abstract class as a type.

    Examples:
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> trainer = pl.Trainer(barebones=True)
        >>> callbacks_of(trainer, EarlyStopping)
        []
    """
    untyped, cls = cast(Any, trainer), cast(Any, kind)
    return [callback for callback in untyped.callbacks if isinstance(callback, cls)]


def without_module(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a callback's attributes except ``log`` and ``log_dict``, which Lightning binds to a module."""
    return {name: value for name, value in attributes.items() if name not in ("log", "log_dict")}


def log_every_n_steps(trainer: pl.Trainer) -> int:
    """Return the number of optimizer steps between logs; 0 for never."""
    return int(cast(Any, trainer).log_every_n_steps or 0)


def is_dry_run(trainer: pl.Trainer) -> bool:
    """Return whether the Trainer runs only a few batches, with ``fast_dev_run``."""
    return bool(cast(Any, trainer).fast_dev_run)
