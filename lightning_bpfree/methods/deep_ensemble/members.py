"""The members of an ensemble: parameters and buffers of each, which the Trainer's module uses temporarily."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bpfree.core.params import ParameterSlots

State = dict[str, Tensor]


class Members:
    """Parameters and buffers of M members; the module holds the first one, except while another member computes.

    Members lend their tensors to the module's own ``Parameter`` objects through ``.data``, so that every reference to a
    parameter, wherever the module keeps it, sees the member at work. There are two ways to keep the tensors:

    - apart: every member has ``Parameter`` objects of its own (those of the first are the module's);
    - stacked: one ``Parameter`` of shape ``(M, ...)`` for each of the module's.

    Buffers are stacked in both, since torch.func.vmap needs them so, except where shapes change.

    Args:
        module: the module.
        states: the members' parameters and buffers by name, tied ones once, as :meth:`Members.state` gives them.
        stacked: whether to stack.
    """

    def __init__(self, module: nn.Module, states: Sequence[Mapping[str, Tensor]], stacked: bool) -> None:
        self.module, self.count = module, len(states)
        self.slots = ParameterSlots(module)
        self.buffer_places = buffer_places(module)
        self.apart: list[dict[str, nn.Parameter]] = []
        self.stack: dict[str, nn.Parameter] = {}
        self.buffers: list[dict[str, Tensor | None]] = [
            {name: _copy(state.get(name)) for name in self.buffer_places} for state in states
        ]
        if stacked:
            for slot in self.slots:
                values = torch.stack([state[slot.name].detach() for state in states]).to(slot.parameter.device)
                self.stack[slot.name] = nn.Parameter(values, slot.parameter.requires_grad)
        else:
            self.apart = [self._own(m, state) for m, state in enumerate(states)]
        self._at_rest()

    def _own(self, member: int, state: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        own: dict[str, nn.Parameter] = {}
        for slot in self.slots:
            value = state[slot.name].detach().to(slot.parameter.device)
            if member == 0:
                slot.parameter.data = value.clone()
                own[slot.name] = slot.parameter
            else:
                own[slot.name] = nn.Parameter(value.clone(), slot.parameter.requires_grad)
        return own

    @property
    def stacked(self) -> bool:
        """Whether parameters are kept in stacks."""
        return bool(self.stack)

    def leaves(self) -> list[nn.Parameter]:
        """Return what optimizers move: the stacks, or all members' parameters."""
        return list(self.stack.values()) if self.stack else [p for own in self.apart for p in own.values()]

    def data(self, member: int) -> State:
        """Return one member's parameter tensors by name; writing into them moves the member."""
        if self.stack:
            return {name: stack.data[member] for name, stack in self.stack.items()}
        return {name: parameter.data for name, parameter in self.apart[member].items()}

    def state(self, member: int) -> State:
        """Return copies of one member's parameters and buffers by name, tied ones once."""
        buffers = self.buffers[member] if member else self._held_buffers()
        named = {**self.data(member), **{name: buffer for name, buffer in buffers.items() if buffer is not None}}
        return {name: tensor.detach().clone() for name, tensor in named.items()}

    def mirror(self) -> None:
        """Let the members' parameters require gradients where the module's do now."""
        for slot in self.slots:
            if self.stack:
                self.stack[slot.name].requires_grad_(slot.parameter.requires_grad)
            else:
                for own in self.apart[1:]:
                    own[slot.name].requires_grad_(slot.parameter.requires_grad)

    # --- one member at work in the module ---

    @contextlib.contextmanager
    def at_work(self, member: int, grads: bool = False) -> Iterator[None]:
        """Let the module compute as one member.

        Args:
            member: which.
            grads: whether the parameters' gradients come along, and changes of them go back.
        """
        home = [slot.parameter.grad for slot in self.slots]
        if grads or self.stack:
            for slot in self.slots:
                slot.parameter.grad = self._grad(slot.name, member) if grads else None
        if member == 0:
            try:
                yield
            finally:
                if grads or self.stack:
                    self._give_back_grads(0, grads, home)
            return
        rest, rest_buffers = [slot.parameter.data for slot in self.slots], self._held_buffers()
        for slot, value in zip(self.slots, self.data(member).values(), strict=True):
            slot.parameter.data = value
        self._hold(self.buffers[member])
        try:
            yield
        finally:
            self.buffers[member] = self._held_buffers()
            self._hold(rest_buffers)
            if not self.stack:
                for slot in self.slots:
                    self.apart[member][slot.name].data = slot.parameter.data  # some code assigns rather than writes
            if grads or self.stack:
                self._give_back_grads(member, grads, home)
            for slot, value in zip(self.slots, rest, strict=True):
                slot.parameter.data = value

    def _grad(self, name: str, member: int) -> Tensor | None:
        if not self.stack:
            return self.apart[member][name].grad
        grad = self.stack[name].grad
        return None if grad is None else grad[member]

    def _give_back_grads(self, member: int, grads: bool, home: list[Tensor | None]) -> None:
        for slot, own in zip(self.slots, home, strict=True):
            now = slot.parameter.grad
            if grads and self.stack:
                kept = self.stack[slot.name].grad
                if kept is not None and now is not None and now.data_ptr() != kept[member].data_ptr():
                    kept[member].copy_(now)
            elif grads and member:
                self.apart[member][slot.name].grad = now
            if self.stack or member:
                slot.parameter.grad = None if self.stack else own

    # --- all members at work side by side ---

    def stacks(self) -> dict[str, Tensor]:
        """Return stacks ``(M, ...)`` of all parameters; gradients of theirs reach what :meth:`leaves` returns."""
        if self.stack:
            return dict(self.stack)
        # The first member's parameters are the module's own.
        return {slot.name: torch.stack([own[slot.name] for own in self.apart]) for slot in self.slots}

    def buffer_stacks(self) -> dict[str, Tensor]:
        """Return copies of all buffers, stacked.

        Raises:
            ValueError: where members' buffers differ in shape.
        """
        held = [self._held_buffers(), *self.buffers[1:]]
        stacks: dict[str, Tensor] = {}
        for name in self.buffer_places:
            values = [buffers[name] for buffers in held]
            tensors = [value for value in values if value is not None]
            if not tensors:
                continue
            if len(tensors) != len(values) or len({tensor.shape for tensor in tensors}) != 1:
                raise ValueError(f"the members' buffers {name!r} differ in shape")
            stacks[name] = torch.stack(tensors)
        return stacks

    def take_buffers(self, stacks: Mapping[str, Tensor]) -> None:
        """Take the buffers that an evaluation side by side has left."""
        for member in range(self.count) if stacks else ():
            own = {name: stack[member] for name, stack in stacks.items()}
            if member == 0:
                self._hold({**self._held_buffers(), **own})
            else:
                self.buffers[member] = {**self.buffers[member], **own}

    @contextlib.contextmanager
    def placed(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Let the module compute with these tensors; the given dict holds its buffers afterward."""
        before, left = self._held_buffers(), dict(buffers)
        with self.slots.replaced(params):
            self._hold({**before, **buffers})
            try:
                yield left
            finally:
                held = self._held_buffers()
                left.update({name: value for name in buffers if (value := held[name]) is not None})
                self._hold(before)

    # --- the module at rest ---

    def _at_rest(self) -> None:
        if self.stack:
            for slot in self.slots:
                slot.parameter.data = self.stack[slot.name].data[0]
        self._hold({**self._held_buffers(), **self.buffers[0]})

    def release(self) -> None:
        """Leave the module with the first member's tensors, in separate memory."""
        for slot in self.slots:
            slot.parameter.grad = None
            if self.stack:
                slot.parameter.data = self.stack[slot.name].data[0].clone()

    def _held_buffers(self) -> dict[str, Tensor | None]:
        return {name: owner._buffers[key] for name, (owner, key) in self.buffer_places.items()}

    def _hold(self, buffers: Mapping[str, Tensor | None]) -> None:
        for name, (owner, key) in self.buffer_places.items():
            owner._buffers[key] = buffers[name]


def buffer_places(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the module's buffers, persistent or not, by name."""
    return {
        f"{path}.{key}" if path else key: (owner, key)
        for path, owner in module.named_modules()
        for key in owner._buffers
    }


def state_of(module: nn.Module) -> State:
    """Return copies of the module's parameters (tied ones once) and buffers by name."""
    named: dict[str, Any] = {slot.name: slot.parameter for slot in ParameterSlots(module)}
    named |= {name: owner._buffers[key] for name, (owner, key) in buffer_places(module).items()}
    return {name: tensor.detach().clone() for name, tensor in named.items() if tensor is not None}


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
