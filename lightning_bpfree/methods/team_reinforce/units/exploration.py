"""The interface of exploration in a layer of stochastic units, and units that draw independently."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_bpfree.methods.team_reinforce.units.stochastic import Bernoulli, StochasticUnit


class Drawn(NamedTuple):
    """What a layer of units has drawn.

    Args:
        value: shape ``(B, n)``.
        score: derivative of the log probability of the draw by the potentials, shape ``(B, n)``; without the negative
            phase only the part that depends on the draw.
        lateral: advantages ``(B,)`` -> sum over rows of advantage times the derivative by the lateral weights,
            ``(n, n)``; None without lateral weights.
    """

    value: Tensor
    score: Tensor
    lateral: Callable[[Tensor], Tensor] | None = None


class Exploration(ABC):
    """How the units of a layer draw."""

    has_lateral_weights: ClassVar[bool] = True

    def check(self, unit: StochasticUnit) -> None:
        """Raise ValueError if such units cannot draw in this way."""
        if self.has_lateral_weights and not isinstance(unit, Bernoulli):
            raise ValueError(
                f"exploration={type(self).__name__}: lateral weights are defined between units with two values, but "
                f"unit is {type(unit).__name__}. Use unit='bernoulli' or 'sign', or exploration='independent'."
            )

    @abstractmethod
    def draw(
        self,
        unit: StochasticUnit,
        potential: Tensor,
        weight: Tensor | None = None,
        *,
        negative_phase: bool = True,
        generator: torch.Generator | None = None,
    ) -> Drawn:
        """Draw the values of a layer.

        Args:
            unit: what they are.
            potential: shape ``(B, ...)``, and ``(B, n)`` with lateral weights.
            weight: lateral weights, ``(n, n)``.
            negative_phase: whether scores have their mean subtracted (exactly, or by a further draw).
            generator: where random numbers come from.
        """

    @abstractmethod
    def mean(self, unit: StochasticUnit, potential: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return what the layer gives without noise: means, by a mean-field approximation where there are weights."""


class Independent(Exploration):
    """Every unit draws by itself.

    Examples:
        >>> Independent().draw(Bernoulli(), torch.tensor([[50.0, -50.0]])).value
        tensor([[1., 0.]])
    """

    has_lateral_weights: ClassVar[bool] = False

    def draw(
        self,
        unit: StochasticUnit,
        potential: Tensor,
        weight: Tensor | None = None,
        *,
        negative_phase: bool = True,
        generator: torch.Generator | None = None,
    ) -> Drawn:
        """Draw; the mean of the score is known exactly, so that ``negative_phase=False`` changes nothing."""
        return Drawn(*unit.draw(potential.detach(), generator))

    def mean(self, unit: StochasticUnit, potential: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the means."""
        return unit.mean(potential)
