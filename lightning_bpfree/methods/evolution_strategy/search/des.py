"""DES: an evolution strategy whose update rule was found by meta-learning."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import NonNegativeFloat, PositiveFloat, PositiveFraction, checked
from lightning_bpfree.methods.evolution_strategy.search.algorithm import SearchAlgorithm, Weights
from lightning_bpfree.methods.evolution_strategy.search.fitness_shaping import ranked


class DES(SearchAlgorithm):
    """Moves mean and standard deviations toward those of the better members, weighted by a softmax of their ranks.

    ``SGD(lr=1)`` gives the classical update of the mean.

    Args:
        sigma: initial standard deviation, > 0.
        temperature: steepness of the weights over ranks, > 0.
        sigma_lr: fraction of the distance to the better members' deviation that one step covers, in (0, 1].
        sigma_decay: factor on the deviations after each step, in (0, 1].
        sigma_min: lower bound of the deviations, >= 0.

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> best_first = DES().weights(torch.tensor([0.0, 1.0, 2.0, 3.0])).first
        >>> bool((best_first[:-1] >= best_first[1:]).all())
        True

    References:
        R. T. Lange et al., "Discovering Evolution Strategies via Meta-Black-Box Optimization", 2022, arXiv 2211.11260.
    """

    @checked
    def __init__(
        self,
        sigma: PositiveFloat = 0.1,
        temperature: PositiveFloat = 12.5,
        sigma_lr: PositiveFraction = 0.1,
        sigma_decay: PositiveFraction = 1.0,
        sigma_min: NonNegativeFloat = 0.0,
    ) -> None:
        self.temperature, self.sigma_lr = temperature, sigma_lr
        super().__init__(sigma, sigma_decay, sigma_min)

    def weights(self, fitness: Tensor) -> Weights:
        """Return the softmax weights of the ranks, for the noise and for its squares."""
        centered = torch.linspace(-0.5, 0.5, len(fitness), dtype=torch.float64, device=fitness.device)
        weights = ranked(fitness, torch.softmax(-20 * torch.sigmoid(self.temperature * centered), 0))
        return Weights(weights, weights)

    def gradient(self, first: Tensor) -> Tensor:
        """Return the difference between the mean and the weighted mean of the members."""
        return -self.std * first

    def adapt(self, std: Tensor, first: Tensor, second: Tensor, told: float) -> Tensor:
        """Move toward the weighted deviation of the members from the mean by ``sigma_lr`` of the distance."""
        return torch.lerp(std, torch.sqrt(std.square() * second + 1e-6), self.sigma_lr)
