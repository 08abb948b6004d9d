"""The state of a module that every step of a rule needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torchmetrics
from torch import nn

from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.core.replay import Attributes, Buffers, RandomStreams

_LOUD: tuple[str, ...] = ("log", "log_dict")


def _say_nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


class SilencedLogging:
    """Makes ``self.log`` and ``self.log_dict`` of a module, and of LightningModules within it, say nothing.

    Examples:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> module = BoringModel()
        >>> with SilencedLogging(module)():
        ...     module.log("loss", 0.0)
    """

    def __init__(self, module: nn.Module) -> None:
        self.loud = [part for part in module.modules() if isinstance(part, pl.LightningModule) or part is module]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Return the context in which nothing is logged."""
        saved = [{key: part.__dict__[key] for key in _LOUD if key in part.__dict__} for part in self.loud]
        for part in self.loud:
            part.__dict__.update(log=_say_nothing, log_dict=_say_nothing)
        try:
            yield
        finally:
            for part, own in zip(self.loud, saved, strict=True):
                for key in _LOUD:
                    del part.__dict__[key]
                part.__dict__.update(own)


class Metrics:
    """The states of the torchmetrics objects in a module, which an extra evaluation must not count."""

    def __init__(self, module: nn.Module) -> None:
        self.metrics = [part for part in module.modules() if isinstance(part, torchmetrics.Metric)]

    def save(self) -> list[tuple[dict[str, Any], int, Any]]:
        """Return every metric's state."""
        return [(metric._copy_state_dict(), metric._update_count, metric._computed) for metric in self.metrics]

    def load(self, state: list[tuple[dict[str, Any], int, Any]]) -> None:
        """Put every metric's state back."""
        for metric, (values, update_count, computed) in zip(self.metrics, state, strict=True):
            for name, value in values.items():
                # Copies, since updates add to tensors in place and append to lists.
                setattr(metric, name, list(value) if isinstance(value, list) else value.clone())
            metric._update_count, metric._computed = update_count, computed


class ModuleState:
    """The parts of a module that every step needs; collected once an epoch, for walking a large module takes time."""

    def __init__(self, module: pl.LightningModule, params: str | Sequence[str] | None) -> None:
        self.slots = ParameterSlots(module, params)
        self.buffers, self.metrics, self.quiet = Buffers(module), Metrics(module), SilencedLogging(module)
        self.streams = RandomStreams([module.device])
        self.attributes = Attributes(part for part in module.modules() if not isinstance(part, torchmetrics.Metric))
