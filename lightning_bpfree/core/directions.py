"""Random directions in parameter space that are regenerated from a seed instead of being stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import PositiveInt, checked
from lightning_bpfree.core.params import Params, count, real_view, widen
from lightning_bpfree.core.random_numbers.philox import Drawn, Philox
from lightning_bpfree.core.seeds import mix

Distribution = Literal["gaussian", "rademacher"]
Generator = Literal["device", "portable"]
_STACKED = 1 << 18  # numbers
_AHEAD = 1 << 14  # numbers: of a small module, several directions are drawn at once and kept, 64 KiB at most


class Directions:
    """``num`` random directions ``v_k`` with the shapes of ``like``, which depend on ``seed`` and ``k`` alone.

    Every direction has independent coordinates of mean 0 and variance 1, hence ``E[v v^T] = I``; a complex number has
    two coordinates. The drawing scheme is fixed: one generator per ``k`` on the tensor's device, tensors in the order
    of ``like``, in float32 (float64 for float64 parameters). Equal seeds give equal directions on the same kind of
    device; generators differ between CPU and CUDA, and between GPU models. ``generator="portable"`` gives the same
    bits on all devices, by a counter-based generator in integer operations. For a module with fewer than 8,192
    parameters, it draws several directions at a time, in the order of ``k``, and caches up to 64 KiB of them.

    Args:
        like: named tensors that give the shapes, dtypes and devices of the directions.
        num: number of directions ``K``, at least 1.
        seed: any integer.
        distribution: ``"gaussian"`` for N(0, 1), ``"rademacher"`` for fair signs.
        generator: ``"device"``, that of the tensors' device, or ``"portable"``.

    Raises:
        ValueError: for ``num < 1``, an unknown distribution or generator.

    Examples:
        >>> directions = Directions({"w": torch.zeros(3)}, num=2, seed=0)
        >>> torch.equal(directions[1]["w"], directions[1]["w"])
        True
    """

    @checked
    def __init__(
        self,
        like: Mapping[str, Tensor],
        num: PositiveInt,
        seed: int,
        distribution: Distribution = "gaussian",
        generator: Generator = "device",
    ) -> None:
        self.like, self.num, self.seed, self.distribution, self.generator = like, num, seed, distribution, generator
        self._ahead: tuple[range, Tensor] | None = None

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, k: int) -> Params:
        return {name: rows[0] for name, rows in self.stack([k]).items()}

    def __iter__(self) -> Iterator[Params]:
        return (self[k] for k in range(self.num))

    def stack(self, ks: Sequence[int]) -> Params:
        """Return the directions ``ks`` in one tensor per name, of shape ``(len(ks), *shape)``."""
        return dict(zip(self.like, self._rows(ks), strict=True))

    def moved(self, k: int, params: Mapping[str, Tensor], sigma: float) -> Params:
        """Return ``params + sigma v_k``; memory holds only the result and one drawn tensor at a time."""
        generators = self._generators(k)
        moved = {}
        for name, like in self.like.items():
            draw = self._draw(like, generators)
            moved[name] = draw.mul_(sigma).add_(params[name]).to(params[name].dtype)
        return moved

    def part(self, k: int, name: str) -> Tensor:
        """Return one tensor of a direction, drawn alone; requires the portable generator, which can start anywhere."""
        if self.generator != "portable":
            raise ValueError(f"Directions: generator={self.generator!r}: one tensor alone needs 'portable'.")
        like, stream = self.like[name], self._stream(k)
        before = list(self.like)[: list(self.like).index(name)]
        stream.skip(count({other: self.like[other] for other in before}))
        return self._draw(like, stream).to(like.dtype)

    def gram(self) -> Tensor:
        """Return the matrix of inner products ``<v_i, v_j>``, ``(K, K)`` in float64 on the CPU.

        Directions are drawn tensor by tensor: memory holds ``K`` copies of the largest tensor, not of the module.
        """
        total = torch.zeros(self.num, self.num, dtype=torch.float64)
        for rows in self._rows(range(self.num)):
            flat = widen(real_view(rows)).reshape(self.num, -1)  # also for tensors without dimensions
            total += (flat @ flat.T).to("cpu", torch.float64)
        return total

    def squared_norms(self) -> Tensor:
        """Return ``|v_k|^2``, shape ``(K,)`` in float64 on the CPU."""
        norms = [sum(float(widen(real_view(v)).square().sum()) for v in direction.values()) for direction in self]
        return torch.tensor(norms, dtype=torch.float64)

    def combine(self, coefficients: Sequence[float] | Tensor, scale: Tensor | None = None) -> Params:
        """Return ``scale * sum_k c_k v_k``, in the dtypes of ``like``, holding one direction's tensor at a time.

        Args:
            coefficients: ``c_k``, shape ``(K,)``.
            scale: a scalar that multiplies the sum, such as the loss scale of mixed precision.
        """
        weights = coefficients.tolist() if isinstance(coefficients, Tensor) else list(coefficients)
        if self.generator == "portable":
            return self._combined_in_stacks(weights, scale)
        generators = [self._generators(k) for k in range(self.num)]
        combined: Params = {}
        for name, like in self.like.items():
            total = torch.zeros(like.shape, dtype=accumulator_dtype(like), device=like.device)
            for weight, generator in zip(weights, generators, strict=True):
                total.add_(self._draw(like, generator).to(like.dtype), alpha=weight)
            combined[name] = (total if scale is None else total.mul_(scale)).to(like.dtype)
        return combined

    def _combined_in_stacks(self, weights: list[float], scale: Tensor | None) -> Params:
        """Combine directions drawn several at a time, but added one by one: how many does not change the sum."""
        totals = {n: torch.zeros(t.shape, dtype=accumulator_dtype(t), device=t.device) for n, t in self.like.items()}
        size = max(1, _STACKED // max(1, count(self.like)))
        for start in range(0, self.num, size):
            ks = range(start, min(start + size, self.num))
            for (name, total), rows in zip(totals.items(), self._rows(ks), strict=True):
                for k, row in zip(ks, rows, strict=True):
                    total.add_(row.to(self.like[name].dtype), alpha=weights[k])
        scaled = totals if scale is None else {name: total.mul_(scale) for name, total in totals.items()}
        return {name: total.to(self.like[name].dtype) for name, total in scaled.items()}

    def _rows(self, ks: Sequence[int]) -> Iterator[Tensor]:
        """Yield the directions ``ks`` tensor by tensor, ``(len(ks), *shape)``, drawn in place: no copy beside them."""
        together: Philox | Drawn | None = None
        if self.generator == "portable" and len(ks):
            together = self._stream(ks[0]) if len(ks) == 1 else self._philox(ks)
        generators = [] if together else [self._generators(k) for k in ks]
        for like in self.like.values():
            rows = torch.empty((len(ks), *like.shape), dtype=accumulator_dtype(like), device=like.device)
            if together is not None:
                together.fill(real_view(rows))
            for i, generator in enumerate(generators):
                self._fill(rows[i], generator)
            yield rows.to(like.dtype)

    def _philox(self, ks: Sequence[int]) -> Philox:
        for k in ks:
            if not 0 <= k < self.num:
                raise IndexError(f"direction {k} of {self.num}")
        return Philox([mix(self.seed, k) for k in ks], self.distribution, count(self.like))

    def _stream(self, k: int) -> Philox | Drawn:
        """Return the numbers of one direction; for a small module, with others behind it if this one is in turn."""
        total, devices = count(self.like), {like.device for like in self.like.values()}
        if not 0 < total <= _AHEAD // 2 or len(devices) > 1:
            return self._philox([k])
        if self._ahead is None or k not in self._ahead[0]:
            in_turn = self._ahead is not None and self._ahead[0].stop == k
            ks = range(k, max(k + 1, min(self.num, k + _AHEAD // total) if in_turn else 0))
            self._ahead = (
                ks,
                self._philox(ks).fill(torch.empty(len(ks), total, dtype=torch.float32, device=devices.pop())),
            )
        ks, numbers = self._ahead
        return Drawn(numbers[k - ks.start])

    def _generators(self, k: int) -> Philox | Drawn | dict[torch.device, torch.Generator]:
        if self.generator == "portable":
            return self._stream(k)
        if not 0 <= k < self.num:
            raise IndexError(f"direction {k} of {self.num}")
        generators = {}
        for device in {like.device for like in self.like.values()}:
            generators[device] = torch.Generator(device)
            generators[device].manual_seed(mix(self.seed, k))
        return generators

    def _draw(self, like: Tensor, generators: Philox | Drawn | dict[torch.device, torch.Generator]) -> Tensor:
        draw = torch.empty(like.shape, dtype=accumulator_dtype(like), device=like.device)
        self._fill(draw, generators)
        return draw

    def _fill(self, draw: Tensor, generators: Philox | Drawn | dict[torch.device, torch.Generator]) -> None:
        draw = real_view(draw)
        if isinstance(generators, Philox | Drawn):
            generators.fill(draw.unsqueeze(0))
            return
        generator = generators[draw.device]
        if self.distribution == "gaussian":
            draw.normal_(generator=generator)
        else:
            draw.copy_(_signs(draw.numel(), draw.device, generator).view(draw.shape))


def accumulator_dtype(like: Tensor) -> torch.dtype:
    """Return the type in which directions are drawn and summed: float64 for float64, float32 for all others.

    Complex parameters take the complex type of that precision.
    """
    if like.is_complex():
        return torch.complex128 if like.dtype == torch.complex128 else torch.complex64
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _signs(num: int, device: torch.device, generator: torch.Generator) -> Tensor:
    # A random 64-bit word gives 64 signs, eight at a time from a table: several times faster than one draw a sign.
    words = torch.empty(-(-num // 64), dtype=torch.int64, device=device)
    words.random_(-(1 << 63), None, generator=generator)
    byte = torch.arange(256, device=device)
    table = ((byte.unsqueeze(1) >> torch.arange(8, device=device)) & 1).float().mul_(2).sub_(1)
    return table.index_select(0, words.view(torch.uint8).int()).flatten()[:num]
