"""The labels of a batch, for rules that do not use the user's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_bpfree.core.network.network_call import LABELS, RefusedError

LabelsOf = Callable[[Any], Tensor]


def labels_of(
    batch: Any, rows: int, num_classes: int, pick: LabelsOf | None = None, given: Tensor | None = None
) -> Tensor:
    """Return the labels of a batch, int64 of shape ``(rows,)``.

    Args:
        batch: a batch of the data loader; without ``pick``, a pair of inputs and labels, or a mapping with ``labels``.
        rows: number of samples that the network receives.
        num_classes: labels are less than this.
        pick: extracts the labels from a batch of another form.
        given: the labels that the network was called with, if any; they take precedence over the batch.

    Raises:
        RefusedError: if there are no such labels; the message says what was found.

    Examples:
        >>> labels_of([torch.zeros(2, 4), torch.tensor([0, 2])], rows=2, num_classes=3)
        tensor([0, 2])
        >>> labels_of({"x": torch.zeros(2, 4), "labels": torch.tensor([0, 2])}, rows=2, num_classes=3)
        tensor([0, 2])
    """
    labels = _picked(batch, pick, given)
    if not isinstance(labels, Tensor) or labels.shape != (rows,) or labels.is_floating_point():
        found = (
            f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        )
        raise RefusedError(
            f"labels: found {found}; needed are whole numbers of shape ({rows},), one a sample. Pass a function that "
            "takes such labels out of the batch, labels=lambda batch: ...; a network that is trained by numbers or by "
            "tokens has none."
        )
    labels = labels.to(torch.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise RefusedError(
            f"labels: values from {low} to {high} in a batch, but there are {num_classes} classes: labels run from "
            f"0 to {num_classes - 1}. Set num_classes, or relabel."
        )
    return labels


def _picked(batch: Any, pick: LabelsOf | None, given: Tensor | None) -> Any:
    if pick is not None:
        return pick(batch)
    if given is not None:
        return given
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[1]
    named = [name for name in (*LABELS, "y") if name in batch] if isinstance(batch, Mapping) else []
    if len(named) == 1:
        return batch[named[0]]
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        kind += f" with {', '.join(map(repr, batch))}"
    example = "labels=lambda batch: batch['label']" if isinstance(batch, Mapping) else "labels=lambda batch: batch[-1]"
    raise RefusedError(
        f"labels: the batch is a {kind}, not a pair (inputs, labels) or a dict with 'labels'; pass a function that "
        f"takes the labels out of it, {example}."
    )
