"""A population around a mean: members for a loop, stacks for vmap, and weighted sums of their noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_bpfree.core.params import Params
from lightning_bpfree.methods.evolution_strategy.population.coordinates import Coordinates
from lightning_bpfree.methods.evolution_strategy.population.noise import Noise, NoiseKind

_ROWS = 1 << 18  # numbers of noise held at once while sums are taken: in cache, and flat in the population's size


class Population(ABC):
    """``N`` members ``mean + std s_i z_k``; mirrored ones come in pairs of one direction and signs +1 and -1.

    Member ``i`` has the direction ``k = i`` and the sign +1; of a mirrored population, the second half has the
    directions of the first and the sign -1.

    Args:
        size: number of members, at least 2; even if mirrored.
        mirrored: whether members come in pairs.
        noise: the vectors of the directions.
        coordinates: the searched coordinates.

    Raises:
        ValueError: if the size does not fit.
    """

    def __init__(self, size: int, mirrored: bool, noise: Noise, coordinates: Coordinates) -> None:
        self.size, self.mirrored, self.noise, self.coordinates = size, mirrored, noise, coordinates
        self.num_directions = directions_of(size, mirrored)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Params:
        return self.member(i)

    def __iter__(self) -> Iterator[Params]:
        return (self.member(i) for i in range(self.size))

    def direction(self, i: int) -> tuple[int, float]:
        """Return the direction's index of member ``i``, and its sign."""
        if not 0 <= i < self.size:
            raise IndexError(f"member {i} of {self.size}")
        return (i, 1.0) if i < self.num_directions else (i - self.num_directions, -1.0)

    @abstractmethod
    def member(self, i: int) -> Params:
        """Return the parameters of member ``i``."""

    @abstractmethod
    def stack(self, members: Sequence[int]) -> Params:
        """Return the parameters of several members, ``(len(members), *shape)`` for each name."""

    @abstractmethod
    def moments(self, first: Tensor, second: Tensor | None = None) -> list[Tensor]:
        """Return ``sum_i a_i s_i z_i``, and ``sum_i b_i z_i^2`` if ``b`` is given, in one pass over the noise.

        Args:
            first: ``a``, shape ``(N,)``.
            second: ``b``, shape ``(N,)``.

        Returns:
            Vectors over the searched coordinates, shape ``(dim,)``.
        """

    def in_turn(self, members: Sequence[int]) -> Iterator[Params]:
        """Yield the members one by one; each is valid until the next is requested, since they may share memory."""
        return (self.member(i) for i in members)

    def unflatten(self, flat: Tensor) -> Params:
        """Return a vector over the searched coordinates, shape ``(dim,)``, as named tensors; pruned ones are zero."""
        return self.coordinates.unflatten(flat)

    def _of_directions(self, weights: Tensor, odd: bool) -> Tensor:
        """Sum up the weights of the members that share a direction, with their signs if ``odd``."""
        if not self.mirrored:
            return weights
        plus, minus = weights.split(self.num_directions)
        folded: Tensor = plus - minus if odd else plus + minus
        return folded

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        length = max(1, _ROWS // self.noise.dim)
        for start in range(0, self.num_directions, length):
            ks = range(start, min(start + length, self.num_directions))
            rows = self.noise.row(start).unsqueeze(0) if len(ks) == 1 else self.noise.rows(ks)
            yield slice(ks.start, ks.stop), rows


class FullRankPopulation(Population):
    """Members whose noise has an independent number for each searched coordinate.

    Args:
        params: the mean, named tensors.
        size: number of members.
        seed: seed of the noise.
        std: standard deviation, one number or a vector of shape ``(dim,)``.
        mirrored: whether members come in pairs.
        masks: see :class:`Coordinates`; noise is drawn for survivors only.
        noise: see :class:`Noise`.

    Examples:
        >>> population = FullRankPopulation({"w": torch.ones(3)}, size=2, seed=0, std=0.1)
        >>> torch.allclose(population[0]["w"] + population[1]["w"], torch.tensor(2.0))
        True
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        size: int,
        seed: int,
        std: Tensor | float,
        *,
        mirrored: bool = True,
        masks: Mapping[str, Tensor] | None = None,
        noise: NoiseKind = "table",
    ) -> None:
        num = directions_of(size, mirrored)
        coordinates = Coordinates(params, masks)
        vectors = Noise(coordinates.dim, num, seed, noise, coordinates.device, coordinates.dtype)
        super().__init__(size, mirrored, vectors, coordinates)
        self.mean, self.std = coordinates.flatten(params), std

    def member(self, i: int) -> Params:
        """Return the parameters of member ``i``."""
        return self.coordinates.unflatten(self._moved(i, torch.empty_like(self.mean)))

    def in_turn(self, members: Sequence[int]) -> Iterator[Params]:
        """Yield the members one by one, all in the same memory where that is possible."""
        flat = torch.empty_like(self.mean)
        shared = self.coordinates.views(flat)
        for i in members:
            self._moved(i, flat)
            yield self.coordinates.unflatten(flat) if shared is None else shared

    def _moved(self, i: int, out: Tensor) -> Tensor:
        k, sign = self.direction(i)
        row = self.noise.row(k)
        if isinstance(self.std, Tensor):
            return torch.addcmul(self.mean, self.std, row, value=sign, out=out)
        return torch.add(self.mean, row, alpha=sign * self.std, out=out)

    def stack(self, members: Sequence[int]) -> Params:
        """Return the parameters of several members, ``(len(members), *shape)`` for each name."""
        ks, signs = zip(*(self.direction(i) for i in members), strict=True)
        rows = self.noise.rows(ks)
        rows.mul_(torch.tensor(signs, dtype=rows.dtype, device=rows.device).unsqueeze(1))
        return self.coordinates.unflatten(rows.mul_(self.std).add_(self.mean))

    def moments(self, first: Tensor, second: Tensor | None = None) -> list[Tensor]:
        """Return ``sum_i a_i s_i z_i``, and ``sum_i b_i z_i^2`` if ``b`` is given."""
        total = torch.zeros_like(self.mean)
        odd = self._of_directions(first, odd=True).to(total.device, total.dtype)
        squares = None if second is None else torch.zeros_like(self.mean)
        even = odd if second is None else self._of_directions(second, odd=False).to(odd)
        for part, rows in self._chunks():
            if len(rows) > 1:
                total += odd[part] @ rows
                if squares is not None:
                    squares += even[part] @ rows.square_()
                continue
            total.add_(rows[0], alpha=float(odd[part]))
            if squares is not None:
                squares.addcmul_(rows[0], rows[0], value=float(even[part]))
        return [total] if squares is None else [total, squares]


def directions_of(size: int, mirrored: bool) -> int:
    """Return the number of directions of a population; raise ValueError if it cannot have this size."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise ValueError(f"population_size={size!r}: give a whole number of at least 2.")
    if mirrored and size % 2:
        raise ValueError(
            f"population_size={size} is odd, but mirrored members come in pairs: give {size + 1}, or mirrored=False."
        )
    return size // 2 if mirrored else size
