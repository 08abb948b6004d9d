"""Detection of derivatives that a training step computes itself, before it returns its loss."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def watched(found: Callable[[], None], files: Collection[str]) -> Iterator[None]:
    """Call ``found`` when user code calls ``backward`` or ``autograd.grad`` in this context.

    Derivatives that a rule computes in the meantime, in hooks on the network, are ignored.

    Args:
        found: called before the derivative is computed, from within the user's code; may raise.
        files: Python modules whose derivatives are ignored, in addition to this package.
    """
    autograd: Any = torch.autograd
    original = autograd._engine_run_backward  # below `backward` and `grad`, under which names they are ever kept

    def run(*args: Any, **kwargs: Any) -> Any:
        if not _is_ours(files):
            found()
        return original(*args, **kwargs)

    autograd._engine_run_backward = run
    try:
        yield
    finally:
        autograd._engine_run_backward = original


def _is_ours(files: Collection[str]) -> bool:
    """Whether the nearest caller outside of torch is this package, or one of ``files``."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith("torch."):
            return name in files or str(name).startswith("lightning_bpfree.")
        frame = frame.f_back  # type: ignore[assignment]
    return False
