"""Repeated evaluation of a step with the side effects of a single one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from lightning_bpfree.core.replay.tensor_copies import TensorCopies


class Recoverable(Protocol):
    """State that an evaluation changes, and that can be saved and restored."""

    def save(self) -> Any:
        """Return the current state."""

    def load(self, state: Any) -> None:
        """Restore ``state``."""


class Replay:
    """Starts every evaluation from the same state, and ends as if the recorded evaluation had been the only one.

    Args:
        parts: state that evaluations change, and that is restored.
        buffers: tensors of which evaluations other than the recorded one see copies.
        finished: called with the states of the parts before and after the step.

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
        """Restore the state before the first evaluation; the first call saves it."""
        if self._before is None:
            self._before = [part.save() for part in self.parts]
            self.buffers.remember()
        else:
            self._load(self._before)

    def keep(self) -> None:
        """Save the current state as the one that :meth:`finish` restores."""
        self._after = [part.save() for part in self.parts]

    def undo(self) -> None:
        """Restore the buffers to their values before the step; everything else stays as the step left it."""
        if self._before is not None:
            self.buffers.undo()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within an evaluation, compute something without side effects on buffers or other state."""
        state = [part.save() for part in self.parts]
        try:
            with self.buffers.copies():
                yield
        finally:
            self._load(state)

    def finish(self) -> None:
        """Restore the kept state, or the state before the first evaluation if none was kept."""
        state = self._before if self._after is None else self._after
        if state is not None:
            self._load(state)
            if self._finished is not None and self._before is not None:
                self._finished(self._before, state)

    def _load(self, states: list[Any]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load(state)
