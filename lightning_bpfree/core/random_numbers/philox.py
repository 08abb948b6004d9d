"""Random numbers from a counter-based generator in integer operations: the same bits on every device.

Seeded generators of torch differ between CPU and CUDA, between GPU models, and perhaps between releases. Here every
number is computed from integers alone; Gaussian numbers come from a table.
"""

from __future__ import annotations

import functools
import hashlib
import statistics
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_CHUNK = 1 << 14  # counters at a time: fewer make short loops of many streams, and more leave the cache of a core
_LEVELS = 1 << 16
_TABLE_DIGEST = "68728df2e07a2d8ab2bdf322dc7ad5d1"
_NUMBERS_A_COUNTER = {"gaussian": 8, "rademacher": 128}
_HALF = np.uint64(32)
_LOWER = np.uint64(_MASK)
_SCHEDULE = np.arange(_ROUNDS, dtype=np.uint64).reshape(-1, 1, 1) * np.array(_WEYL, dtype=np.uint64).reshape(1, 2, 1)


class Philox:
    """Streams of random numbers by Philox4x32-10, one per seed; each depends on its seed alone.

    ``"gaussian"``: mean 0 and variance 1, the 65,536 midpoints of equally likely slices of N(0, 1), scaled so that the
    variance is 1 to seven digits; the largest is 4.33. ``"rademacher"``: fair signs.

    Args:
        seeds: seeds of the streams, any integers; their lowest 64 bits are the keys.
        kind: the distribution.
        expected: how many numbers of each stream will be drawn; drawing more is possible but slower.

    Examples:
        >>> first, again = Philox([7, 8], "gaussian", 5), Philox([7], "gaussian", 5)
        >>> torch.equal(first.fill(torch.empty(2, 5))[0], again.fill(torch.empty(1, 5))[0])
        True

    References:
        J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
    """

    def __init__(self, seeds: Sequence[int], kind: Literal["gaussian", "rademacher"], expected: int) -> None:
        self._keys = np.array([[s & _MASK, (s >> 32) & _MASK] for s in seeds], dtype=np.uint64)
        self.kind, self.expected, self.drawn = kind, expected, 0
        self._block: Tensor | None = None
        self._start = self._end = 0  # of the block, in numbers of a stream

    def skip(self, num: int) -> None:
        """Move to number ``num`` of every stream; the next call draws only the numbers it needs."""
        self.drawn, self.expected = num, 0

    def fill(self, rows: Tensor) -> Tensor:
        """Fill ``rows``, shape ``(streams, *shape)``, with the next numbers of every stream, and return it."""
        flat = rows.view(len(rows), -1) if rows.is_contiguous() else rows.new_empty(len(rows), rows[0].numel())
        done, total = 0, flat.shape[1]
        while done < total:
            block = self._numbers(total - done, rows.device)
            begin = self.drawn - self._start
            size = min(total - done, block.shape[1] - begin)
            part = block.narrow(1, begin, size)
            (flat if size == total else flat.narrow(1, done, size)).copy_(part)
            done, self.drawn = done + size, self.drawn + size
        return rows if rows.is_contiguous() else rows.copy_(flat.view(rows.shape))

    def _numbers(self, wanted: int, device: torch.device) -> Tensor:
        """Return the block that holds the next number, made on this device if it is not at hand."""
        if self._block is not None and self._block.device == device and self.drawn < self._end:
            return self._block
        each = _NUMBERS_A_COUNTER[self.kind]
        first, skipped = divmod(self.drawn, each)
        ahead = max(wanted, self.expected - self.drawn) + skipped
        num = min(-(-ahead // each), max(1, _CHUNK // len(self._keys)))
        table, bits = (_normal_table, 16) if self.kind == "gaussian" else (_sign_table, 8)
        pieces = self._pieces(first, num, device, bits)
        self._block = table(device).index_select(0, pieces).view(len(self._keys), -1)
        self._start, self._end = first * each, (first + num) * each
        return self._block

    def _pieces(self, first: int, num: int, device: torch.device, bits: int) -> Tensor:
        """Return the words of ``num`` counters in pieces of 8 or 16 bits, the lowest first, int32, stream by stream."""
        # Cut by looking at the same memory with another type.
        if device.type == "cpu" and first + num <= _MASK:
            words = philox_on_cpu(first, num, self._keys)
            return torch.from_numpy(words.view(np.uint8 if bits == 8 else np.uint16).ravel().astype(np.int32))
        keys = torch.from_numpy(self._keys.astype(np.int64)).to(device)
        found = philox(torch.arange(first, first + num, device=device), keys).int()
        return found.view(torch.uint8 if bits == 8 else torch.int16).view(-1).int().bitwise_and_((1 << bits) - 1)


class Drawn:
    """One of several streams that were drawn at once, with the methods of :class:`Philox`.

    Args:
        numbers: all numbers of the stream, one-dimensional.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers, self.drawn = numbers, 0

    def skip(self, num: int) -> None:
        """Move to number ``num``."""
        self.drawn = num

    def fill(self, rows: Tensor) -> Tensor:
        """Fill ``rows`` with the next numbers, and return it."""
        size = rows.numel()
        rows.copy_(self.numbers.narrow(0, self.drawn, size).view(rows.shape))
        self.drawn += size
        return rows


def philox(counters: Tensor, keys: Tensor) -> Tensor:
    """Return four random 32-bit words for every key and counter, int64 of shape ``(keys, counters, 4)``.

    Args:
        counters: int64, shape ``(counters,)``, at least 0.
        keys: lower and upper word of each key, int64 of shape ``(keys, 2)`` with values below 2^32.

    Examples:
        >>> zero = torch.zeros(1, dtype=torch.int64)  # the known answer of Random123
        >>> [hex(word) for word in philox(zero, torch.zeros(1, 2, dtype=torch.int64)).flatten().tolist()]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    shape, device = (2, len(keys), len(counters)), counters.device
    # Words 0 and 2 of the state, which are multiplied, and words 1 and 3, of which the upper halves may be anything.
    even, odd = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
    even[0], odd[0] = counters & _MASK, counters >> 32
    factors = torch.tensor(_MULTIPLIERS, dtype=torch.int64, device=device).view(2, 1, 1)
    weyl = torch.tensor(_WEYL, dtype=torch.int64, device=device).view(2, 1, 1)
    rounds = torch.arange(_ROUNDS, device=device).view(-1, 1, 1, 1)
    schedule = (keys.T.unsqueeze(-1) + rounds * weyl).bitwise_and_(_MASK)  # (rounds, 2, keys, 1)
    for key in schedule:
        product = (even * factors).flip(0)  # wraps at 64 bits, whose lower and upper halves are right all the same
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(_MASK)
        odd = product
    odd &= _MASK
    return torch.stack([even[0], odd[0], even[1], odd[1]], -1)


def philox_on_cpu(first: int, num: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Return the result of :func:`philox` for counters starting at ``first``, uint32 of shape ``(keys, num, 4)``.

    This computes the same integers in fewer and shorter operations: NumPy dispatches an operation in a third of
    torch's time, and has unsigned integers. The two halves of the state are swapped without a copy, and the first
    round is omitted, which multiplies only the counters.

    Args:
        first: the first counter, at least 0; ``first + num`` is below 2^32.
        num: number of counters.
        keys: lower and upper word of each key, shape ``(keys, 2)`` with values below 2^32.
    """
    size = len(keys) * num
    schedule = (keys.T.reshape(1, 2, -1) + _SCHEDULE) & _LOWER  # (rounds, 2, keys)
    counted = np.arange(first, first + num, dtype=np.uint64) * np.uint64(_MULTIPLIERS[0])
    if len(keys) > 1:
        schedule, counted = np.repeat(schedule, num, 2), np.tile(counted, len(keys))
    factors = _factors(size)
    even, upper, product, before = np.empty((4, 2, size), np.uint64)
    even[0] = schedule[0, 0]
    np.right_shift(counted, _HALF, even[1])
    np.bitwise_xor(even[1], schedule[0, 1], even[1])
    before[0], before[1] = counted, 0
    # Flat, so that an operation is one loop; all views are made beforehand, for they cost as much as short loops.
    e0, e1, u0, u1 = *even, *upper
    e, u, p, q = (part.ravel() for part in (even, upper, product, before))
    for one, other in schedule[1:]:
        np.multiply(e, factors, p)
        np.right_shift(p, _HALF, u)
        np.bitwise_xor(u, q, u)  # what is above the lower half of `q` is masked with the rest
        np.bitwise_xor(u1, one, e0)
        np.bitwise_xor(u0, other, e1)
        np.bitwise_and(e, _LOWER, e)
        p, q = q, p
    found = np.empty((size, 2), np.uint64)
    np.left_shift(q, _HALF, u)
    np.bitwise_or(e0, u1, found[:, 0])
    np.bitwise_or(e1, u0, found[:, 1])
    words: npt.NDArray[np.uint32] = found.view(np.uint32).reshape(len(keys), num, 4)
    return words


@functools.lru_cache(maxsize=4)
def _factors(size: int) -> npt.NDArray[np.uint64]:
    return np.repeat(np.array(_MULTIPLIERS, dtype=np.uint64), size)


@functools.lru_cache(maxsize=8)
def _normal_table(device: torch.device) -> Tensor:
    return _normal_table_on_cpu().to(device)


@functools.lru_cache(maxsize=1)
def _normal_table_on_cpu() -> Tensor:
    # Whole multiples of 2^-20, so that the last digits of a logarithm, which differ between machines, do not count.
    quantile = statistics.NormalDist().inv_cdf
    half = [quantile((i + 0.5) / _LEVELS) for i in range(_LEVELS // 2, _LEVELS)]
    scale = (sum(z * z for z in half) / len(half)) ** -0.5
    upper = torch.tensor([round(z * scale * 2**20) for z in half], dtype=torch.int64)
    table = torch.cat([-upper.flip(0), upper])
    found = hashlib.sha256(table.numpy().astype("<i8").tobytes()).hexdigest()
    if not found.startswith(_TABLE_DIGEST):
        raise RuntimeError(
            f"generator='portable': the table of normal numbers is {found[:16]} on this machine, and not "
            f"{_TABLE_DIGEST[:16]} as on others: use generator='device'."
        )
    return (table.double() / 2**20).float()


@functools.lru_cache(maxsize=8)
def _sign_table(device: torch.device) -> Tensor:
    byte = torch.arange(256).unsqueeze(1)
    return ((byte >> torch.arange(8)) & 1).float().mul_(2).sub_(1).to(device)
