"""Masked sequences for language models: seed, epoch and sequence determine the masked positions.

The masks are those of J. Devlin, M.-W. Chang, K. Lee, K. Toutanova, "BERT: Pre-training of Deep Bidirectional
Transformers for Language Understanding", 2018, arXiv 1810.04805, over characters instead of word pieces.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from lightning_bpfree.demos.loading.split_loaders import BatchDataset

__all__ = ["IGNORED", "MASK", "VOCABULARY", "EpochSampler", "MaskedSequences", "masked"]

MASK = 128  # the token after the 128 ASCII characters
VOCABULARY = 129
IGNORED = -100  # the label of positions that are not to be predicted; cross_entropy leaves them out
_PRINTABLE = (32, 127)  # the range of random characters


def masked(tokens: Tensor, share: float, state: np.random.RandomState) -> tuple[Tensor, Tensor]:
    """Mask characters as BERT does: of those chosen, 80 % become the mask, 10 % a random character, 10 % stay.

    Args:
        tokens: Shape (N, T), int64.
        share: Share of the positions in each sequence, in (0, 1]; rounded to whole positions.
        state: Source of all random choices.

    Returns:
        Inputs and labels, both int64 of shape (N, T); labels are -100 at positions that are not predicted.

    Example:
        >>> inputs, labels = masked(torch.full((2, 20), 65), 0.15, np.random.RandomState(0))
        >>> (labels != -100).sum(1), labels.max()
        (tensor([3, 3]), tensor(65))
    """
    rows, length = tokens.shape
    num = round(share * length)
    chosen = torch.from_numpy(state.random_sample((rows, length))).argsort(1)[:, :num]
    fate = torch.from_numpy(state.random_sample((rows, num)))
    noise = torch.from_numpy(state.randint(*_PRINTABLE, (rows, num), dtype=np.int64))
    true = tokens.gather(1, chosen)
    shown = torch.where(fate < 0.8, MASK, torch.where(fate < 0.9, noise, true))
    return tokens.scatter(1, chosen, shown), torch.full_like(tokens, IGNORED).scatter(1, chosen, true)


class EpochSampler(Sampler[int]):
    """A permutation of an epoch's numbers, ``epoch * num`` to ``(epoch + 1) * num - 1``, by seed and epoch alone.

    The Trainer calls :meth:`set_epoch` when an epoch begins.

    Args:
        num: Samples per epoch.
        seed: At least 0.
        epoch: The first epoch.

    Example:
        >>> sampler = EpochSampler(4, seed=0, epoch=2)
        >>> sorted(sampler)
        [8, 9, 10, 11]
    """

    def __init__(self, num: int, seed: int, epoch: int = 0) -> None:
        self.num, self.seed, self.epoch = num, seed, epoch

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[int]:
        order = np.random.RandomState([self.seed, self.epoch, 0]).permutation(self.num)
        yield from (self.epoch * self.num + order).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Use this epoch from the next iteration on."""
        self.epoch = epoch


class MaskedSequences(Dataset[tuple[Tensor, ...]]):
    """Sequences by the numbers of :class:`EpochSampler`, masked differently in each epoch.

    Args:
        tokens: Shape (N, T), int64.
        share: See :func:`masked`.
        seed: At least 0.
    """

    def __init__(self, tokens: Tensor, share: float, seed: int) -> None:
        self.tokens, self.share, self.seed = tokens, share, seed
        self._epoch: tuple[int, BatchDataset] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        return tuple(part[0] for part in self.__getitems__([number]))

    def __getitems__(self, numbers: list[int]) -> tuple[Tensor, ...]:
        epoch = numbers[0] // len(self)
        if self._epoch is None or self._epoch[0] != epoch:
            # All at once: a generator for each sequence would take longer than a step of a small network.
            state = np.random.RandomState([self.seed, epoch, 1])
            self._epoch = epoch, BatchDataset(*masked(self.tokens, self.share, state))
        return self._epoch[1].__getitems__([number - epoch * len(self) for number in numbers])
