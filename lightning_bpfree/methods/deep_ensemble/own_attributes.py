"""Attributes that a training step assigns to the module, kept separately per member: hidden states, counters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torchmetrics
from torch import nn

_MISSING = object()
_SHARED = {"_parameters", "_buffers", "_modules", "training", "log", "log_dict"}


class OwnAttributes:
    """Attributes that differ between members because their steps have assigned them.

    Between the steps the module has the first member's. An attribute that someone else assigns then, such as a hook
    that resets a hidden state, is the same for all members.

    Args:
        module: the module.
        members: how many there are.
    """

    def __init__(self, module: nn.Module, members: int) -> None:
        self.modules = parts_beside_metrics(module)
        self._own: list[dict[tuple[int, str], Any]] = [{} for _ in range(members)]
        self._left: dict[tuple[int, str], Any] = {}

    @contextlib.contextmanager
    def at_work(self, member: int) -> Iterator[None]:
        """Let the module have one member's attributes, and keep what it assigns."""
        if member == 0:
            self._forget_changed()
        before = self._now()
        for (index, key), value in self._own[member].items() if member else ():
            self._set(index, key, value)
        started = self._now() if member and self._own[member] else before
        try:
            yield
        finally:
            self._keep(member, started)
            if member == 0:
                self._left = dict(self._own[0])
                for index, key in self._own[0]:  # the others begin with what the first one began with
                    for own in self._own[1:]:
                        own.setdefault((index, key), before[index].get(key, _MISSING))
            else:
                self._restore(before)

    def _now(self) -> list[dict[str, Any]]:
        return [part.__dict__.copy() for part in self.modules]

    def _keep(self, member: int, started: list[dict[str, Any]]) -> None:
        for index, (part, saved) in enumerate(zip(self.modules, started, strict=True)):
            for key in (part.__dict__.keys() | saved.keys()) - _SHARED:
                now = part.__dict__.get(key, _MISSING)
                if now is not saved.get(key, _MISSING):
                    self._own[member][index, key] = now

    def _restore(self, before: list[dict[str, Any]]) -> None:
        for index, (part, saved) in enumerate(zip(self.modules, before, strict=True)):
            for key in (part.__dict__.keys() | saved.keys()) - _SHARED:
                self._set(index, key, saved.get(key, _MISSING))

    def _forget_changed(self) -> None:
        for (index, key), value in self._left.items():
            if self.modules[index].__dict__.get(key, _MISSING) is not value:
                for own in self._own:
                    own.pop((index, key), None)
        self._left = {}

    def _set(self, index: int, key: str, value: Any) -> None:
        own = self.modules[index].__dict__
        if value is _MISSING:
            own.pop(key, None)
        elif own.get(key, _MISSING) is not value:
            own[key] = value


def parts_beside_metrics(module: nn.Module) -> list[nn.Module]:
    """Return the module and all within it but torchmetrics objects, which all members share, and their parts."""
    metrics = [part for part in module.modules() if isinstance(part, torchmetrics.Metric)]
    inside = {id(inner) for metric in metrics for inner in metric.modules()}
    return [part for part in module.modules() if id(part) not in inside]
