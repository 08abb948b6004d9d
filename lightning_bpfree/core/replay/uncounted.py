"""Evaluations that are no part of a rule's cost: rehearsals, measurements, trials of what is faster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_UNCOUNTED: ContextVar[bool] = ContextVar("bpfree_uncounted", default=False)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Evaluate without counting; it is a decorator too.

    Examples:
        >>> with uncounted():
        ...     counts()
        False
        >>> counts()
        True
    """
    token = _UNCOUNTED.set(True)
    try:
        yield
    finally:
        _UNCOUNTED.reset(token)


def counts() -> bool:
    """Return whether an evaluation made now is part of a rule's cost."""
    return not _UNCOUNTED.get()
