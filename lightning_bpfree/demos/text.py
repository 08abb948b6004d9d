"""A small corpus for language models that comes with every Python: the docstrings of its standard library."""

from __future__ import annotations

import ast
import functools
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_bpfree.core.arguments import NonNegativeInt, PositiveFraction, PositiveInt, Seed32, checked
from lightning_bpfree.demos.loading.split_loaders import BatchDataset, pass_through
from lightning_bpfree.demos.masking import VOCABULARY, EpochSampler, MaskedSequences, masked

__all__ = ["MODULES", "StandardLibraryTextDataModule"]

Split = Literal["train", "val", "test"]

_SPLITS: dict[int, Split] = {0: "test", 1: "val"}  # tenths of the modules, by a hash; all others train

# Those of Python 3.10 to 3.13 with at least 4,000 characters of documentation in each, and not too much code to parse.
_NAMES = """
base64 bdb bz2 cmd code codecs collections configparser contextlib ctypes difflib doctest email fileinput fractions
ftplib functools http imaplib importlib inspect ipaddress json logging lzma mimetypes optparse os pathlib pdb pkgutil
platform poplib queue random shutil smtplib socket socketserver ssl statistics tempfile textwrap threading timeit
traceback typing unittest urllib uuid wave wsgiref xmlrpc
"""
MODULES: tuple[str, ...] = tuple(_NAMES.split())


def split_of(module: str) -> Split:
    """The split that a module's documentation belongs to, by its name alone.

    Example:
        >>> [split_of(name) for name in ("argparse", "textwrap", "statistics")]
        ['train', 'val', 'test']
    """
    return _SPLITS.get(zlib.crc32(module.encode()) % 10, "train")


@functools.lru_cache(maxsize=2 * len(MODULES))  # it takes a second in all
def read_docstrings(module: str, folder: Path) -> str:
    """All documentation strings of a module, or of the modules directly in a package, with blank lines between them.

    The source is parsed, nothing is imported. Characters beyond ASCII become question marks.

    Args:
        module: Its name.
        folder: Folder of the standard library.

    Raises:
        FileNotFoundError: The text has no source on this machine.
    """
    files = [folder / f"{module}.py"]
    if not files[0].is_file():
        files = sorted((folder / module).glob("*.py"))
    if not files:
        raise FileNotFoundError(
            f"no source of the standard library's module {module!r} in {folder}: this Python comes without it, as "
            "frozen, embedded and stripped ones do. Use a Python with its .py files, or another data set."
        )
    found: list[str] = []
    for file in files:
        found += _docstrings(ast.parse(file.read_bytes(), str(file)))
    return "\n\n".join(found).encode("ascii", "replace").decode()


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):  # most of a tree, and no definition is in there
            yield from _docstrings(child)


