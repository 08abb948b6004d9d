"""The labels of a batch, for rules whose losses are not the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LabelsOf = Callable[[Any], Tensor]


def labels_of(batch: Any, rows: int, num_classes: int, pick: LabelsOf | None = None) -> Tensor:
    """Return the labels of a batch, int64 of shape ``(rows,)``.

    Args:
        batch: what the data loader gives; without ``pick`` a pair of inputs and labels.
        rows: number of samples that the network sees.
        num_classes: labels are below it.
        pick: takes the labels out of a batch of another form.

    Raises:
        ValueError: if there are no such labels; the message says what was found.

    Examples:
        >>> labels_of([torch.zeros(2, 4), torch.tensor([0, 2])], rows=2, num_classes=3)
        tensor([0, 2])
    """
    if pick is not None:
        labels = pick(batch)
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        labels = batch[1]
    else:
        raise ValueError(
            f"labels: the batch is a {type(batch).__name__}, not a pair (inputs, labels); pass a function that "
            "takes the labels out of it, labels=lambda batch: batch['label']."
        )
    if not isinstance(labels, Tensor) or labels.shape != (rows,) or labels.is_floating_point():
        found = (
            f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        )
        raise ValueError(f"labels: found {found}; needed are whole numbers of shape ({rows},), one a sample.")
    labels = labels.to(torch.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels: values from {low} to {high} in a batch, but there are {num_classes} classes: labels run from "
            f"0 to {num_classes - 1}. Set num_classes, or relabel."
        )
    return labels
