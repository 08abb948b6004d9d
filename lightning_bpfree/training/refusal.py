"""Refusals of a rule, as Lightning's error for invalid configurations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_bpfree.core.network.network_call import RefusedError


class RefusedNetworkError(MisconfigurationException, RefusedError):
    """A rule does not support a network, or a training step's use of it; the message says how to fix it."""


@contextlib.contextmanager
def refusing(rule: str, error: type[ValueError] = RefusedError) -> Iterator[None]:
    """Raise refusals in this context with the name of ``rule``.

    Args:
        rule: the rule's name; the message starts with it.
        error: the error types that are refusals.

    Examples:
        >>> with refusing("ForwardForward"):
        ...     raise RefusedError("blocks=7: the network has 2 layers.")
        Traceback (most recent call last):
        lightning_bpfree.training.refusal.RefusedNetworkError: ForwardForward: blocks=7: the network has 2 layers.
    """
    try:
        yield
    except RefusedNetworkError:
        raise
    except error as found:
        said = str(found)
        raise RefusedNetworkError(said if said.startswith(rule) else f"{rule}: {said}") from found
