"""Copies of tensors that a step changes in place: buffers, tensors that modules hold, frozen parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_bpfree.core.replay.object_graph import Place, is_array


class TensorCopies:
    """Tensors and arrays of which evaluations other than the recorded one see copies.

    The recorded evaluation of a step changes the tensors themselves; all others work on copies of their values at the
    start of the step. Nothing is copied back, since that would invalidate graphs that hold one of them.

    Args:
        places: where the tensors are.

    Examples:
        >>> import torch
        >>> norm = nn.BatchNorm1d(2)
        >>> buffers = Buffers(norm)
        >>> buffers.remember()
        >>> with buffers.copies():
        ...     _ = norm(torch.randn(8, 2))
        >>> int(norm.num_batches_tracked)
        0
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = list(places)
        self._values: list[Any] = []

    def remember(self) -> None:
        """Save the current values as those from which evaluations start."""
        self._values = [copied(place.get()) for place in self.places]

    def undo(self) -> None:
        """Write the saved values back to the tensors: the batch is skipped, and its graphs are not used."""
        with torch.no_grad():
            for place, value in zip(self.places, self._values, strict=True):
                if isinstance(value, Tensor):
                    place.get().copy_(value)
                elif is_array(value):
                    place.get()[...] = value

    @contextlib.contextmanager
    def copies(self) -> Iterator[None]:
        """Replace the tensors by fresh copies of the saved values in this context."""
        own = [place.get() for place in self.places]
        for place, value in zip(self.places, self._values, strict=True):
            place.put(copied(value))
        try:
            yield
        finally:
            for place, tensor in zip(self.places, own, strict=True):
                place.put(tensor)


class Buffers(TensorCopies):
    """The registered buffers of a module: running statistics, counters, power-iteration vectors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(buffer_places(module.modules()))


def buffer_places(modules: Any) -> list[Place]:
    """Return the places of the registered buffers of some modules."""
    return [Place(owner._buffers, key) for owner in modules for key in owner._buffers]


def copied(value: Any) -> Any:
    """Return a copy of a tensor or an array that shares no memory with it; other values unchanged."""
    if is_lazy(value):  # the first forward pass makes it, in place
        return value
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
    if isinstance(value, Tensor):
        copy = value.detach().clone()
        # Not set where it is off: inside a transform of torch.func it may not be.
        return copy.requires_grad_() if value.requires_grad and value.is_leaf else copy
    return value.copy() if is_array(value) else value
