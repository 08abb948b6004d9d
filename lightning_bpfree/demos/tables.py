"""Small tables of numbers with a class for each row, and a classifier that reports by class."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassFBetaScore,
    MulticlassStatScores,
)

from lightning_bpfree.core.arguments import AtLeastTwo, OpenFraction, PositiveInt, Seed32, check_arguments, checked
from lightning_bpfree.demos.in_memory import stratified_split
from lightning_bpfree.demos.loading.split_loaders import BatchDataset, SplitLoaders
from lightning_bpfree.demos.modules import Classifier

__all__ = ["ScikitTableDataModule", "TableClassifier", "TableDataModule"]


class TableDataModule(SplitLoaders, LightningDataModule):
    """Base class of the tables here; a subclass returns the rows in :meth:`load`.

    Batches are pairs: inputs float32, (B, num_features), labels int64, (B,). Each feature is standardized with mean and
    deviation of only the training rows. All splits are stratified.

    Args:
        batch_size: Rows per batch, at least 1.
        test_fraction: Share of all rows that is reserved for the test, in (0, 1).
        val_fraction: Share of the others that is reserved for validation, in (0, 1).
        seed: Seed of both splits: with a few hundred rows, repeat an experiment with several seeds.

    Attributes:
        class_names: Names of the classes, by their numbers.
        feature_names: Names of the columns.

    Raises:
        ValueError: An argument is out of range; from :meth:`setup` where a split has no rows.
    """

    class_names: Sequence[str] = ()
    feature_names: Sequence[str] = ()

    @checked
    def __init__(
        self,
        batch_size: PositiveInt = 32,
        test_fraction: OpenFraction = 0.2,
        val_fraction: OpenFraction = 0.2,
        seed: Seed32 = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.test_fraction = batch_size, test_fraction
        self.val_fraction, self.seed = val_fraction, seed
        self._splits: dict[str, BatchDataset] = {}

    def load(self) -> tuple[Tensor, Tensor]:
        """All rows, (N, num_features), and their classes, (N,)."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Load, split and standardize; later calls do nothing."""
        if self._splits:
            return
        x, y = self.load()
        rest, test = stratified_split(y, self.test_fraction, self.seed)
        train, val = stratified_split(y[rest], self.val_fraction, self.seed + 1)
        parts = {"train": rest[train], "val": rest[val], "test": test}
        for name, rows in parts.items():
            if not len(rows):
                raise ValueError(f"the {name} split of {len(y)} rows is empty; choose other fractions.")
        std, mean = torch.std_mean(x[parts["train"]].double(), 0, correction=0)
        std = torch.where(std > 0, std, 1.0)  # constant columns: nothing to scale
        self._splits = {
            name: BatchDataset(((x[rows].double() - mean) / std).float(), y[rows].long())
            for name, rows in parts.items()
        }


class ScikitTableDataModule(TableDataModule):
    """One of the tables that come with scikit-learn: 569 tumors, 178 wines, or 1,797 digits of 64 pixels.

    Args:
        name: ``breast_cancer``, ``wine`` or ``digits``.
        **kwargs: Arguments of :class:`TableDataModule`.

    Raises:
        ModuleNotFoundError: From :meth:`setup`, where scikit-learn is not installed.
        ValueError: An argument is out of range.

    Example:
        >>> data = ScikitTableDataModule("wine", batch_size=16)
        >>> data.setup()
        >>> x, y = next(iter(data.train_dataloader()))
        >>> tuple(x.shape), tuple(y.shape)
        ((16, 13), (16,))
    """

    @checked
    def __init__(self, name: Literal["breast_cancer", "wine", "digits"] = "breast_cancer", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name = name

    def load(self) -> tuple[Tensor, Tensor]:
        """The table of scikit-learn, unchanged."""
        try:
            from sklearn import datasets
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'This table needs scikit-learn: pip install "lightning-bpfree[recipes]"'
            ) from error
        bunch = getattr(datasets, f"load_{self.name}")()
        self.class_names = [str(name) for name in bunch.target_names]
        self.feature_names = [str(name) for name in bunch.feature_names]
        return torch.from_numpy(bunch.data), torch.from_numpy(bunch.target)


class TableClassifier(Classifier):
    """A classifier that reports each class in the test: accuracy (recall), F2 score, rows, and a confusion matrix.

    F2 is ``5 P R / (4 P + R)`` of precision P and recall R: a missed row costs more than a false alarm. Logged as
    ``test_acc/<class>``, ``test_f2/<class>`` and ``test_rows/<class>``; classes without rows in the test are left out.

    Args:
        net: Network from inputs to logits of shape (B, num_classes).
        num_classes: Number of classes, at least 2.
        class_names: num_classes names for logged metrics; None for their numbers.
        confusion_plot: File for a figure of the test's confusion matrix, such as ``confusion.png``; None for none.
        **kwargs: Arguments of :class:`Classifier`: optimizer, learning rate and its schedule.

    Raises:
        ValueError: An argument is out of range.
        ModuleNotFoundError: At the end of the test, if a figure is requested and matplotlib is not installed.

    Example:
        >>> model = TableClassifier(nn.Linear(5, 3), num_classes=3, lr=0.1)
        >>> model(torch.zeros(2, 5)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: AtLeastTwo,
        class_names: Sequence[str] | None = None,
        confusion_plot: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(TableClassifier, locals())
        super().__init__(net, num_classes, **kwargs)
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names for {num_classes} classes; give one each.")
        self.class_names = [str(name) for name in class_names or range(num_classes)]
        self.confusion_plot = confusion_plot
        each: dict[str, Any] = {"average": "none", "validate_args": False}
        self.class_accuracy = MulticlassAccuracy(num_classes, **each)
        self.class_f2 = MulticlassFBetaScore(2.0, num_classes, **each)
        self.class_rows = MulticlassStatScores(num_classes, **each)
        self.confusion = MulticlassConfusionMatrix(num_classes, validate_args=False)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test_loss`` and ``test_acc``, and count by class."""
        x, y = batch
        logits = self(x)
        self.test_acc.update(logits, y)
        loss = nn.functional.cross_entropy(logits, y)
        log = functools.partial(self.log, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(y))
        log("test_loss", loss, sync_dist=True)
        log("test_acc", self.test_acc)
        for metric in (self.class_accuracy, self.class_f2, self.class_rows, self.confusion):
            metric.update(logits, y)

    def on_test_epoch_end(self) -> None:
        """Log the metrics by class, and draw the confusion matrix."""
        accuracy, f2 = self.class_accuracy.compute(), self.class_f2.compute()
        rows = self.class_rows.compute()[:, 4]
        for name, own, score, count in zip(self.class_names, accuracy, f2, rows, strict=True):
            if count:
                self.log_dict({f"test_acc/{name}": own, f"test_f2/{name}": score, f"test_rows/{name}": count.float()})
        if self.confusion_plot is not None:
            self._draw(Path(self.confusion_plot))
        for metric in (self.class_accuracy, self.class_f2, self.class_rows, self.confusion):
            metric.reset()

    def _draw(self, path: Path) -> None:
        try:
            from matplotlib import pyplot
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'A figure needs matplotlib: pip install "lightning-bpfree[recipes]", or set confusion_plot to null.'
            ) from error
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        target = path if path.is_absolute() else folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        figure, axes = pyplot.subplots(figsize=(6, 5), layout="constrained")
        self.confusion.plot(ax=axes, labels=self.class_names)
        figure.savefig(target, dpi=150)
        pyplot.close(figure)
