"""scikit-learn's real tables as LightningDataModules: a row is a vector of standardised features."""

from __future__ import annotations

from typing import Any, Literal

import torch

from lightning_bpfree.core.arguments import checked
from lightning_bpfree.demos.in_memory import Arrays, InMemoryDataModule, stratified_split

__all__ = ["InMemoryTableDataModule"]

_SIZES = {"breast_cancer": (30, 2), "wine": (13, 3), "iris": (4, 3)}
_TEST_SEED = 0


class InMemoryTableDataModule(InMemoryDataModule):
    """One of scikit-learn's tables with classes; features have mean 0 and variance 1 over the rows not for the test.

    Batches are pairs: inputs float32, (B, D); labels int64, (B,). A stratified fifth, the same always, is the test
    split.

    Args:
        name: ``breast_cancer`` (569 rows, 30 features, 2 classes), ``wine`` (178, 13, 3) or ``iris`` (150, 4, 3).
        **kwargs: Further arguments of :class:`InMemoryDataModule`, without `flatten`.

    Attributes:
        feature_names: Names of the features; empty until :meth:`setup`.

    Raises:
        ModuleNotFoundError: From :meth:`setup`, where scikit-learn is not installed.
        ValueError: The name is unknown.

    Example:
        >>> data = InMemoryTableDataModule("wine", batch_size=32)
        >>> data.setup()
        >>> data.dataset("test").tensors[0].shape, data.feature_names[0]
        (torch.Size([36, 13]), 'alcohol')
    """

    @checked
    def __init__(self, name: Literal["breast_cancer", "wine", "iris"] = "breast_cancer", **kwargs: Any) -> None:
        self.name = name
        features, self.num_classes = _SIZES[name]
        self.in_shape = (1, 1, features)
        self.feature_names: list[str] = []
        super().__init__(flatten=True, **kwargs)

    def load(self) -> Arrays:
        """The rows and their fixed test split."""
        try:
            from sklearn import datasets
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'This data set needs scikit-learn: pip install "lightning-bpfree[recipes]"'
            ) from error
        bunch = getattr(datasets, f"load_{self.name}")()
        self.feature_names = [str(name) for name in bunch.feature_names]
        x, y = torch.from_numpy(bunch.data).float(), torch.from_numpy(bunch.target)
        train, test = stratified_split(y, 0.2, _TEST_SEED)
        x = (x - x[train].mean(0)) / x[train].std(0)
        return x[train], y[train], x[test], y[test]
