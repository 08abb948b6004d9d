"""The network in a user's evaluation step: detection by its call, and replacement of its output by the ensemble's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_bpfree.core.forward_override import ForwardOverride
from lightning_bpfree.methods.deep_ensemble.own_attributes import parts_beside_metrics


class _Answering(ForwardOverride):
    """Stands in for the forward pass of a module: asks the ensemble where the user's step calls it."""

    rule = "DeepEnsemble"

    def __init__(self, module: nn.Module, name: str, network: EnsembleNetwork) -> None:
        super().__init__(module)
        self.name, self.network = name, network

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the ensemble's output; within a member's computation, the member's."""
        if self.network.inside:
            return self.original(*args, **kwargs)
        return self.network.asked(self, args, kwargs)


class EnsembleNetwork:
    """Answers for the network that the user's evaluation steps call: ``self(x)``, or one part such as ``self.net(x)``.

    Args:
        module: the LightningModule.
        answer: called with the forward pass of one member, its arguments, and the part's name; returns the output.
        name: name of the part that is the network; None finds it: the outermost module that a step calls.

    Raises:
        MisconfigurationException: if the module has no part of that name.
    """

    def __init__(self, module: pl.LightningModule, answer: Callable[..., Any], name: str | None = None) -> None:
        self.module, self.answer, self.name = module, answer, name
        self.inside = False
        self.found: str | None = name
        self.calls = 0
        self._entered: set[str] = set()
        parts = dict(module.named_modules())
        if name is not None and name not in parts:
            near = ", ".join(list(dict(module.named_children()))) or "none"
            raise MisconfigurationException(
                f"network={name!r}: {type(module).__name__} has no such part. Its outermost parts are: {near}; '' is "
                "the module itself."
            )
        self._overrides = [_Answering(part, path, self) for path, part in self._candidates(parts)]

    def _candidates(self, parts: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
        if self.name is not None:
            return [(self.name, parts[self.name])]
        wanted = {id(part) for part in parts_beside_metrics(self.module) if next(part.parameters(), None) is not None}
        return [(path, part) for path, part in parts.items() if id(part) in wanted]

    def install(self) -> None:
        """Begin to answer."""
        for override in self._overrides:
            override.install()

    def remove(self) -> None:
        """Let every part be itself again."""
        for override in reversed(self._overrides):
            override.remove()

    def begin(self) -> None:
        """Begin another step."""
        self.calls = 0
        self._entered = set()

    def asked(self, part: _Answering, args: Any, kwargs: Any) -> Any:
        """Return the ensemble's output for one call of a part.

        Raises:
            MisconfigurationException: if the step has called another part before.
        """
        self._entered.add(part.name)
        if len(self._entered) > 1:
            names = " and ".join(repr(name or "the module itself") for name in sorted(self._entered))
            raise MisconfigurationException(
                f"an evaluation step of {type(self.module).__name__} calls {names} one after the other, and "
                "DeepEnsemble cannot tell whose output is the prediction. Call all of the "
                "network in forward(), and self(x) in the step; or name the part that predicts: network='...'."
            )
        self.found, self.calls = part.name, self.calls + 1
        self.inside = True
        try:
            return self.answer(part.original, args, kwargs)
        finally:
            self.inside = False

    def check_called(self, step: str) -> None:
        """Raise MisconfigurationException if the step that has ended, of that name, called no network."""
        if self.calls == 0:
            raise MisconfigurationException(
                f"{step} of {type(self.module).__name__} calls no part that has parameters"
                + (f" named {self.name!r}" if self.name else "")
                + ", so that it would see the first member alone. Call self(x) there, with the network in forward()."
            )
