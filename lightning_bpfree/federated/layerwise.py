"""Perturbed parameters that exist for the time of their own layer's forward pass alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_bpfree.core.directions import Directions
from lightning_bpfree.core.params import ParameterSlots, Slot, place


class LayerwisePerturbation:
    """Moves the parameters of a module layer by layer, so that a second copy of them is never held.

    Every layer draws its own part of a direction when it is called, and gives it up when it returns. That is right if
    each parameter is used by the layer that has it, and by nobody else: :meth:`check` finds out.

    Args:
        slots: the trained parameters, with their places.
        directions: along which they are moved, with the portable generator.
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
        """Let every layer compute with its parameters plus ``sigma`` times direction ``k``."""
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

    def check(self, loss: Callable[[Mapping[str, Tensor] | None], Tensor], params: Mapping[str, Tensor]) -> None:
        """Raise ValueError if the loss along a direction is another one than with a copy of all parameters.

        Args:
            loss: the loss as a function of the parameters, None for the module's own.
            params: the module's own.
        """
        size = 0.1  # large, so that no parameter's part in the loss is lost in rounding
        expected = loss(self.directions.moved(0, params, size))
        with self.along(0, size):
            found = loss(None)
        if float(found) != float(expected):
            raise ValueError(
                f"Baffle: perturb='layers': a loss is {float(found):g} layer by layer, {float(expected):g} with all "
                "parameters moved: some are used outside of the layer that has them. Use perturb='copy'."
            )


def _restoring(own: list[tuple[str, Slot]]) -> Callable[..., None]:
    def restore(owner: nn.Module, *_: Any) -> None:
        _restore(owner, own)

    return restore


def _restore(owner: nn.Module, own: list[tuple[str, Slot]]) -> None:
    for key, slot in own:
        place(owner, key, slot.parameter)
