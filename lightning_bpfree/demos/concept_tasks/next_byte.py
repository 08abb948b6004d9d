"""A byte-level language model and its text, the documentation of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bpfree.core.arguments import AtLeastTwo, PositiveInt, checked
from lightning_bpfree.demos.loading.split_loaders import BatchDataset, Split, SplitLoaders, pass_through
from lightning_bpfree.demos.text import MODULES, read_docstrings, split_of

__all__ = ["ByteGRU", "NextByteDataModule", "QuotedWindows"]

_ASCII = 128


class ByteGRU(nn.Module):
    """An embedding, a recurrent layer and a linear one: logits of the next byte at every position.

    Args:
        vocab_size: Number of tokens, at least 2.
        dim: Width of the embedding.
        hidden: Width of the recurrent layer.

    Example:
        >>> ByteGRU(128, 8, 16)(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 128])
    """

    @checked
    def __init__(self, vocab_size: AtLeastTwo = _ASCII, dim: PositiveInt = 32, hidden: PositiveInt = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.rnn = nn.GRU(dim, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, shape (B, T, vocab_size), of tokens (B, T)."""
        logits: Tensor = self.head(self.rnn(self.embed(tokens))[0])
        return logits


class NextByteDataModule(SplitLoaders, LightningDataModule):
    """Windows of the documentation strings of Python's standard library; nothing is downloaded.

    Batches are pairs, both int64 of shape (B, T): codes of ASCII characters, and the code that follows each. All text
    of a library module belongs to one split. Windows follow each other without a gap.

    Args:
        sequence_length: T, at least 1.
        batch_size: Windows per batch, at least 1.
        max_sequences: Maximum number of windows per split, from all over its text; None for all.
        quoted: Whether to use only windows with a double quotation mark that start outside of a quotation, with a
            stride of T / 8: samples of a concept that is rare in the text.

    Attributes:
        vocab_size: 128.

    Example:
        >>> data = NextByteDataModule(sequence_length=16, max_sequences=100)
        >>> data.setup()
        >>> tokens, following = data.dataset("val").tensors
        >>> bool((tokens[:, 1:] == following[:, :-1]).all())
        True
    """

    vocab_size: int = _ASCII

    @checked
    def __init__(
        self,
        sequence_length: PositiveInt = 48,
        batch_size: PositiveInt = 64,
        max_sequences: PositiveInt | None = None,
        quoted: bool = False,
    ) -> None:
        super().__init__()
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.max_sequences, self.quoted = max_sequences, quoted
        self._splits: dict[str, BatchDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the text; later calls do nothing."""
        if self._splits:
            return
        folder = Path(sysconfig.get_paths()["stdlib"])
        parts: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
        for module in MODULES:
            parts[split_of(module)].append(self._cut(read_docstrings(module, folder)))
        for split, found in parts.items():
            windows = torch.cat(found)
            windows = windows[np.random.RandomState(0).permutation(len(windows))[: self.max_sequences]]
            self._splits[split] = BatchDataset(windows[:, :-1].clone(), windows[:, 1:].clone())

    def _cut(self, text: str) -> Tensor:
        length = self.sequence_length + 1
        if not self.quoted:
            codes = torch.tensor(list(text.encode("ascii")), dtype=torch.int64)
            return codes[: len(codes) // length * length].reshape(-1, length)
        found = [torch.empty(0, length, dtype=torch.int64)]
        for paragraph in text.split("\n\n"):  # a mark that is never closed ends with its paragraph
            codes = torch.tensor(list(paragraph.encode("ascii")), dtype=torch.int64)
            if len(codes) < length or '"' not in paragraph:
                continue
            windows = codes.unfold(0, length, max(1, length // 8))
            inside = ((codes == ord('"')).cumsum(0) % 2).unfold(0, length, max(1, length // 8))
            opens = windows[:, 0] == ord('"')
            outside = (inside[:, 0] == 0) ^ opens  # the sum counts a mark that is the first code itself
            found.append(windows[outside & (windows[:, :-1] == ord('"')).any(1)])
        return torch.cat(found)


class QuotedWindows(DataLoader[Any]):
    """All windows with double quotation marks that start outside of a quotation, in a fixed order.

    Batches are those of :class:`NextByteDataModule` with `quoted`, of all its splits together.

    Args:
        sequence_length: T, at least 1.
        batch_size: Windows per batch, at least 1.

    Example:
        >>> tokens, _ = next(iter(QuotedWindows(sequence_length=16, batch_size=4)))
        >>> bool((tokens == ord('"')).any(1).all())
        True
    """

    @checked
    def __init__(self, sequence_length: PositiveInt = 48, batch_size: PositiveInt = 256) -> None:
        data = NextByteDataModule(sequence_length, batch_size, quoted=True)
        data.setup()
        splits: tuple[Split, ...] = ("train", "val", "test")
        parts = [data.dataset(split).tensors for split in splits]
        tensors = [torch.cat(column) for column in zip(*parts, strict=True)]
        super().__init__(BatchDataset(*tensors), batch_size=batch_size, collate_fn=pass_through)
