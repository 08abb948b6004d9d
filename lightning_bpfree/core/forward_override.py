"""Removable overrides of a module's forward pass, set on the instance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

from torch import nn


class ForwardOverride:
    """Replaces ``module.forward``; calls of the module call the subclass instead.

    :attr:`original` is the forward pass that the module had before (on the instance, or its class's). An earlier
    override of the same kind is replaced, and not kept.

    Args:
        module: the module.
    """

    rule: str = ""
    """Name of the rule that computes in this way."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.training_pass: Any = None
        """What is called in a training step, in the way that the subclass says; None outside of one."""
        before = module.__dict__.get("forward")
        self._own: Any = before._own if isinstance(before, ForwardOverride) else before

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the module, or a pickle of it, takes along: no training step."""
        return {**self.__dict__, "training_pass": None}

    def install(self) -> None:
        """Replace the module's forward pass."""
        self.module.forward = cast("Any", self)  # subclasses are callable, each with its own arguments

    def remove(self) -> None:
        """Restore the module's own forward pass, unless other code has replaced it since."""
        if not self.installed:
            return
        if self._own is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self._own

    def set_rule(self, rule: str) -> None:
        """Set the name of the rule that uses this override."""
        self.rule = rule

    @contextlib.contextmanager
    def in_training(self, training_pass: Any) -> Iterator[None]:
        """Redirect calls of the module to ``training_pass`` in this context."""
        self.training_pass = training_pass
        try:
            yield
        finally:
            self.training_pass = None

    @property
    def installed(self) -> bool:
        """Whether the module uses this override."""
        return self.module.__dict__.get("forward") is self

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own forward pass."""
        return (self._own or type(self.module).forward.__get__(self.module))(*args, **kwargs)


def override_of(module: nn.Module) -> ForwardOverride | None:
    """Return the override of the module's forward pass, or None."""
    found = module.__dict__.get("forward")
    return found if isinstance(found, ForwardOverride) else None


@contextlib.contextmanager
def removed(override: ForwardOverride | None) -> Iterator[None]:
    """Restore the module's own forward pass in this context."""
    installed = override is not None and override.installed
    if override is not None:
        override.remove()
    try:
        yield
    finally:
        if override is not None and installed:
            override.install()
