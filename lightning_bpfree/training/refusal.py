"""Refusals of a rule, as the error that Lightning raises for configurations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_bpfree.core.network.network_call import RefusedError


class RefusedNetworkError(MisconfigurationException, RefusedError):
    """A rule cannot train a network, or a training step's use of it; the message names the cure."""


@contextlib.contextmanager
def refusing(rule: str, error: type[ValueError] = RefusedError) -> Iterator[None]:
    """Raise refusals in this context under the name of ``rule``.

    Args:
        rule: the rule's name, with which the message begins.
        error: the errors that are refusals.

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
