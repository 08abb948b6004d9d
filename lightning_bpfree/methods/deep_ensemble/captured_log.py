"""Collection of members' logged values, so that Lightning logs their mean instead of M numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from torch import Tensor, nn


class CapturedLog:
    """Keeps the calls of ``self.log`` and ``self.log_dict`` of a module, and says them once, with the members' mean.

    Args:
        module: the module in training; LightningModules within it are heard too.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parts: list[Any] = [
            part for part in module.modules() if isinstance(part, pl.LightningModule) or part is module
        ]
        self._calls: dict[tuple[int, str], tuple[list[Any], dict[str, Any]]] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Collect logged values in this context."""
        saved = [
            {key: part.__dict__[key] for key in ("log", "log_dict") if key in part.__dict__} for part in self.parts
        ]
        for index, part in enumerate(self.parts):
            part.__dict__.update(log=_Log(self, index), log_dict=_LogDict(self, index))
        try:
            yield
        finally:
            for part, own in zip(self.parts, saved, strict=True):
                del part.__dict__["log"], part.__dict__["log_dict"]
                part.__dict__.update(own)

    def keep(self, part: int, name: str, value: Any, options: dict[str, Any]) -> None:
        """Keep one call."""
        values, kept = self._calls.setdefault((part, name), ([], options))
        kept.update(options)
        values.append(value)

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the values, in the order of their calls."""
        return [value for values, _ in self._calls.values() for value in values if isinstance(value, Tensor)]

    def replace(self, tensors: list[Tensor]) -> None:
        """Replace the tensors that :meth:`tensors` returned."""
        given = iter(tensors)
        for values, _ in self._calls.values():
            values[:] = [next(given) if isinstance(value, Tensor) else value for value in values]

    def say(self) -> None:
        """Log everything kept, as the module would have: metric objects once, of numbers the mean."""
        calls, self._calls = self._calls, {}
        for (part, name), (values, options) in calls.items():
            self.parts[part].log(name, _one(values), **options)

    def drop(self) -> None:
        """Forget everything kept."""
        self._calls = {}


class _Log:
    """Stands in for ``module.log``."""

    def __init__(self, kept: CapturedLog, part: int) -> None:
        self.kept, self.part = kept, part

    def __call__(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        if args:  # prog_bar and what follows may be given by position
            options |= dict(zip(("prog_bar", "logger", "on_step", "on_epoch", "reduce_fx"), args, strict=False))
        if isinstance(value, Mapping):
            raise ValueError(f"self.log({name!r}, ...) got a dict: use self.log_dict.")
        self.kept.keep(self.part, name, value.detach() if isinstance(value, Tensor) else value, options)


class _LogDict:
    """Stands in for ``module.log_dict``."""

    def __init__(self, kept: CapturedLog, part: int) -> None:
        self.log = _Log(kept, part)

    def __call__(self, dictionary: Mapping[str, Any], *args: Any, **options: Any) -> None:
        if isinstance(dictionary, torchmetrics.MetricCollection):
            # As Lightning does: names with prefixes, states untouched.
            dictionary = dict(dictionary.items(keep_base=False, copy_state=False))
        for name, value in dictionary.items():
            self.log(name, value, *args, **options)


def _one(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, torchmetrics.Metric):
        return first
    if len(values) == 1 and not isinstance(first, Tensor):
        return first
    flat = [torch.as_tensor(value).detach().float().flatten() for value in values]
    return torch.cat([part.to(flat[0].device) for part in flat]).mean()
