"""Logged settings and metrics of rules and companion callbacks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import lightning.pytorch as pl

from lightning_bpfree.training.trainer_attributes import log_every_n_steps

_NOTED: WeakKeyDictionary[pl.Trainer, dict[str, Any]] = WeakKeyDictionary()


def note_settings(trainer: pl.Trainer, entry: dict[str, Any]) -> None:
    """Keep ``entry`` for the next :func:`log_settings` of this Trainer.

    Args:
        trainer: the Trainer with the loggers.
        entry: plain values.
    """
    _NOTED.setdefault(trainer, {}).update(entry)


def log_settings(trainer: pl.Trainer, module: pl.LightningModule, entry: dict[str, Any]) -> None:
    """Log ``entry`` together with all earlier entries and the user's own hyperparameters.

    TensorBoard shows one entry per run. A separate entry of the callback would hide the user's, which Lightning logs
    after ``on_fit_start``.

    Args:
        trainer: the Trainer with the loggers.
        module: the module in training.
        entry: plain values.
    """
    own: dict[str, Any] = {}
    for holder in (module, cast(Any, trainer).datamodule):
        if holder is not None and getattr(holder, "_log_hyperparams", False):
            own.update(holder.hparams_initial)
    own.pop("_class_path", None)  # LightningCLI's
    note_settings(trainer, entry)
    for logger in trainer.loggers:
        logger.log_hyperparams({**own, **_NOTED[trainer]})


def settings_of(owner: object, base: type) -> dict[str, Any]:
    """Return the constructor arguments of an object, by name, as plain values for loggers and checkpoints.

    Args:
        owner: the object; it stores its arguments in attributes of the same names.
        base: the base class; arguments of its constructor and of its subclasses' constructors are included.
    """
    kinds = [kind for kind in type(owner).__mro__ if issubclass(kind, base)]
    arguments = [p for kind in kinds for p in inspect.signature(cast(Any, kind).__init__).parameters.values()]
    names = {p.name for p in arguments if p.kind is not p.VAR_KEYWORD and hasattr(owner, p.name)}
    values = {name: getattr(owner, name) for name in sorted(names)}
    return {name: v if isinstance(v, int | float | str | None) else str(v) for name, v in values.items()}


def named_after(rule: type, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics under ``bpfree/<class in snake case>/<name>``.

    Examples:
        >>> class SignRule: ...
        >>> named_after(SignRule, {"ties": 2})
        {'bpfree/sign_rule/ties': 2}
    """
    snake = re.sub(r"(?<!^)(?=[A-Z])", "_", rule.__name__).lower()
    return {f"bpfree/{snake}/{name}": value for name, value in metrics.items()}


def is_log_due(trainer: pl.Trainer) -> bool:
    """Return whether the next optimizer step is logged."""
    every = log_every_n_steps(trainer)
    return bool(every) and (trainer.global_step + 1) % every == 0 and not trainer.barebones
