"""What an evaluation depends on beside its inputs, recorded so that a later one gives the same bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from lightning_bpfree.core.params import ParameterSlots


class Draws(NamedTuple):
    """States of torch's global random streams: the CPU's, and those of the accelerators that hold given tensors.

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

    Weights are cast without a cache: one cast without a graph must never serve a use that needs a gradient.

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


class Inventory:
    """The parameters and buffers that a module computes with at one time, and its mode.

    Args:
        owner: the module.
        label: what messages call it.

    Examples:
        >>> net = nn.Linear(2, 1)
        >>> inventory = Inventory(net, "net")
        >>> _ = net.weight.data.add_(1.0), inventory.check()  # .data leaves no trace
        >>> with torch.no_grad():
        ...     _ = net.weight.add_(1.0)
        >>> inventory.check()
        Traceback (most recent call last):
            ...
        RuntimeError: a parameter of net was changed in place between forward and backward...
    """

    def __init__(self, owner: nn.Module, label: str) -> None:
        self.owner, self.label, self.training = owner, label, owner.training
        self.places: list[tuple[nn.Module, str, Tensor]] = []
        self.buffers: list[tuple[dict[str, Tensor | None], str]] = []
        for module in owner.modules():
            self.places += [(module, key, p) for key, p in module._parameters.items() if p is not None]
            self.buffers += [(module._buffers, key) for key, b in module._buffers.items() if b is not None]
        self.parameters = list({id(p): p for _, _, p in self.places}.values())
        self._versions = [_version(p) for p in self.parameters]

    @property
    def trainable(self) -> list[Tensor]:
        """The parameters that require a gradient, each once."""
        return [p for p in self.parameters if p.requires_grad]

    def check(self) -> None:
        """Refuse to repeat an evaluation whose weights or mode are no longer what they were.

        Raises:
            RuntimeError: if a parameter was changed in place, or the module was switched between training and
                evaluation.
        """
        if [_version(p) for p in self.parameters] != self._versions:
            raise RuntimeError(
                f"a parameter of {self.label} was changed in place between forward and backward, so that its inputs "
                "cannot be recomputed: call backward() before the optimizer's step, or use schedule='autograd'."
            )
        if self.owner.training != self.training:
            raise RuntimeError(
                f"{self.label} was in {'training' if self.training else 'evaluation'} mode in the forward pass and is "
                "not in the backward pass: call train() or eval() after backward()."
            )

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Compute with the same parameters, and leave the buffers alone."""
        # Buffers are replaced by copies rather than put back: graphs may hold the tensors that are there now.
        own = [(registry, key, registry[key]) for registry, key in self.buffers]
        for registry, key, buffer in own:
            registry[key] = None if buffer is None else buffer.clone()
        try:
            with self._same_parameters():
                yield
        finally:
            for registry, key, buffer in own:
                registry[key] = buffer

    def _same_parameters(self) -> contextlib.AbstractContextManager[None]:
        if all(module._parameters.get(key) is p for module, key, p in self.places):
            return contextlib.nullcontext()
        # The forward pass ran within torch.func.functional_call, which has ended.
        then = {(id(module), key): p for module, key, p in self.places}
        slots = ParameterSlots(self.owner)
        return slots.replaced(
            {slot.name: then[(id(slot.places[0][0]), slot.places[0][1])] for slot in slots if slot.places}
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
