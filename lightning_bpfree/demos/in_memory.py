"""A LightningDataModule over tensors in memory, and stratified splits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_bpfree.core.arguments import NonNegativeInt, OpenFraction, PositiveInt, Seed32, checked
from lightning_bpfree.demos.corruption import Corruption, CorruptionName, Pixels, chosen_corruption
from lightning_bpfree.demos.loading.split_loaders import BatchDataset, Split, SplitLoaders

Arrays = tuple[Tensor, Tensor, Tensor, Tensor]  # training inputs, training labels, test inputs, test labels


@checked
def stratified_split(labels: Tensor, fraction: OpenFraction, seed: Seed32) -> tuple[Tensor, Tensor]:
    """Split indices so that each class contributes the same fraction (to the nearest sample) to the second part.

    Args:
        labels: Class of each sample, shape (N,), integer.
        fraction: Share of the second part, in (0, 1).
        seed: Determines the split and the order completely.

    Returns:
        Indices of the first and of the second part, both shuffled; they are disjoint and cover all N.

    Example:
        >>> rest, part = stratified_split(torch.tensor([0, 1] * 10), 0.2, seed=0)
        >>> len(rest), len(part)
        (16, 4)
    """
    # RandomState's stream is frozen across numpy versions, which no torch.Generator promises.
    state = np.random.RandomState(seed)
    order = torch.from_numpy(state.permutation(len(labels)))
    in_part = torch.zeros(len(labels), dtype=torch.bool)
    for label in sorted(set(labels.tolist())):
        members = order[labels[order] == label]
        in_part[members[: round(fraction * len(members))]] = True
    return order[~in_part[order]], order[in_part[order]]


class InMemoryDataModule(SplitLoaders, LightningDataModule):
    """Base class of the data modules here; a subclass returns the arrays in :meth:`load`.

    Batches are pairs: inputs float32, (B, C, H, W), or (B, C * H * W) with `flatten`; labels int64, (B,).

    Args:
        batch_size: Samples per batch, at least 1.
        val_fraction: Share of the training data that is reserved for validation, in (0, 1), the same in each class.
        seed: Seed of the split into training and validation. The test split is the same for every seed.
        flatten: Whether inputs are vectors instead of images.
        drop_last: Whether a last training batch smaller than `batch_size` is left out.
        num_workers: Worker processes of each loader; 0, in the main process, is fastest here.
        train_size: Use only this number of samples at the start of the shuffled training split; None for all.
        corruption: Corruption of only the training samples in use: the name of a predefined corruption (a third of the
            training set each), or ``paper``, or a :class:`Corruption` with your own shares; None for none.

    Attributes:
        num_classes: Number of classes.
        in_shape: Shape (C, H, W) of one image, also where `flatten` is set.
        num_features: C * H * W.
        mean: Mean of the training samples in use, before standardization and corruption, so that inputs for validation
            and test are the same under every corruption; NaN until :meth:`setup`.
        std: Their standard deviation; NaN until :meth:`setup`.

    Raises:
        ValueError: An argument is out of range; from :meth:`setup` where it is out of range for this data set.
    """

    num_classes: int = 10
    in_shape: tuple[int, int, int]

    @checked
    def __init__(
        self,
        batch_size: PositiveInt = 64,
        val_fraction: OpenFraction = 0.1,
        seed: Seed32 = 0,
        flatten: bool = False,
        drop_last: bool = False,
        num_workers: NonNegativeInt = 0,
        train_size: PositiveInt | None = None,
        corruption: CorruptionName | Corruption | None = None,
    ) -> None:
        super().__init__()
        self.batch_size, self.val_fraction, self.seed, self.flatten = batch_size, val_fraction, seed, flatten
        self.drop_last, self.num_workers, self.train_size = drop_last, num_workers, train_size
        self.corruption = chosen_corruption(corruption)
        self.num_features = math.prod(self.in_shape)
        self.mean = self.std = math.nan
        self._splits: dict[str, BatchDataset] = {}

    def load(self) -> Arrays:
        """Training inputs, training labels, test inputs and test labels; inputs of any shape with N first."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Load, split and standardize; later calls do nothing."""
        if self._splits:
            return
        x, y, test_x, test_y = self.load()
        train, val = stratified_split(y, self.val_fraction, self.seed)
        self._check_sizes(len(train), len(val))
        train = train[: self.train_size]
        std, mean = torch.std_mean(x[train].float(), correction=0)
        # 1.0 for constant data: nothing to scale, and no division by zero.
        self.mean, self.std = float(mean), float(std) or 1.0
        shape = (self.num_features,) if self.flatten else self.in_shape
        pixels = Pixels(float(x.min()), float(x.max()), self.mean)
        images, classes = x[train].float().reshape(-1, *self.in_shape), y[train].long()

        def standardized(inputs: Tensor, labels: Tensor) -> BatchDataset:
            return BatchDataset(((inputs.float() - self.mean) / self.std).reshape(-1, *shape), labels.long())

        self._splits = {
            "train": standardized(*self.corruption.apply(images, classes, self.num_classes, pixels)),
            "val": standardized(x[val], y[val]),
            "test": standardized(test_x, test_y),
        }

    def _check_sizes(self, n_train: int, n_val: int) -> None:
        if n_train == 0 or n_val == 0:
            raise ValueError(
                f"val_fraction is {self.val_fraction}, which leaves {n_train} training and {n_val} validation samples; "
                "choose it so that both have some."
            )
        if self.train_size is not None and self.train_size > n_train:
            raise ValueError(
                f"train_size is {self.train_size}, but the training split has {n_train} samples; "
                f"give at most {n_train}, or None for all."
            )
        used = self.train_size or n_train
        used += self.corruption.added(used)
        if self.drop_last and self.batch_size > used:
            raise ValueError(
                f"batch_size is {self.batch_size} with drop_last=True, but there are {used} training samples, "
                f"hence no batch at all; give at most {used}, or drop_last=False."
            )

    def _options(self, split: Split) -> dict[str, Any]:
        workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return {"drop_last": split == "train" and self.drop_last, **workers}
