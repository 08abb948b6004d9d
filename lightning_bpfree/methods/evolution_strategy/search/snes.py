"""SNES: separable natural evolution strategy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import NonNegativeFloat, PositiveFloat, PositiveFraction, checked
from lightning_bpfree.methods.evolution_strategy.search.algorithm import SearchAlgorithm, Weights
from lightning_bpfree.methods.evolution_strategy.search.fitness_shaping import ranked


class SNES(SearchAlgorithm):
    """Descends natural gradients of mean and standard deviations under utilities of ranks.

    ``SGD(lr=1)`` gives the classical update of the mean.

    Args:
        sigma: standard deviation at the start, > 0.
        temperature: None for the classical utilities, ``max(0, ln(N/2 + 1) - ln rank)`` scaled to sum to 1, minus 1/N.
            A number T > 0 uses a softmax of ``-T`` times the centered rank instead, without the 1/N.
        sigma_lr: learning rate of the logarithm of the deviations; None for ``(3 + ln d) / (5 sqrt d)``.
        sigma_decay: factor on the deviations after each step, in (0, 1].
        sigma_min: lower bound of the deviations, >= 0.

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> snes, w = SNES(sigma=0.5), torch.tensor([3.0, -1.0])
        >>> for generation in range(100):
        ...     population = snes.ask({"w": w}, size=16, seed=generation)
        ...     gradient = snes.tell(population, torch.stack([m["w"].square().sum() for m in population]))
        ...     snes.step()
        ...     w = w - gradient["w"]
        >>> bool(w.norm() < 1e-3)
        True

    References:
        T. Schaul, T. Glasmachers and J. Schmidhuber, "High Dimensions and Heavy Tails for Natural Evolution
        Strategies", 2011, GECCO.
    """

    @checked
    def __init__(
        self,
        sigma: PositiveFloat = 0.05,
        temperature: PositiveFloat | None = None,
        sigma_lr: PositiveFloat | None = None,
        sigma_decay: PositiveFraction = 1.0,
        sigma_min: NonNegativeFloat = 0.0,
    ) -> None:
        self.temperature, self.sigma_lr = temperature, sigma_lr
        super().__init__(sigma, sigma_decay, sigma_min)

    def weights(self, fitness: Tensor) -> Weights:
        """Return the utilities of the ranks, for the noise and for its squares."""
        weights = ranked(fitness, self._utilities(len(fitness)).to(fitness.device))
        return Weights(weights, weights)

    def _utilities(self, num: int) -> Tensor:
        ranks = torch.arange(num, dtype=torch.float64)
        if self.temperature is None:
            positive = (math.log(num / 2 + 1) - torch.log(ranks + 1)).clamp_min(0)
            return positive / positive.sum() - 1 / num
        return torch.softmax(-self.temperature * (ranks / (num - 1) - 0.5), 0)

    def gradient(self, first: Tensor) -> Tensor:
        """Return the negative natural gradient of the mean."""
        return -self.std * first

    def adapt(self, std: Tensor, first: Tensor, second: Tensor, told: float) -> Tensor:
        """Multiply each deviation by the exponential of half the learning rate times its gradient."""
        dim = len(std)
        rate = (3 + math.log(dim)) / (5 * math.sqrt(dim)) if self.sigma_lr is None else self.sigma_lr
        return std * torch.exp(rate / 2 * (second - float(self._utilities(self._size).sum())))
