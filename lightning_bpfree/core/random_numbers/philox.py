"""Random numbers by a counter-based generator in integer operations: the same bits on every device.

Seeded generators of torch differ between CPU and CUDA, between models of GPUs, and perhaps between releases. Here
integers alone decide a number; numbers of a bell curve come from a table.
"""

from __future__ import annotations

import functools
import hashlib
import statistics
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_CHUNK = 1 << 13  # counters at a time: what a chunk needs stays in the cache of a core
_LEVELS = 1 << 16
_TABLE_DIGEST = "68728df2e07a2d8ab2bdf322dc7ad5d1"
_NUMBERS_A_COUNTER = {"gaussian": 8, "rademacher": 128}


class Philox:
    """Streams of random numbers, one a seed, by Philox4x32-10: functions of the seed alone.

    ``"gaussian"``: mean 0 and variance 1, the 65,536 midpoints of equally likely slices of N(0, 1), scaled so that the
    variance is 1 to seven digits; the largest is 4.33. ``"rademacher"``: fair signs.

    Args:
        seeds: of the streams, any integers; their lowest 64 bits are the keys.
        kind: which numbers.
        expected: how many numbers of each stream will be drawn; more may be, at some cost in time.

    Examples:
        >>> first, again = Philox([7, 8], "gaussian", 5), Philox([7], "gaussian", 5)
        >>> torch.equal(first.fill(torch.empty(2, 5))[0], again.fill(torch.empty(1, 5))[0])
        True

    References:
        J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
    """

    def __init__(self, seeds: Sequence[int], kind: Literal["gaussian", "rademacher"], expected: int) -> None:
        self._keys = torch.tensor([[(s & _MASK), ((s >> 32) & _MASK)] for s in seeds], dtype=torch.int64)
        self.kind, self.expected, self.drawn = kind, expected, 0
        self._block: Tensor | None = None
        self._start = self._end = 0  # of the block, in numbers of a stream

    def fill(self, rows: Tensor) -> Tensor:
        """Fill ``rows``, shape ``(streams, *shape)``, with the next numbers of every stream, and return it."""
        flat = rows.view(len(rows), -1) if rows.is_contiguous() else rows.new_empty(len(rows), rows[0].numel())
        done = 0
        while done < flat.shape[1]:
            block = self._numbers(flat.shape[1] - done, rows.device)
            part = block[:, self.drawn - self._start :][:, : flat.shape[1] - done]
            flat[:, done : done + part.shape[1]] = part
            done, self.drawn = done + part.shape[1], self.drawn + part.shape[1]
        return rows if rows.is_contiguous() else rows.copy_(flat.view(rows.shape))

    def _numbers(self, wanted: int, device: torch.device) -> Tensor:
        """Return the block that holds the next number, made on this device if it is not at hand."""
        if self._block is not None and self._block.device == device and self.drawn < self._end:
            return self._block
        each = _NUMBERS_A_COUNTER[self.kind]
        first, skipped = divmod(self.drawn, each)
        ahead = max(wanted, self.expected - self.drawn) + skipped
        num = min(-(-ahead // each), max(1, _CHUNK // len(self._keys)))
        # Cut into pieces, the lowest bits first, by looking at the same memory with another type.
        words = philox(torch.arange(first, first + num, device=device), self._keys.to(device)).int()
        if self.kind == "gaussian":
            pieces = words.view(torch.int16).view(-1).int().bitwise_and_(0xFFFF)
            self._block = _normal_table(device).index_select(0, pieces).view(len(self._keys), -1)
        else:
            pieces = words.view(torch.uint8).view(-1).int()
            self._block = _sign_table(device).index_select(0, pieces).view(len(self._keys), -1)
        self._start, self._end = first * each, (first + num) * each
        return self._block


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
    key = keys.T.unsqueeze(-1)
    for r in range(_ROUNDS):
        product = (even * factors).flip(0)  # wraps at 64 bits, whose lower and upper halves are right all the same
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_((key + r * weyl) & _MASK).bitwise_and_(_MASK)
        odd = product
    odd &= _MASK
    return torch.stack([even[0], odd[0], even[1], odd[1]], -1)


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
