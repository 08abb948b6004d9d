"""Small classification data sets as LightningDataModules, held in memory and batched by one index operation.

All of them split deterministically without touching a global random number generator, and standardize with one scalar
mean and one scalar standard deviation of the training split (per pixel would divide by zero: digits have pixels that
are always black).
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from lightning_bpfree.core.arguments import Range, Seed32, checked
from lightning_bpfree.demos.in_memory import Arrays, InMemoryDataModule, stratified_split
from lightning_bpfree.demos.loading.idx import FASHION_MNIST, MNIST, fetch, load_splits

__all__ = [
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "InMemoryDataModule",
    "MNIST1DDataModule",
    "MNISTDataModule",
]

_TEST_SEED = 0  # the test split of a data set that has none of its own; not the user's `seed`, so that it never moves


def _missing(package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f'This data set needs {package}: pip install "lightning-bpfree[recipes]"')


class DigitsDataModule(InMemoryDataModule):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; comes with scikit-learn, nothing is downloaded.

    A fixed stratified fifth is the test split. Arguments are those of :class:`InMemoryDataModule`.
    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.

    Raises:
        ModuleNotFoundError: From :meth:`setup`, where scikit-learn is not installed.

    Example:
        >>> data = DigitsDataModule(batch_size=32)
        >>> data.setup()
        >>> x, y = next(iter(data.train_dataloader()))
        >>> tuple(x.shape), tuple(y.shape)
        ((32, 1, 8, 8), (32,))
    """

    in_shape = (1, 8, 8)

    def load(self) -> Arrays:
        """The digits, with values 0 to 16, and their fixed test split."""
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise _missing("scikit-learn") from error
        bunch = load_digits()
        x, y = torch.from_numpy(bunch.images), torch.from_numpy(bunch.target)
        train, test = stratified_split(y, 0.2, _TEST_SEED)
        return x[train], y[train], x[test], y[test]


class FashionMNISTDataModule(InMemoryDataModule):
    """Fashion-MNIST: 60,000 training and 10,000 test images of 28 x 28 pixels of ten kinds of clothes.

    Source: H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST", 2017, arXiv 1708.07747.

    Args:
        data_dir: Folder to look for the IDX files in, and to download to; Debian's package is found without it.
        download: Whether they may be downloaded (31 MB) where they are not found.
        **kwargs: Arguments of :class:`InMemoryDataModule`.

    Raises:
        FileNotFoundError: From :meth:`prepare_data`: not found and not downloaded; the message lists the ways out.
        ValueError: From :meth:`setup`: a file is corrupt.
    """

    in_shape = (1, 28, 28)

    @checked
    def __init__(self, data_dir: str | Path = "data", download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.data_dir, self.download = data_dir, download

    def prepare_data(self) -> None:
        """Download what is missing; Lightning calls it in one process of each machine only."""
        fetch(FASHION_MNIST, self.data_dir, download=self.download)

    def load(self) -> Arrays:
        """The four IDX files, with values 0 to 255; never downloads."""
        return load_splits(FASHION_MNIST, fetch(FASHION_MNIST, self.data_dir, download=False))


class MNISTDataModule(InMemoryDataModule):
    """MNIST: 60,000 training and 10,000 test images of 28 x 28 pixels of handwritten digits.

    Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-Based Learning Applied to Document Recognition", 1998.

    Args:
        data_dir: Folder to look for the IDX files in, and to download to.
        download: Whether they may be downloaded (12 MB) where they are not found.
        **kwargs: Arguments of :class:`InMemoryDataModule`.

    Raises:
        FileNotFoundError: From :meth:`prepare_data`: not found and not downloaded; the message lists the ways out.
        ValueError: From :meth:`setup`: a file is corrupt.
    """

    in_shape = (1, 28, 28)

    @checked
    def __init__(self, data_dir: str | Path = "data", download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.data_dir, self.download = data_dir, download

    def prepare_data(self) -> None:
        """Download what is missing; Lightning calls it in one process of each machine only."""
        fetch(MNIST, self.data_dir, download=self.download)

    def load(self) -> Arrays:
        """The four IDX files, with values 0 to 255; never downloads."""
        return load_splits(MNIST, fetch(MNIST, self.data_dir, download=False))


@functools.lru_cache(maxsize=2)  # it takes about a second, and a sweep asks for the same again and again
def _make_mnist1d(num_samples: int, data_seed: int) -> Arrays:
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ModuleNotFoundError as error:
        raise _missing("mnist1d") from error
    args = get_dataset_args()
    args.num_samples, args.seed = num_samples, data_seed
    # The generator seeds and draws from the two global generators: put them back as they were.
    states = random.getstate(), np.random.get_state()
    try:
        data = make_dataset(args)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    x, y, test_x, test_y = (torch.from_numpy(data[key]) for key in ("x", "y", "x_test", "y_test"))
    return x, y, test_x, test_y


class MNIST1DDataModule(InMemoryDataModule):
    """MNIST-1D: noisy, shifted and sheared signals of 40 points in ten classes, generated here, nothing is downloaded.

    An image is one row, (1, 1, 40). A fifth of the signals, in the generator's order, is the test split.
    Source: S. Greydanus, D. Kobak, "Scaling Down Deep Learning with MNIST-1D", 2020, arXiv 2011.14439.

    Args:
        num_samples: Signals to generate, test split included; a multiple of 10, at least 100. The paper has 5,000.
        data_seed: Seed of the generator; 42 is the paper's.
        **kwargs: Arguments of :class:`InMemoryDataModule`.

    Raises:
        ModuleNotFoundError: From :meth:`setup`, where mnist1d is not installed.
        ValueError: An argument is out of range.
    """

    in_shape = (1, 1, 40)

    @checked
    def __init__(
        self, num_samples: Annotated[int, Range(ge=100)] = 5000, data_seed: Seed32 = 42, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if num_samples % 10:
            raise ValueError(f"MNIST1DDataModule: num_samples={num_samples}: give a multiple of 10 (the classes).")
        self.num_samples, self.data_seed = num_samples, data_seed

    def load(self) -> Arrays:
        """The generated signals."""
        return _make_mnist1d(self.num_samples, self.data_seed)
