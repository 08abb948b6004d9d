"""Sep-CMA-ES: covariance matrix adaptation with a diagonal covariance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import NonNegativeFloat, PositiveFloat, PositiveFraction, checked
from lightning_bpfree.methods.evolution_strategy.search.algorithm import SearchAlgorithm, Weights
from lightning_bpfree.methods.evolution_strategy.search.fitness_shaping import ranked


class SepCMAES(SearchAlgorithm):
    """Adapts a diagonal covariance and a step size from the better part of the population and its path over time.

    ``SGD(lr=1)`` gives the classical update of the mean. Members are not mirrored by default: opposite noise cancels in
    the path, so the step size would shrink too fast.

    Args:
        sigma: step size at the start, > 0.
        elite_ratio: share of the population in the elite, in (0, 1].
        sigma_decay: factor on the step size after each step, in (0, 1].
        sigma_min: lower bound of each standard deviation, >= 0.

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> SepCMAES(sigma=0.1).weights(torch.arange(4.0)).first.sum()
        tensor(1., dtype=torch.float64)

    References:
        R. Ros and N. Hansen, "A Simple Modification in CMA-ES Achieving Linear Time and Space Complexity", 2008, PPSN.
    """

    vectors: ClassVar[tuple[str, ...]] = ("_std", "_path_sigma", "_path_c")

    @checked
    def __init__(
        self,
        sigma: PositiveFloat = 0.05,
        elite_ratio: PositiveFraction = 0.5,
        sigma_decay: PositiveFraction = 1.0,
        sigma_min: NonNegativeFloat = 0.0,
    ) -> None:
        self.elite_ratio = elite_ratio
        super().__init__(sigma, sigma_decay, sigma_min)

    def restart(self) -> None:
        """Reset paths and covariance."""
        super().restart()
        self._path_sigma: Tensor | None = None
        self._path_c: Tensor | None = None
        self._step_size: float | None = None  # sigma

    def weights(self, fitness: Tensor) -> Weights:
        """Return logarithmic weights of the elite, for the noise and for its squares."""
        weights = ranked(fitness, self._by_rank(len(fitness)).to(fitness.device))
        return Weights(weights, weights)

    def _by_rank(self, num: int) -> Tensor:
        elite = max(1, int(self.elite_ratio * num))
        positive = math.log(elite + 1) - torch.arange(1, elite + 1, dtype=torch.float64).log()
        return torch.cat([positive / positive.sum(), torch.zeros(num - elite, dtype=torch.float64)])

    def gradient(self, first: Tensor) -> Tensor:
        """Return the difference between the mean and the weighted mean of the elite."""
        return -self.std * first

    def adapt(self, std: Tensor, first: Tensor, second: Tensor, told: float) -> Tensor:
        """Update the paths, then the covariance, then the step size."""
        # The mean over several populations is as much shorter as one over so many more members would be.
        dim, mu_eff = len(std), told / float(self._by_rank(self._size).square().sum())
        c_sigma = (mu_eff + 2) / (dim + mu_eff + 3)
        damping = 1 + 2 * max(0.0, math.sqrt((mu_eff - 1) / (dim + 1)) - 1) + c_sigma
        c_path = 4 / (dim + 4)
        c_one, c_mu = _rates(dim, mu_eff)
        chi = math.sqrt(dim) * (1 - 1 / (4 * dim) + 1 / (21 * dim**2))

        step_size = self.sigma if self._step_size is None else self._step_size
        root = std / step_size  # square root of the covariance
        path_sigma, path_c = (
            torch.zeros_like(std) if p is None else p.to(std) for p in (self._path_sigma, self._path_c)
        )
        path_sigma = (1 - c_sigma) * path_sigma + math.sqrt(c_sigma * (2 - c_sigma) * mu_eff) * first
        length = float(path_sigma.norm())
        fresh = 1 - (1 - c_sigma) ** (2 * (self._steps + 1))  # the path starts at zero
        moving = length / math.sqrt(fresh) < (1.4 + 2 / (dim + 1)) * chi
        path_c = (1 - c_path) * path_c + moving * math.sqrt(c_path * (2 - c_path) * mu_eff) * root * first
        kept = 1 + c_one * (1 - moving) * c_path * (2 - c_path) - c_one - c_mu
        covariance = kept * root.square() + c_one * path_c.square() + c_mu * root.square() * second

        self._path_sigma, self._path_c = path_sigma, path_c
        self._step_size = step_size * (math.exp(c_sigma / damping * (length / chi - 1)) * self.sigma_decay)
        return covariance.sqrt() * (self._step_size / self.sigma_decay)  # the base class multiplies by the decay

    def state_dict(self) -> dict[str, Any]:
        """Return the learned state, in tensors and numbers."""
        step_size = self.sigma if self._step_size is None else self._step_size
        paths = {"path_sigma": self._path_sigma, "path_c": self._path_c, "step_size": step_size}
        return {**super().state_dict(), **paths}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._path_sigma, self._path_c = state["path_sigma"], state["path_c"]
        self._step_size = state["step_size"]


def _rates(dim: int, mu_eff: float) -> tuple[float, float]:
    """Return the learning rates of the covariance, from its path and from the population, for a diagonal one."""
    c_one = 2 / ((dim + 1.3) ** 2 + mu_eff)
    share = min(1.0, (2 * mu_eff - 1) / ((dim + 2) ** 2 + mu_eff))
    c_mu = (dim + 2) / 3 * (2 / (mu_eff * (dim + math.sqrt(2)) ** 2) + (1 - 1 / mu_eff) * share)
    return c_one, min(c_mu, 1 - c_one)
