"""Gaussian noise for populations: slices of one table, or independent draws for each direction."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import PositiveInt, checked
from lightning_bpfree.core.seeds import mix

NoiseKind = Literal["table", "independent"]

TABLE_SIZE = 1 << 23  # 32 MiB in float32
BLOCK = 1 << 20  # a vector longer than this takes several slices
_TABLE_SEED = 20170310


@functools.lru_cache(maxsize=2)
def noise_table(device: torch.device) -> Tensor:
    """Return the table: the same standard normal numbers in every process and on every device, drawn once.

    It is drawn on the CPU, so that equal seeds give equal noise on different devices, and in float32 whatever torch's
    default is: a Trainer with ``precision="64-true"`` or ``"bf16-true"`` changes the default while it calls the step.
    """
    generator = torch.Generator().manual_seed(_TABLE_SEED)
    return torch.empty(TABLE_SIZE, dtype=torch.float32).normal_(generator=generator).to(device)


class Noise:
    """``num`` standard normal vectors of length ``dim``, a function of ``seed`` and ``k`` alone, remade at each call.

    Args:
        dim: length of a vector, at least 1.
        num: how many vectors there are.
        seed: any integer.
        kind: ``"table"``: a vector is a slice of a table of 2^23 normal numbers, at an offset that the seed chooses
            (several slices above 2^20 coordinates). No number is drawn, which is many times faster; slices that overlap
            share numbers, at different coordinates. ``"independent"``: every number is drawn again, by a generator for
            each ``k`` (CPU and CUDA generators differ).
        device: where the vectors are.
        dtype: float32 or float64.

    Raises:
        ValueError: for an unknown kind.

    Examples:
        >>> noise = Noise(dim=3, num=2, seed=0)
        >>> torch.equal(noise.row(1), noise.rows([0, 1])[1])
        True

    References:
        T. Salimans, J. Ho, X. Chen, S. Sidor and I. Sutskever, "Evolution Strategies as a Scalable Alternative to
        Reinforcement Learning", 2017, arXiv 1703.03864 (the table).
    """

    @checked
    def __init__(
        self,
        dim: PositiveInt,
        num: PositiveInt,
        seed: int,
        kind: NoiseKind = "table",
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dim, self.num, self.seed, self.kind, self.dtype = dim, num, seed, kind, dtype
        self.device = torch.device("cpu") if device is None else device
        self._lengths = [min(BLOCK, dim - start) for start in range(0, dim, BLOCK)]
        generator = torch.Generator().manual_seed(mix(seed))
        shape = (num, len(self._lengths))
        self._offsets = torch.randint(0, TABLE_SIZE - BLOCK, shape, generator=generator)
        self._starts: list[list[int]] = self._offsets.tolist()

    def row(self, k: int) -> Tensor:
        """Return vector ``k``, shape ``(dim,)``. Do not write to it: it can be a view of the table."""
        if not 0 <= k < self.num:
            raise IndexError(f"vector {k} of {self.num}")
        if self.kind == "independent":
            generator = torch.Generator(self.device).manual_seed(mix(self.seed, k))
            return torch.empty(self.dim, dtype=self.dtype, device=self.device).normal_(generator=generator)
        table = noise_table(self.device)
        slices = [table[o : o + n] for o, n in zip(self._starts[k], self._lengths, strict=True)]
        return (slices[0] if len(slices) == 1 else torch.cat(slices)).to(self.dtype)

    def rows(self, ks: Sequence[int]) -> Tensor:
        """Return vectors ``ks``, shape ``(len(ks), dim)``."""
        if self.kind == "table" and len(self._lengths) == 1:
            index = self._offsets[list(ks), 0].to(self.device)
            return noise_table(self.device).unfold(0, self.dim, 1).index_select(0, index).to(self.dtype)
        return torch.stack([self.row(k) for k in ks])
