"""Populations with low-rank noise: a member costs little more than inference on its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import PositiveInt, checked
from lightning_bpfree.core.params import Params
from lightning_bpfree.methods.evolution_strategy.population.coordinates import Coordinates
from lightning_bpfree.methods.evolution_strategy.population.noise import Noise, NoiseKind
from lightning_bpfree.methods.evolution_strategy.population.population import Population, directions_of


class Factors(NamedTuple):
    """Noise ``left @ right^T`` of a weight seen as a matrix, for ``C`` members; signs and scale are in ``left``.

    Args:
        left: shape ``(C, rows, rank)``.
        right: shape ``(C, columns, rank)``.
    """

    left: Tensor
    right: Tensor


class _Part(NamedTuple):
    """Where the noise of one parameter lies in a noise vector."""

    start: int
    rows: int
    columns: int
    factored: bool


class LowRankPopulation(Population):
    """Members whose noise is ``A B^T / sqrt(rank)`` for each weight of two or more dimensions, with normal A and B.

    A weight of shape ``(out, ...)`` counts as a matrix with ``out`` rows. Each entry of the noise has mean 0 and
    variance 1, and entries are uncorrelated, as those of full-rank noise; they are not independent. Parameters of one
    dimension, and matrices too small to benefit, get full-rank noise.

    Args:
        params: the mean, named tensors.
        size: number of members.
        seed: seed of the noise.
        std: standard deviation, one number: noise scaled coordinate by coordinate would not be of low rank.
        rank: rank of a weight's noise, at least 1.
        mirrored: whether members come in pairs.
        noise: see :class:`Noise`.

    Raises:
        ValueError: for a rank below 1, or complex parameters.

    Examples:
        >>> population = LowRankPopulation({"w": torch.zeros(6, 5)}, size=2, seed=0, std=0.1, rank=1)
        >>> int(torch.linalg.matrix_rank(population[0]["w"]))
        1

    References:
        B. Sarkar et al., "Evolution Strategies at the Hyperscale", 2025, arXiv 2511.16652.
    """

    @checked
    def __init__(
        self,
        params: Mapping[str, Tensor],
        size: int,
        seed: int,
        std: float,
        *,
        rank: PositiveInt,
        mirrored: bool = True,
        noise: NoiseKind = "table",
    ) -> None:
        complex_names = [name for name, tensor in params.items() if tensor.is_complex()]
        if complex_names:
            raise ValueError(f"rank={rank} with complex parameters ({', '.join(complex_names)}): use rank=None.")
        coordinates = Coordinates(params)
        self.params = coordinates.like
        self.rank, self.std = rank, std
        self.parts, dim = _layout(self.params, rank)
        num = directions_of(size, mirrored)
        vectors = Noise(dim, num, seed, noise, coordinates.device, coordinates.dtype)
        super().__init__(size, mirrored, vectors, coordinates)

    @property
    def factored(self) -> set[str]:
        """Names of the parameters whose noise is of low rank."""
        return {name for name, part in self.parts.items() if part.factored}

    def member(self, i: int) -> Params:
        """Return the parameters of member ``i``."""
        return {name: rows[0] for name, rows in self.stack([i]).items()}

    def stack(self, members: Sequence[int]) -> Params:
        """Return the parameters of several members, ``(len(members), *shape)`` for each name."""
        return self.split(members, set())[1]

    def split(self, members: Sequence[int], as_factors: set[str]) -> tuple[dict[str, Factors], Params]:
        """Return the noise of some parameters as factors, and of all others the stacked members themselves.

        Args:
            members: their indices.
            as_factors: names, among :attr:`factored`, of the parameters whose factors are wanted.
        """
        ks, signs = zip(*(self.direction(i) for i in members), strict=True)
        rows = self.noise.rows(ks)
        signed = torch.tensor(signs, dtype=rows.dtype, device=rows.device) * self.std
        factors, moved = {}, {}
        for name, part in self.parts.items():
            mean = self.params[name]
            if not part.factored:
                noise = rows[:, part.start : part.start + part.rows] * signed.unsqueeze(1)
                moved[name] = noise.view(len(rows), *mean.shape).to(mean.device).add_(mean).to(mean.dtype)
                continue
            left, right = self._factors(rows, part)
            left = left * (signed / self.rank**0.5).view(-1, 1, 1)
            if name in as_factors:
                factors[name] = Factors(left.to(mean.device), right.to(mean.device))
            else:
                whole = torch.baddbmm(mean.reshape(1, part.rows, -1).to(left.device, left.dtype), left, right.mT)
                moved[name] = whole.view(len(rows), *mean.shape).to(mean.device, mean.dtype)
        return factors, moved

    def _factors(self, rows: Tensor, part: _Part) -> tuple[Tensor, Tensor]:
        middle = part.start + part.rows * self.rank
        left = rows[:, part.start : middle].unflatten(1, (part.rows, self.rank))
        right = rows[:, middle : middle + part.columns * self.rank].unflatten(1, (part.columns, self.rank))
        return left, right

    def moments(self, first: Tensor, second: Tensor | None = None) -> list[Tensor]:
        """Return ``sum_i a_i s_i z_i``: one product of matrices for each weight."""
        if second is not None:
            raise NotImplementedError("low-rank noise has one standard deviation for all coordinates")
        folded = self._of_directions(first, odd=True).to(self.noise.device, self.noise.dtype)
        shapes = {name: (part.rows, part.columns if part.factored else 1) for name, part in self.parts.items()}
        total = {name: torch.zeros(shape, dtype=folded.dtype, device=folded.device) for name, shape in shapes.items()}
        for chunk, rows in self._chunks():
            for name, part in self.parts.items():
                if part.factored:
                    left, right = self._factors(rows, part)
                    left = left * (folded[chunk] / self.rank**0.5).view(-1, 1, 1)
                    left, right = left.transpose(0, 1).flatten(1), right.transpose(1, 2).flatten(0, 1)
                    total[name].addmm_(left, right)  # over members and ranks at once
                else:
                    total[name][:, 0] += folded[chunk] @ rows[:, part.start : part.start + part.rows]
        return [torch.cat([part.flatten() for part in total.values()])]


def _layout(params: Mapping[str, Tensor], rank: int) -> tuple[dict[str, _Part], int]:
    parts, start = {}, 0
    for name, like in params.items():
        rows, columns = (len(like), like[0].numel()) if like.dim() > 1 and len(like) else (like.numel(), 1)
        factored = like.dim() > 1 and (rows + columns) * rank < rows * columns
        length = (rows + columns) * rank if factored else like.numel()
        parts[name] = _Part(start, rows if factored else length, columns, factored)
        start += length
    return parts, start
