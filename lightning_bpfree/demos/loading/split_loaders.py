"""Data sets held in memory by split, batched by one index operation, and the data loaders of a module that has them."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

_T = TypeVar("_T")
Split = Literal["train", "val", "test"]


class BatchDataset(TensorDataset):
    """A TensorDataset that a DataLoader indexes once per batch instead of once per sample.

    torch's loader calls ``__getitems__`` with a batch's indices if a data set has it. The sampler stays an ordinary
    one, so that Lightning can replace it by a DistributedSampler. Use with ``collate_fn=pass_through``.

    Example:
        >>> data = BatchDataset(torch.arange(6.0), torch.arange(6))
        >>> [y.tolist() for _, y in DataLoader(data, batch_size=4, collate_fn=pass_through)]
        [[0, 1, 2, 3], [4, 5]]
    """

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        index = torch.as_tensor(indices)
        return tuple(tensor[index] for tensor in self.tensors)


def pass_through(batch: _T) -> _T:
    """The unchanged batch, already stacked by :class:`BatchDataset`. At module level, so that it can be pickled."""
    return batch


class SplitLoaders:
    """The data loaders of a LightningDataModule whose ``setup`` fills ``_splits``: put it before LightningDataModule.

    Attributes:
        batch_size: Samples a batch.
    """

    batch_size: int
    _splits: dict[str, BatchDataset]

    def dataset(self, split: Split) -> BatchDataset:
        """The samples of one split; its ``tensors`` are the inputs as networks see them, and the labels.

        Raises:
            RuntimeError: :meth:`setup` has not run.
        """
        if not self._splits:
            raise RuntimeError(f"{type(self).__name__} holds no data yet; call prepare_data() and setup() first.")
        return self._splits[split]

    def _options(self, split: Split) -> dict[str, Any]:  # modules with more arguments add to them
        return {}

    def _loader(self, split: Split) -> DataLoader[Any]:
        options = {"batch_size": self.batch_size, "shuffle": split == "train", **self._options(split)}
        return DataLoader(self.dataset(split), collate_fn=pass_through, **options)

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, shuffled by torch's global generator (``seed_everything`` decides the order)."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches in a fixed order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches in a fixed order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test batches, labels included."""
        return self._loader("test")
