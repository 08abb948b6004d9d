"""The context of an evaluation (random streams, autocast, buffers), recorded so that a repeat gives equal bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


class Draws(NamedTuple):
    """States of torch's global random streams: the CPU's, and those of the accelerators that hold given tensors.

    They are saved before and after every branch. Python's and NumPy's streams are not included, since saving them takes
    ten times as long; see :class:`~lightning_bpfree.core.replay.random_streams.RandomStreams`, saved once per step.

    Examples:
        >>> before = Draws.now(torch.zeros(1))
        >>> first = torch.rand(3)
        >>> before.restore()
        >>> torch.equal(torch.rand(3), first)
        True
    """

    cpu: Tensor
    kind: str
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def now(cls, tensor: Tensor) -> Draws:
        """Return the current states of the CPU and of the device of ``tensor``."""
        kind = tensor.device.type
        devices, states = ([], []) if kind in ("cpu", "meta") else get_device_states(tensor)
        return cls(torch.get_rng_state(), kind, devices, states)

    def restore(self) -> None:
        """Restore these states."""
        torch.set_rng_state(self.cpu)
        if self.devices:
            set_device_states(self.devices, self.states, device_type=self.kind)

    def equals(self, other: Draws) -> bool:
        """Return whether no number was drawn between the two states."""
        return torch.equal(self.cpu, other.cpu) and all(map(torch.equal, self.states, other.states))

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Restore these states at the end of this context."""
        try:
            yield
        finally:
            self.restore()


class Autocast(NamedTuple):
    """Autocast modes on the CPU and on another device.

    Weights are cast without a cache: a cast inside a branch belongs to that branch's graph and must not be reused.

    Examples:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     mode = Autocast.now("cpu")
        >>> with mode.again():
        ...     torch.mm(torch.eye(2), torch.eye(2)).dtype
        torch.bfloat16
    """

    modes: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, kind: str) -> Autocast:
        """Return the current modes of the CPU and of devices of ``kind``."""
        kinds = {"cpu", kind} - {"meta"}
        return cls(tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in sorted(kinds)))

    @property
    def enabled(self) -> bool:
        """Whether autocast is enabled on any of the devices."""
        return any(enabled for _, enabled, _ in self.modes)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Apply these modes in this context."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.modes:
                # Entering costs more than asking, and nothing is cast nearly always.
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield
