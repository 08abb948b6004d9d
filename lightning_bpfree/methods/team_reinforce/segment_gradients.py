"""Signals on potentials, and the resulting gradients of the parameters in the segments below."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_bpfree.core.params import added
from lightning_bpfree.methods.team_reinforce.layer import Layer

Gradients = list[Tensor | None]


def by_signals(signals: Sequence[Tensor], layers: Sequence[Layer], parameters: Sequence[Tensor]) -> Gradients:
    """Return what signals on potentials amount to in parameters; every segment is differentiated by itself."""
    rows, total = len(signals[0]), Sums(parameters)
    for layer, signal in zip(layers, signals, strict=True):
        total.add(layer, signal / rows, [])
    return total.gradients


class Sums:
    """Gradients of parameters, collected segment by segment.

    Args:
        parameters: the trained parameters.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.places = {id(parameter): place for place, parameter in enumerate(parameters)}
        self.gradients: Gradients = [None] * len(self.parameters)

    def add(self, layer: Layer, signal: Tensor, values: Sequence[Tensor]) -> Gradients:
        """Add the gradients of a signal on a layer's potentials, and return its derivative with respect to ``values``.

        Args:
            layer: the layer.
            signal: shaped like its potentials.
            values: values of layers below, in their order; what is asked for.
        """
        if not layer.potential.requires_grad:
            return [None] * len(values)
        linear, below = layer.linear, layer.below
        if linear is not None and below is not None and (layer.chained or not below.requires_grad):
            said = self._add_linear(linear, below, signal, len(values) if layer.chained else 0)
            return said or [None] * len(values)
        # Segments may share a graph (a residual stream), which ends with the potentials in any case.
        found = torch.autograd.grad(
            layer.potential,
            [*values, *self.parameters],
            signal.to(layer.potential.dtype),
            allow_unused=True,
            retain_graph=True,
        )
        for place, gradient in enumerate(found[len(values) :]):
            self._add(place, gradient)
        return list(found[: len(values)])

    @torch.no_grad()
    def _add_linear(self, linear: nn.Linear, below: Tensor, signal: Tensor, num_values: int) -> Gradients:
        """Do the same by products of matrices: autograd takes several times as long for small ones."""
        signal = signal.to(torch.promote_types(linear.weight.dtype, torch.float32))
        said: Gradients = [None] * num_values
        with torch.autocast(signal.device.type, enabled=False):
            if id(linear.weight) in self.places:
                self._add(self.places[id(linear.weight)], signal.T @ below.detach().to(signal.dtype))
            if linear.bias is not None and id(linear.bias) in self.places:
                self._add(self.places[id(linear.bias)], signal.sum(0))
            if num_values:
                said[-1] = signal @ linear.weight.to(signal.dtype)
        return said

    def _add(self, place: int, gradient: Tensor | None) -> None:
        self.gradients[place] = added(self.gradients[place], gradient)


def over_units(advantage: Tensor, like: Tensor) -> Tensor:
    """Return numbers ``(rows,)`` in a shape that multiplies ``like``, ``(rows, ...)``."""
    return advantage.to(like.dtype).view(-1, *[1] * (like.dim() - 1))
