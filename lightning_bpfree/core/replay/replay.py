"""Evaluating a step several times as if it had been evaluated once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from lightning_bpfree.core.replay.tensor_copies import TensorCopies


class Recoverable(Protocol):
    """A part of the world that an evaluation moves, and that can be put back."""

    def save(self) -> Any:
        """Return the present state."""

    def load(self, state: Any) -> None:
        """Put ``state`` back."""


class Replay:
    """Starts every evaluation from the same state, and ends as if the recorded evaluation had been the only one.

    Args:
        parts: what evaluations move, and what is put back.
        buffers: what evaluations other than the recorded one see copies of.
        finished: called with the states of the parts before the step and behind it.

    Examples:
        >>> import torch
        >>> from lightning_bpfree.core.replay.random_streams import RandomStreams
        >>> replay = Replay([RandomStreams()], TensorCopies([]))
        >>> draws = []
        >>> for _ in range(2):
        ...     replay.rewind()
        ...     draws.append(torch.rand(()))
        ...     replay.keep()
        >>> draws[0] == draws[1]
        tensor(True)
        >>> replay.finish()
    """

    def __init__(
        self,
        parts: Sequence[Recoverable],
        buffers: TensorCopies,
        finished: Callable[[list[Any], list[Any]], None] | None = None,
    ) -> None:
        self.parts, self.buffers, self._finished = parts, buffers, finished
        self._before: list[Any] | None = None
        self._after: list[Any] | None = None

    def rewind(self) -> None:
        """Go back to the state before the first evaluation (and remember it, at the first call)."""
        if self._before is None:
            self._before = [part.save() for part in self.parts]
            self.buffers.remember()
        else:
            self._load(self._before)

    def keep(self) -> None:
        """Declare the present state to be the one that :meth:`finish` leaves behind."""
        self._after = [part.save() for part in self.parts]

    def undo(self) -> None:
        """Give buffers the values that they had before the step; everything else stays as the step has left it."""
        if self._before is not None:
            self.buffers.undo()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within an evaluation, compute something that moves neither buffers nor anything else."""
        state = [part.save() for part in self.parts]
        try:
            with self.buffers.copies():
                yield
        finally:
            self._load(state)

    def finish(self) -> None:
        """Leave the kept state behind; without one, the state before the first evaluation."""
        state = self._before if self._after is None else self._after
        if state is not None:
            self._load(state)
            if self._finished is not None and self._before is not None:
                self._finished(self._before, state)

    def _load(self, states: list[Any]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load(state)
