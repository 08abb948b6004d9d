"""The context of an evaluation (random streams, autocast, buffers), recorded so that another one gives equal bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


class Draws(NamedTuple):
    """States of torch's global random streams: the CPU's, and those of the accelerators that hold given tensors.

    Taken before and after every branch, and so without Python's and NumPy's streams, whose states take ten times as
    long (:class:`~lightning_bpfree.core.replay.random_streams.RandomStreams`, of which a step takes one).

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
        """Return the present states of the CPU and of the device of ``tensor``."""
        kind = tensor.device.type
        devices, states = ([], []) if kind in ("cpu", "meta") else get_device_states(tensor)
        return cls(torch.get_rng_state(), kind, devices, states)

    def restore(self) -> None:
        """Put these states back."""
        torch.set_rng_state(self.cpu)
        if self.devices:
            set_device_states(self.devices, self.states, device_type=self.kind)

    def equals(self, other: Draws) -> bool:
        """Return whether no number was drawn between the two."""
        return torch.equal(self.cpu, other.cpu) and all(map(torch.equal, self.states, other.states))

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Go back to these states at the end, whatever was drawn in between."""
        try:
            yield
        finally:
            self.restore()


class Autocast(NamedTuple):
    """Whether operators on the CPU and on another device choose their types, and which.

    Weights are cast without a cache: one cast within a branch, whose graph goes with it, must never serve another use.

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
        """Return the present modes of the CPU and of devices of ``kind``."""
        kinds = {"cpu", kind} - {"meta"}
        return cls(tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in sorted(kinds)))

    @property
    def enabled(self) -> bool:
        """Whether any of the devices casts."""
        return any(enabled for _, enabled, _ in self.modes)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Compute in these modes."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.modes:
                # Entering costs more than asking, and nothing is cast nearly always.
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield
