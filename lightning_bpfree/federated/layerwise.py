"""Perturbed parameters that exist only during their own layer's forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bpfree.core.directions import Directions
from lightning_bpfree.core.params import ParameterSlots, Slot, place


class LayerwisePerturbation:
    """Perturbs the parameters of a module layer by layer, so that memory never holds a second copy of them.

    Every layer draws its own part of a direction when it is called, and frees it when it returns. This is correct if
    each parameter is used only by the layer that owns it, which :meth:`fits` checks.

    Args:
        slots: the trained parameters, with their places.
        directions: the directions, from the portable generator.
    """

    def __init__(self, slots: ParameterSlots, directions: Directions) -> None:
        self.directions = directions
        self._owners: dict[int, tuple[nn.Module, list[tuple[str, Slot]]]] = {}
        for slot in slots:
            if slot.name in directions.like:
                for owner, key in slot.places:
                    self._owners.setdefault(id(owner), (owner, []))[1].append((key, slot))

    @contextlib.contextmanager
    def along(self, k: int, sigma: float) -> Iterator[None]:
        """Let every layer compute with its parameters plus ``sigma`` times direction ``k`` in this context."""
        handles: list[Any] = []
        try:
            for owner, own in self._owners.values():
                handles.append(owner.register_forward_pre_hook(self._moving(k, sigma, own)))
                handles.append(owner.register_forward_hook(_restoring(own), always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for owner, own in self._owners.values():
                _restore(owner, own)

    def _moving(self, k: int, sigma: float, own: list[tuple[str, Slot]]) -> Callable[..., None]:
        def move(owner: nn.Module, _: Any) -> None:
            for key, slot in own:
                moved = self.directions.part(k, slot.name).mul_(sigma)
                place(owner, key, moved.add_(slot.parameter.detach()))

        return move

    def fits(self, loss: Callable[[], Tensor]) -> bool:
        """Return whether every parameter is used only by its own layer, and only while that layer computes.

        During one evaluation, the parameters are NaN everywhere else, which must not change the loss. No parameter is
        copied for that.

        Args:
            loss: the loss at the module's own parameters; if it is not finite, the result is False.
        """
        handles: list[Any] = []
        expected = loss()
        try:
            for owner, own in self._owners.values():
                _poison(owner, own)
                handles.append(owner.register_forward_pre_hook(_restoring(own)))
                handles.append(owner.register_forward_hook(_poisoning(own), always_call=True))
            return bool(loss() == expected)
        except Exception:  # a step may well raise for what is not finite, and means the same
            return False
        finally:
            for handle in handles:
                handle.remove()
            for owner, own in self._owners.values():
                _restore(owner, own)


def _poison(owner: nn.Module, own: list[tuple[str, Slot]]) -> None:
    for key, slot in own:
        place(owner, key, slot.parameter.detach().new_full((), torch.nan).expand_as(slot.parameter))


def _poisoning(own: list[tuple[str, Slot]]) -> Callable[..., None]:
    def poison(owner: nn.Module, *_: Any) -> None:
        _poison(owner, own)

    return poison


def _restoring(own: list[tuple[str, Slot]]) -> Callable[..., None]:
    def restore(owner: nn.Module, *_: Any) -> None:
        _restore(owner, own)

    return restore


def _restore(owner: nn.Module, own: list[tuple[str, Slot]]) -> None:
    for key, slot in own:
        place(owner, key, slot.parameter)
