"""Evaluations that do not count toward a rule's cost: rehearsals, measurements, timing trials."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_UNCOUNTED: ContextVar[bool] = ContextVar("bpfree_uncounted", default=False)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Evaluate without counting; also works as a decorator.

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
    """Return whether an evaluation now counts toward a rule's cost."""
    return not _UNCOUNTED.get()
