"""PGPE: policy gradients with parameter-based exploration, a likelihood gradient of mean and deviation."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import (
    NonNegativeFloat,
    OpenFraction,
    PositiveFloat,
    PositiveFraction,
    checked,
)
from lightning_bpfree.methods.evolution_strategy.search.algorithm import SearchAlgorithm, Weights
from lightning_bpfree.methods.evolution_strategy.search.fitness_shaping import Shaping, shaped


class PGPE(SearchAlgorithm):
    """Descends the likelihood gradients of the mean and the standard deviation, each scaled by the variance.

    With ``e = std z``, the gradient of the mean is the mean over members of ``f e``, that of the deviation the mean of
    ``(f - mean f) (e^2 - std^2) / std``: deviations shrink where the fitness is curved. The optimizer is Adam in the
    literature, with a learning rate of about 0.01.

    Args:
        sigma: standard deviation at the start, > 0.
        shaping: ``"centered_rank"``, ``"z_score"`` or ``"raw"``, see :func:`shaped`.
        sigma_lr: learning rate of the deviation, > 0.
        max_change: largest relative change of a deviation in one step, in (0, 1).
        sigma_decay: factor on the deviation after each step, in (0, 1].
        sigma_min: lower bound of the deviation, >= 0. Deviations at this bound carry no information about curvature,
            which matters if you prune by signal-to-noise.

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> PGPE(sigma=0.1)
        PGPE(sigma=0.1, shaping='centered_rank', sigma_lr=0.1, max_change=0.2, sigma_decay=1.0, sigma_min=0.0)

    References:
        F. Sehnke et al., "Parameter-exploring Policy Gradients", 2010, Neural Networks 23(4).
        R. T. Lange and H. Sprekeler, "Lottery Tickets in Evolutionary Optimization", 2023, arXiv 2306.00045.
    """

    mirrored: ClassVar[bool] = True

    @checked
    def __init__(
        self,
        sigma: PositiveFloat = 0.05,
        shaping: Shaping = "centered_rank",
        sigma_lr: PositiveFloat = 0.1,
        max_change: OpenFraction = 0.2,
        sigma_decay: PositiveFraction = 1.0,
        sigma_min: NonNegativeFloat = 0.0,
    ) -> None:
        self.shaping, self.sigma_lr, self.max_change = shaping, sigma_lr, max_change
        super().__init__(sigma, sigma_decay, sigma_min)

    @property
    def ranks_fitness(self) -> bool:
        """Whether the fitness is shaped by ranks."""
        return self.shaping == "centered_rank"

    def weights(self, fitness: Tensor) -> Weights:
        """Return shaped fitness divided by N, and the same minus its mean."""
        scores = shaped(fitness, self.shaping) / len(fitness)
        return Weights(scores, scores - scores.mean())

    def gradient(self, first: Tensor) -> Tensor:
        """Return the mean of ``f e``."""
        return self.std * first

    def adapt(self, std: Tensor, first: Tensor, second: Tensor, told: float) -> Tensor:
        """Descend the gradient of the deviation; the second weights add up to zero, so the ``- std^2`` drops out."""
        change = (self.sigma_lr * second).clamp(-self.max_change, self.max_change)
        return torch.addcmul(std, std, change, value=-1)
