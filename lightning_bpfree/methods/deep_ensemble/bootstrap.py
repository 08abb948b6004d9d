"""A bootstrap sample of the training set for each member: every batch holds one batch per member."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_bpfree.core.arguments import PositiveInt, checked
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.methods.deep_ensemble.overriding import overridden

_STREAM = 0xB007  # apart from all other uses of a member's seed


@checked
def bootstrap_rows(samples: PositiveInt, seed: int) -> Tensor:
    """Return the indices of a bootstrap sample, int64 ``(samples,)``: drawn with replacement, determined by ``seed``.

    Training a member alone on ``torch.utils.data.Subset(data, bootstrap_rows(len(data), seed))``, with the member's
    seed, is equivalent to training it in the ensemble.

    Examples:
        >>> rows = bootstrap_rows(1000, seed=0)
        >>> 600 < len(rows.unique()) < 660  # about 63 % of the samples
        True
    """
    return torch.randint(samples, (samples,), generator=torch.Generator().manual_seed(mix(seed, _STREAM)))


class MemberBatches(Dataset[Any]):
    """A data set that returns one sample for each member instead of one sample.

    Args:
        dataset: of the user, with a length.
        rows: ``(M, N)``: index of the sample that each member gets instead of the n-th.
    """

    def __init__(self, dataset: Any, rows: Tensor) -> None:
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return self.rows.shape[1]

    def __getitem__(self, index: int) -> list[Any]:
        return [self.dataset[row] for row in self.rows[:, index].tolist()]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return what the user's data set gives for a batch, for each member."""
        own = self.rows[:, torch.as_tensor(indices)].tolist()
        together = getattr(self.dataset, "__getitems__", None)
        return [together(rows) if together else [self.dataset[row] for row in rows] for rows in own]


class MemberCollate:
    """Collates the batches of all members by the user's function.

    Args:
        collate: of the user's data loader.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, batches: Sequence[Any]) -> list[Any]:
        """Return a list of M batches."""
        return [self.collate(batch) for batch in batches]


class Bootstrap:
    """Gives the Trainer data loaders with a batch for each member, for the time of a fit.

    Args:
        trainer: the Trainer, before it has loaded its training data.
        module: the module.
        seeds: seeds of the members.

    Raises:
        MisconfigurationException: if members cannot have their own batches.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)
        for owner in (module, trainer.datamodule):  # type: ignore[attr-defined]
            for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
                if owner is not None and overridden(hook, owner):
                    raise MisconfigurationException(
                        f"DeepEnsemble(bootstrap=True) gives {hook} of {type(owner).__name__} a list with a batch for "
                        "each member, which it does not expect: do its work in the data set or in training_step."
                    )
        self._source = cast("Any", trainer.fit_loop._data_source)
        original = self._source.dataloader
        self._source.dataloader = lambda: tree_map(self.bootstrapped, original())  # a collection of loaders, or one

    def undo(self) -> None:
        """Restore the Trainer's own data loading."""
        self._source.__dict__.pop("dataloader", None)

    def bootstrapped(self, loader: Any) -> Any:
        """Return a data loader like ``loader``, with a batch for each member.

        Raises:
            MisconfigurationException: for anything but a DataLoader that batches samples of known number.
        """
        dataset = getattr(loader, "dataset", None)
        known = (
            isinstance(loader, DataLoader) and not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__")
        )
        if not known or loader.batch_sampler is None:
            raise MisconfigurationException(
                "DeepEnsemble(bootstrap=True) draws from a training set of known size: give a DataLoader over a data "
                f"set with a length and with a batch_size, not {type(loader).__name__} over {type(dataset).__name__}."
            )
        rows = torch.stack([bootstrap_rows(len(dataset), seed) for seed in self.seeds])  # type: ignore[arg-type]
        clone: Any = copy.copy(loader)
        object.__setattr__(clone, "dataset", MemberBatches(dataset, rows))  # a DataLoader lets nobody assign it
        clone.__dict__["collate_fn"] = MemberCollate(loader.collate_fn)
        return clone
