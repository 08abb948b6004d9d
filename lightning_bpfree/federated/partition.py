"""Splits of a training set over clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lightning_bpfree.core.arguments import NonNegativeInt, PositiveFloat, PositiveInt, Seed32, checked

_DRAWS = 100


@checked
def iid_partition(num_samples: NonNegativeInt, num_clients: PositiveInt, seed: Seed32 = 0) -> list[list[int]]:
    """Return the indices of each client's samples: a random split into parts that differ by at most one sample.

    Args:
        num_samples: total number of samples.
        num_clients: number of clients.
        seed: determines the split completely.

    Raises:
        ValueError: if a client would have no sample.

    Examples:
        >>> [len(part) for part in iid_partition(10, 3)]
        [4, 3, 3]
    """
    if num_clients > num_samples:
        raise ValueError(
            f"iid_partition: num_clients={num_clients}: there are {num_samples} samples, so that a client would have "
            "none; give as many clients as samples, or fewer."
        )
    order = np.random.RandomState(seed).permutation(num_samples)
    return [part.tolist() for part in np.array_split(order, num_clients)]


@checked
def dirichlet_partition(
    labels: Tensor,
    num_clients: PositiveInt,
    alpha: PositiveFloat,
    seed: Seed32 = 0,
    min_samples: PositiveInt = 1,
) -> list[list[int]]:
    """Return the indices of each client's samples, with unequal class shares.

    For every class, the shares of the clients are drawn from a symmetric Dirichlet distribution. The split is redrawn,
    up to 100 times, until every client has ``min_samples``.

    Args:
        labels: class of each sample, whole numbers of shape ``(N,)``.
        num_clients: number of clients.
        alpha: concentration, > 0: 0.3 is strongly unequal, 100 is nearly even.
        seed: determines the split completely.
        min_samples: minimum number of samples per client.

    Raises:
        ValueError: if no draw gives all clients enough samples.

    References:
        T. H. Hsu, H. Qi, M. Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
        Classification", 2019, arXiv 1909.06335.

    Examples:
        >>> parts = dirichlet_partition(torch.arange(1000) % 10, num_clients=5, alpha=0.3)
        >>> sorted(index for part in parts for index in part) == list(range(1000))
        True
    """
    state = np.random.RandomState(seed)
    classes = [torch.nonzero(labels == label).flatten().numpy() for label in sorted(set(labels.tolist()))]
    for _ in range(_DRAWS):
        parts: list[list[int]] = [[] for _ in range(num_clients)]
        for members in classes:
            shares = state.dirichlet([alpha] * num_clients)
            cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
            for part, own in zip(parts, np.split(state.permutation(members), cuts), strict=True):
                part.extend(own.tolist())
        if min(map(len, parts)) >= min_samples:
            return [state.permutation(part).tolist() for part in parts]
    raise ValueError(
        f"dirichlet_partition: alpha={alpha:g}: in {_DRAWS} draws a client had fewer than min_samples={min_samples} of "
        f"the {len(labels)} samples. Give a larger alpha, fewer clients than num_clients={num_clients}, or min_samples "
        "below it."
    )


class LocalData:
    """The samples of one client, in batches that a seed determines.

    Args:
        dataset: the data set of all samples.
        indices: the indices of the client's samples.
        batch_size: samples in a batch, at least 1.
        collate: builds a batch from items of the data set.

    Raises:
        ValueError: if the client has no samples.
    """

    def __init__(self, dataset: Any, indices: Sequence[int], batch_size: int, collate: Callable[[Any], Any]) -> None:
        if not len(indices):
            raise ValueError("LocalData: indices=[]: the client has no samples; leave it out, or split the data anew.")
        self.dataset, self.indices, self.batch_size, self.collate = dataset, list(indices), batch_size, collate

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, seed: int, num: int | None = None) -> list[tuple[Any, int]]:
        """Return batches with their numbers of samples.

        Args:
            seed: determines which samples are drawn, unless all are used.
            num: number of batches, with samples drawn without replacement; None for all samples in their order.
        """
        order = self.indices
        if num is not None:
            shuffled = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed)).tolist()
            order = [order[i] for i in shuffled[: num * self.batch_size]]
        chunks = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return [(self._fetch(chunk), len(chunk)) for chunk in chunks]

    def drawn(self, chances: Sequence[float], rate: float) -> list[tuple[Any, int]]:
        """Return samples that are drawn independently of each other, as privacy accounting assumes.

        Args:
            chances: a uniform number in (0, 1) for every sample.
            rate: the probability of each sample, in (0, 1].
        """
        order = [index for index, own in zip(self.indices, chances, strict=True) if own < rate]
        chunks = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return [(self._fetch(chunk), len(chunk)) for chunk in chunks]

    def _fetch(self, indices: list[int]) -> Any:
        at_once = getattr(self.dataset, "__getitems__", None)
        return self.collate(at_once(indices) if callable(at_once) else [self.dataset[i] for i in indices])


class Partition:
    """The training set of a data module, split over clients.

    Args:
        datamodule: any LightningDataModule with one training loader.
        num_clients: clients, at least 1.
        alpha: None for an even random split; else the concentration of :func:`dirichlet_partition`.
        seed: seed of the split.
        min_samples: minimum number of samples per client.
        batch_size: samples in a batch; None for the loader's.

    Raises:
        ValueError: if a client would have no data, or the split needs labels and batches have none.
    """

    @checked
    def __init__(
        self,
        datamodule: pl.LightningDataModule,
        num_clients: PositiveInt = 10,
        alpha: PositiveFloat | None = None,
        seed: Seed32 = 0,
        *,
        min_samples: PositiveInt = 1,
        batch_size: PositiveInt | None = None,
    ) -> None:
        datamodule.prepare_data()
        datamodule.setup("fit")
        self.loader: Any = datamodule.train_dataloader()
        dataset = getattr(self.loader, "dataset", None)
        if dataset is None or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"Partition: datamodule={type(datamodule).__name__}: train_dataloader() must be one DataLoader over "
                "a data set with a length, or there is nothing to split."
            )
        self.batch_size = batch_size or self.loader.batch_size or 64
        if alpha is None:
            self.indices = iid_partition(len(dataset), num_clients, seed)
        else:
            self.indices = dirichlet_partition(self.labels(), num_clients, alpha, seed, min_samples)

    def client(self, number: int) -> LocalData:
        """Return the data of client ``number``, counted from 0."""
        if not 0 <= number < len(self.indices):
            raise ValueError(
                f"Partition: client {number} of {len(self.indices)}: numbers are from 0 to {len(self.indices) - 1}; "
                "start each client with a partition-id in this range."
            )
        return LocalData(self.loader.dataset, self.indices[number], self.batch_size, self.loader.collate_fn)

    def labels(self) -> Tensor:
        """Return the class of every training sample, shape ``(N,)``: the second part of each batch."""
        every = LocalData(self.loader.dataset, range(len(self.loader.dataset)), 1024, self.loader.collate_fn)
        found = []
        for batch, num in every.batches(0):
            labels = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
            if not isinstance(labels, Tensor) or labels.shape != (num,) or labels.is_floating_point():
                raise ValueError(
                    "Partition: alpha splits by classes, for which batches must be pairs of inputs and whole-numbered "
                    "labels of shape (B,); use alpha=None for an even split."
                )
            found.append(labels)
        return torch.cat(found)
