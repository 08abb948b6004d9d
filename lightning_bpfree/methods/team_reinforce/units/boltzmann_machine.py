"""One Boltzmann machine over all hidden layers and the output of a network, drawn given the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bpfree.methods.team_reinforce.units.lateral import Boltzmann, thresholds
from lightning_bpfree.methods.team_reinforce.units.stochastic import Bernoulli, Softmax, StochasticUnit


class MachineLayer(NamedTuple):
    """One layer of the machine.

    Args:
        unit: :class:`Bernoulli`, or :class:`Softmax` for the last layer.
        weight: of the linear layer below, ``(n, n_below)``; None for the first, whose potentials the input gives.
        bias: of it, ``(n,)``, or None.
        lateral: symmetric weights within the layer, ``(n, n)``, or None.
    """

    unit: StochasticUnit
    weight: Tensor | None = None
    bias: Tensor | None = None
    lateral: Tensor | None = None


class Machine:
    """A Boltzmann machine of layers: ``log P(h) = sum_l h_l . x_l(h_(l-1)) / (step_l temperature_l) + lateral terms``.

    ``x_l`` are the potentials that the layer below gives, as in the network's forward pass; what makes it a machine is
    that a layer also listens to the layer above, by the same weights.

    Args:
        layers: from the first hidden layer to the output.
        settings: number of sweeps, and colors of the lateral weights.

    Raises:
        ValueError: for units that a Boltzmann machine has no energy for.
    """

    def __init__(self, layers: Sequence[MachineLayer], settings: Boltzmann) -> None:
        for layer in layers:
            if not isinstance(layer.unit, Bernoulli | Softmax):
                raise ValueError(
                    f"Boltzmann(whole_network=True): units are {type(layer.unit).__name__}; the machine needs "
                    "units with two values, and one softmax output."
                )
        self.layers, self.settings = list(layers), settings

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, which potentials of the first layer have to have."""
        return next((layer.weight.dtype for layer in self.layers if layer.weight is not None), torch.float32)

    def potentials(self, first: Tensor, values: Sequence[Tensor], index: int) -> Tensor:
        """Return what the layer below gives to layer ``index``."""
        layer = self.layers[index]
        if layer.weight is None:
            return first
        return torch.nn.functional.linear(values[index - 1], layer.weight, layer.bias)

    def fields(self, first: Tensor, values: Sequence[Tensor], index: int) -> Tensor:
        """Return potentials and what the layer above adds, without lateral terms."""
        field = self.potentials(first, values, index)
        if index + 1 == len(self.layers):
            return field
        own, above = self.layers[index], self.layers[index + 1]
        assert above.weight is not None
        return torch.addmm(field, values[index + 1], above.weight, alpha=above.unit.scale / own.unit.scale)

    @torch.no_grad()
    def draw(self, first: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """Return values of all layers after the sweeps, from draws layer by layer as in the network's forward pass.

        Args:
            first: potentials of the first layer, ``(B, n)``.
            generator: where random numbers come from.
        """
        values: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            values.append(layer.unit.sample(self.potentials(first, values, index), generator))
        for _ in range(self.settings.sweeps):
            for index, layer in enumerate(self.layers):
                field = self.fields(first, values, index)
                if not isinstance(layer.unit, Bernoulli):
                    values[index] = layer.unit.sample(field, generator)
                    continue
                noise = thresholds(layer.unit, tuple(field.shape), field, generator)
                if layer.lateral is None:
                    values[index] = layer.unit.valued((field > noise).to(field.dtype))
                    continue
                for group in self.settings.groups(field.shape[1]):
                    total = torch.addmm(field[:, group], values[index], layer.lateral[:, group])
                    values[index][:, group] = layer.unit.valued((total > noise[:, group]).to(field.dtype))
        return values

    @torch.no_grad()
    def mean_field(self, first: Tensor) -> list[Tensor]:
        """Return means of all layers after as many sweeps of the mean-field equations, from the forward pass."""
        values: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            values.append(layer.unit.mean(self.potentials(first, values, index)))
        for _ in range(self.settings.sweeps):
            for index, layer in enumerate(self.layers):
                field = self.fields(first, values, index)
                if layer.lateral is None:
                    values[index] = layer.unit.mean(field)
                    continue
                for group in self.settings.groups(field.shape[1]):
                    own = values[index].clone()
                    own[:, group] = layer.unit.mean(field[:, group] + values[index] @ layer.lateral[:, group])
                    values[index] = own
        return values