class StandardLibraryTextDataModule(LightningDataModule):
    """Masked characters of the documentation strings of Python's standard library; nothing is downloaded.

    The text comes from the sources of the running Python, so it differs slightly between versions: 0.77 million
    characters in 3.11. It is cut into sequences, and the rest at the end of a module is dropped. All text of a module
    or package belongs to one split: about 81 % of the text is for training, 11 % for validation and 8 % for the test,
    independently of `seed`.

    Batches are pairs, both int64 of shape (B, T): tokens, which are the codes of ASCII characters or 128 for the mask;
    and labels, the true characters at the predicted positions and -100 elsewhere. The order and the masks of training
    depend only on `seed`, the epoch and the sequence, so that a run resumed at the end of an epoch, or one with another
    training rule, gets the same batches. Those of validation and test are always the same.

    Args:
        sequence_length: T, characters per sequence, at least 1.
        batch_size: Sequences per batch, at least 1.
        mask_share: Share of the predicted positions, the same number in each sequence, in (0, 1].
        max_sequences: Maximum number of sequences per split, at least 1, from all over its text; None for all.
        seed: Determines order and masks of training, 0 to 2**32 - 1.
        num_workers: Worker processes of each loader; 0, in the main process, is fastest here.

    Attributes:
        vocab_size: 129.

    Raises:
        FileNotFoundError: From :meth:`setup`: this Python comes without sources.
        ValueError: An argument is out of range; from :meth:`setup`, if no module has a sequence of this length.

    Example:
        >>> data = StandardLibraryTextDataModule(batch_size=4)
        >>> data.setup()
        >>> tokens, labels = next(iter(data.train_dataloader()))
        >>> tuple(tokens.shape), (labels != -100).sum(1)
        ((4, 64), tensor([10, 10, 10, 10]))
    """

    vocab_size: int = VOCABULARY

    @checked
    def __init__(
        self,
        sequence_length: PositiveInt = 64,
        batch_size: PositiveInt = 64,
        mask_share: PositiveFraction = 0.15,
        max_sequences: PositiveInt | None = None,
        seed: Seed32 = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        if round(mask_share * sequence_length) < 1:
            raise ValueError(
                f"{type(self).__name__}: mask_share is {mask_share}; give a share above 0, up to 1, which makes "
                f"at least one of the {sequence_length} positions of a sequence."
            )
        self.sequence_length, self.batch_size, self.mask_share = sequence_length, batch_size, mask_share
        self.max_sequences, self.seed, self.num_workers = max_sequences, seed, num_workers
        self._sequences: dict[Split, Tensor] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the sources and cut them; later calls do nothing."""
        if self._sequences:
            return
        folder = Path(sysconfig.get_paths()["stdlib"])
        texts = {module: read_docstrings(module, folder) for module in MODULES}
        parts: dict[Split, list[Tensor]] = {"train": [], "val": [], "test": []}
        for module, text in texts.items():
            parts[split_of(module)].append(self._cut(text))
        sequences = {split: torch.cat(found) for split, found in parts.items()}
        if not all(map(len, sequences.values())):
            longest = min(max(len(texts[m]) for m in MODULES if split_of(m) == split) for split in parts)
            raise ValueError(
                f"sequence_length is {self.sequence_length}, longer than the text of every module of some split; give "
                f"at most {longest}."
            )
        self._sequences = {split: self._some(found) for split, found in sequences.items()}

    def _cut(self, text: str) -> Tensor:
        codes = torch.tensor(list(text.encode("ascii")), dtype=torch.int64)
        rows = len(codes) // self.sequence_length
        return codes[: rows * self.sequence_length].reshape(rows, self.sequence_length)

    def _some(self, sequences: Tensor) -> Tensor:
        if self.max_sequences is None or self.max_sequences >= len(sequences):
            return sequences
        order = np.random.RandomState(0).permutation(len(sequences))  # not the user's seed: the text stays the same
        return sequences[torch.from_numpy(np.sort(order[: self.max_sequences]))]

    def sequences(self, split: Split) -> Tensor:
        """The unmasked sequences of a split, int64 of shape (N, T), in the order of the text.

        Raises:
            RuntimeError: :meth:`setup` has not run.
        """
        if not self._sequences:
            raise RuntimeError(f"{type(self).__name__} holds no data yet; call setup() first.")
        return self._sequences[split]

    def dataset(self, split: Literal["val", "test"]) -> BatchDataset:
        """The sequences of validation or test; its ``tensors`` are the masked tokens and the labels."""
        state = np.random.RandomState({"val": 0, "test": 1}[split])
        return BatchDataset(*masked(self.sequences(split), self.mask_share, state))

    def _loader(self, dataset: Dataset[Any], sampler: EpochSampler | None = None) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=pass_through,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches; without a Trainer, call ``loader.sampler.set_epoch(epoch)`` before each epoch."""
        data = MaskedSequences(self.sequences("train"), self.mask_share, self.seed)
        # Workers draw numbers as soon as they start, which is before a resumed Trainer sets the epoch.
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        return self._loader(data, EpochSampler(len(data), self.seed, epoch))

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches, always the same."""
        return self._loader(self.dataset("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches, always the same."""
        return self._loader(self.dataset("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test batches, labels included."""
        return self._loader(self.dataset("test"))
