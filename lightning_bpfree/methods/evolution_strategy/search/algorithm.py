"""The interface of search distributions: ask for a population, tell its fitness, step."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import NonNegativeFloat, PositiveFloat, PositiveFraction, PositiveInt, checked
from lightning_bpfree.core.params import Params
from lightning_bpfree.methods.evolution_strategy.population.low_rank_population import LowRankPopulation
from lightning_bpfree.methods.evolution_strategy.population.noise import NoiseKind
from lightning_bpfree.methods.evolution_strategy.population.population import FullRankPopulation, Population

LARGEST_STD = 1e6  # a coordinate without effect on the fitness may let its deviation grow: not until it overflows


class Weights(NamedTuple):
    """Weights of the members: of their noise, and of its squares.

    Args:
        first: shape ``(N,)``.
        second: shape ``(N,)``; None if the algorithm adapts no standard deviation.
    """

    first: Tensor
    second: Tensor | None = None


class SearchAlgorithm(ABC):
    """A normal distribution around the parameters that learns from the fitness of samples; smaller is better.

    :meth:`ask` samples a population. :meth:`tell` turns its fitness into a search gradient for the mean, and records
    statistics for the standard deviation, which :meth:`step` updates. The caller moves the mean, by an optimizer. Plain
    gradient descent with learning rate 1 gives the update in the literature, unless a docstring says otherwise.

    Subclasses define how fitness becomes weights, how the weighted sum of noise becomes a gradient, and how the
    deviation adapts. They only see sums of noise, so that noise need not be stored.

    Args:
        sigma: standard deviation at the start, > 0, in units of the parameters.
        sigma_decay: factor on the standard deviation after each step, in (0, 1].
        sigma_min: lower bound of the standard deviation, >= 0.

    Raises:
        ValueError: for arguments out of range.
    """

    per_coordinate: ClassVar[bool] = True
    """Whether every coordinate has its own standard deviation."""
    mirrored: ClassVar[bool] = False
    """Whether populations are mirrored unless asked otherwise."""
    vectors: ClassVar[tuple[str, ...]] = ("_std",)
    """Attributes that hold a number for each coordinate, or None."""

    @checked
    def __init__(
        self, sigma: PositiveFloat, sigma_decay: PositiveFraction = 1.0, sigma_min: NonNegativeFloat = 0.0
    ) -> None:
        self.sigma, self.sigma_decay, self.sigma_min = sigma, sigma_decay, sigma_min
        self.check()
        self.restart()

    def check(self) -> None:
        """Raise ValueError for incompatible settings."""
        if self.sigma_min > self.sigma:
            raise ValueError(
                f"{type(self).__name__}: sigma_min={self.sigma_min!r}: give a floor from 0 to sigma={self.sigma!r}."
            )

    def __repr__(self) -> str:
        names = inspect.signature(type(self)).parameters
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def restart(self) -> None:
        """Forget everything that was learned: the standard deviation is ``sigma`` again."""
        self._std: Tensor | None = None
        self._steps = 0
        self.layout: dict[str, int] | None = None  # coordinates of each parameter, in the order of the vectors
        self._size = 2  # of the last population
        self._moments: list[Tensor] | None = None
        self._told = 0

    # --- what an algorithm is ---

    @property
    def ranks_fitness(self) -> bool:
        """Whether only the order of the fitness matters, so that an infinite value is allowed."""
        return True

    @abstractmethod
    def weights(self, fitness: Tensor) -> Weights:
        """Return the weights of the members, for fitness of shape ``(N,)``; smaller is better."""

    @abstractmethod
    def gradient(self, first: Tensor) -> Tensor:
        """Return the search gradient of the mean, to be descended.

        Args:
            first: the sum of noise under the first weights, shape ``(dim,)``.
        """

    def adapt(self, std: Tensor, first: Tensor, second: Tensor, told: float) -> Tensor:
        """Return the new standard deviation, of an algorithm whose weights have a second part.

        Args:
            std: the old one, shape ``(dim,)``.
            first: the sum of noise under the first weights, shape ``(dim,)``.
            second: the sum of squared noise under the second weights, shape ``(dim,)``.
            told: how many populations the two are means of.
        """
        return std

    # --- the cycle ---

    @property
    def steps(self) -> int:
        """How often the standard deviation has adapted."""
        return self._steps

    @property
    def std(self) -> Tensor:
        """The standard deviation: shape ``(dim,)``, or ``()`` where one number serves all coordinates."""
        return torch.tensor(self.sigma, dtype=torch.float64) if self._std is None else self._std

    @checked
    def ask(
        self,
        params: Mapping[str, Tensor],
        size: int,
        seed: int,
        *,
        mirrored: bool | None = None,
        rank: PositiveInt | None = None,
        masks: Mapping[str, Tensor] | None = None,
        noise: NoiseKind = "table",
    ) -> Population:
        """Return a population around ``params``; its members are iterated as named tensors.

        Args:
            params: the mean, named tensors.
            size: number of members.
            seed: seed of the noise; another one for each generation.
            mirrored: whether members come in pairs of opposite noise; None for the algorithm's default.
            rank: rank of the noise of weights; None for full rank. Needs an algorithm with one standard deviation.
            masks: name -> boolean tensor, False where a coordinate is pruned: zero, and not searched.
            noise: ``"table"`` or ``"independent"``, see :class:`Noise`.

        Raises:
            ValueError: if the arguments are incompatible.
        """
        mirrored = self.mirrored if mirrored is None else mirrored
        self._size = size
        if rank is not None:
            self.check_low_rank(masks)
            return LowRankPopulation(params, size, seed, float(self.std), rank=rank, mirrored=mirrored, noise=noise)
        population = FullRankPopulation(params, size, seed, 0.0, mirrored=mirrored, masks=masks, noise=noise)
        self._rearrange(population.coordinates.layout)
        population.std = self._std_of(population)
        return population

    def check_low_rank(self, masks: Mapping[str, Tensor] | None = None) -> None:
        """Raise ValueError if the algorithm or masks do not support low-rank noise."""
        if self.per_coordinate:
            raise ValueError(
                f"rank with {type(self).__name__}: one standard deviation per weight needs noise of full rank. "
                "Use OpenAIES, or rank=None."
            )
        if masks is not None:
            raise ValueError("rank with masks: masked noise does not have low rank. Use rank=None.")

    def _std_of(self, population: FullRankPopulation) -> Tensor | float:
        if not self.per_coordinate:
            return float(self.std)
        mean = population.mean
        if self._std is None:
            self._std = torch.full_like(mean, self.sigma)
        self._std = self._std.to(mean.device, mean.dtype)
        return self._std

    def _rearrange(self, layout: dict[str, int]) -> None:
        """Keep the state of parameters that are still searched; others start again."""
        before, self.layout = self.layout, layout
        if before is None or before == layout:
            return
        for name in self.vectors:
            vector, fresh = getattr(self, name), self.sigma if name == "_std" else 0.0
            if vector is None or not vector.dim():
                continue
            parts = dict(zip(before, vector.split(list(before.values())), strict=True))
            kept = [
                parts[key] if before.get(key) == size else vector.new_full((size,), fresh)
                for key, size in layout.items()
            ]
            setattr(self, name, torch.cat(kept))

    def tell(self, population: Population, fitness: Tensor) -> Params:
        """Return the search gradient of the mean as named tensors; pruned coordinates have none.

        If called for several populations before the next :meth:`step`, the algorithm averages over them.

        Args:
            population: from :meth:`ask`, with no :meth:`step` in between.
            fitness: one number per member, shape ``(N,)``; smaller is better.
        """
        weights = self.weights(fitness)
        moments = population.moments(weights.first, weights.second)
        if weights.second is not None:
            before = [torch.zeros_like(moment) for moment in moments] if self._moments is None else self._moments
            self._moments = [a + b for a, b in zip(before, moments, strict=True)]
        self._told += 1
        return population.unflatten(self.gradient(moments[0]))

    def step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Adapt the standard deviation to the fitness told since the last step; do nothing if there was none.

        Args:
            reduce: takes the mean of a tensor over ranks whose populations were measured on different data.
        """
        std, told, moments = self.std, torch.tensor(float(self._told), dtype=torch.float32), self._moments
        if reduce is not None:  # a rank that was told nothing takes part all the same
            told = reduce(told)
            if self.per_coordinate:
                moments = [torch.zeros_like(std), torch.zeros_like(std)] if moments is None else moments
                moments = [reduce(moment) for moment in moments]
        if told == 0:
            return
        if moments is not None:
            first, second = (moment / told for moment in moments)
            std = self.adapt(std, first, second, float(told))
        self._std = (std * self.sigma_decay).clamp(self.sigma_min, LARGEST_STD)
        self._steps += 1
        self._moments, self._told = None, 0

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Return the learned state, in tensors and numbers; later calls of :meth:`tell` do not change it."""
        return {"std": None if self._std is None else self._std.clone(), "steps": self._steps, "layout": self.layout}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.restart()
        self._std, self._steps, self.layout = state["std"], state["steps"], state["layout"]
