"""OpenAI-ES: the gradient of the smoothed fitness, with one standard deviation for all weights."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_bpfree.core.arguments import NonNegativeFloat, PositiveFloat, PositiveFraction, checked
from lightning_bpfree.methods.evolution_strategy.search.algorithm import SearchAlgorithm, Weights
from lightning_bpfree.methods.evolution_strategy.search.fitness_shaping import Shaping, shaped


class OpenAIES(SearchAlgorithm):
    """Descends ``sum_i f_i z_i / (N sigma)``, an estimate of the gradient of ``E f(mean + sigma z)``.

    With ``shaping="raw"`` and mirrored members the estimate is unbiased. Its usual optimizer is Adam with a learning
    rate of about 0.01; ``SGD(lr=1)`` takes the plain step.

    Args:
        sigma: standard deviation of the noise, > 0.
        shaping: ``"centered_rank"``, ``"z_score"`` or ``"raw"``, see :func:`shaped`.
        sigma_decay: factor on sigma after each step of the optimizer, in (0, 1].
        sigma_min: lower bound of sigma, >= 0.

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> import torch
        >>> es, w = OpenAIES(sigma=0.1, shaping="raw"), torch.tensor([3.0, -1.0])
        >>> population = es.ask({"w": w}, size=2000, seed=0)
        >>> fitness = torch.stack([member["w"].square().sum() / 2 for member in population])
        >>> bool((es.tell(population, fitness)["w"] - w).norm() < 0.3)  # the gradient of |w|^2 / 2 is w
        True

    References:
        T. Salimans, J. Ho, X. Chen, S. Sidor and I. Sutskever, "Evolution Strategies as a Scalable Alternative to
        Reinforcement Learning", 2017, arXiv 1703.03864.
    """

    per_coordinate: ClassVar[bool] = False
    mirrored: ClassVar[bool] = True

    @checked
    def __init__(
        self,
        sigma: PositiveFloat = 0.05,
        shaping: Shaping = "centered_rank",
        sigma_decay: PositiveFraction = 1.0,
        sigma_min: NonNegativeFloat = 0.0,
    ) -> None:
        self.shaping = shaping
        super().__init__(sigma, sigma_decay, sigma_min)

    @property
    def ranks_fitness(self) -> bool:
        """Whether the fitness is shaped by ranks."""
        return self.shaping == "centered_rank"

    def weights(self, fitness: Tensor) -> Weights:
        """Return shaped fitness divided by N."""
        return Weights(shaped(fitness, self.shaping) / len(fitness))

    def gradient(self, first: Tensor) -> Tensor:
        """Return the mean of shaped fitness times noise, divided by sigma."""
        return first / float(self.std)
