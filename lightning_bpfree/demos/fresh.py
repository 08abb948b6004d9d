"""Training batches that are drawn on request: a task without a data set, as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_bpfree.core.arguments import PositiveInt, checked
from lightning_bpfree.demos.control import FreshSampler
from lightning_bpfree.demos.loading.split_loaders import BatchDataset, pass_through

__all__ = ["Batch", "FreshBatches", "FreshDataModule"]

Batch = tuple[Tensor, Tensor]  # inputs and targets, B first
_EVAL_SEEDS = {"val": 0, "test": 1}
_TRAINING_SEEDS = (1 << 32) - len(_EVAL_SEEDS)  # what RandomState takes, less the seeds of validation and test
_EVAL_BATCH = 1024


class FreshBatches(Dataset[Batch]):
    """Batches by number: each whole batch is drawn on request, from a generator that its number seeds.

    Use with ``batch_size=None`` and ``collate_fn=pass_through``, so that a loader requests one batch at a time.

    Args:
        draw: Maps a number of samples and a generator to a batch.
        batch_size: Samples per batch.

    Example:
        >>> import torch
        >>> def draw(num, state):
        ...     x = torch.from_numpy(state.standard_normal((num, 2)))
        ...     return x, x.sum(1)
        >>> batches = FreshBatches(draw, 4)
        >>> torch.equal(batches[7][0], batches[7][0]), torch.equal(batches[7][0], batches[8][0])
        (True, False)
    """

    def __init__(self, draw: Callable[[int, np.random.RandomState], Batch], batch_size: int) -> None:
        self.draw, self.batch_size = draw, batch_size
        self._state = np.random.RandomState(0)  # seeded for each batch: making one takes longer than the batch

    def __len__(self) -> int:
        return _TRAINING_SEEDS

    def __getitem__(self, index: int) -> Batch:
        self._state.seed(len(_EVAL_SEEDS) + index)
        return self.draw(self.batch_size, self._state)


class FreshDataModule(LightningDataModule):
    """Base class of tasks without a data set; a subclass draws samples in :meth:`draw`.

    Training batches are new in every epoch, and ``seed_everything`` determines them: their numbers are drawn with
    torch's global generator when an epoch begins. Each device gets its share of an epoch's numbers, and so its own
    batches. The samples for validation and test are drawn once from two fixed seeds, which training does not use, by
    NumPy's frozen RandomState: they are the same in every run and version.

    Args:
        batch_size: Samples per training batch, at least 1.
        batches_per_epoch: Training batches per epoch, at least 1, over all devices.
        eval_samples: Samples for validation, and as many others for the test; at least 1.

    Raises:
        ValueError: An argument is out of range.
    """

    @checked
    def __init__(
        self, batch_size: PositiveInt = 32, batches_per_epoch: PositiveInt = 500, eval_samples: PositiveInt = 4096
    ) -> None:
        super().__init__()
        self.batch_size, self.batches_per_epoch, self.eval_samples = batch_size, batches_per_epoch, eval_samples

    def draw(self, num: int, state: np.random.RandomState) -> Batch:
        """The given number of independent samples, determined by the generator alone."""
        raise NotImplementedError

    def dataset(self, split: Literal["val", "test"]) -> BatchDataset:
        """The samples of validation or test; its ``tensors`` are the inputs and the targets."""
        return BatchDataset(*self.draw(self.eval_samples, np.random.RandomState(_EVAL_SEEDS[split])))

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches that are new in each epoch."""
        return DataLoader(
            FreshBatches(self.draw, self.batch_size),
            batch_size=None,
            sampler=FreshSampler(self.batches_per_epoch, _TRAINING_SEEDS),
            collate_fn=pass_through,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches, always the same."""
        return DataLoader(self.dataset("val"), batch_size=_EVAL_BATCH, collate_fn=pass_through)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches, always the same."""
        return DataLoader(self.dataset("test"), batch_size=_EVAL_BATCH, collate_fn=pass_through)
