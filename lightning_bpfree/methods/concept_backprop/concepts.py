"""Definition of a concept: a name, and the source of its labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import Name, checked

Kind = Literal["binary", "continuous"]
LabelFunction = Callable[[Any, Any], Any]

MIN_OF_A_CLASS = 10  # of each class, or of all samples of a continuous concept: fewer give no held-out score


class Concept:
    """A concept, and the source of its labels: a function, a key of the batch, or labeled examples.

    Args:
        name: the name under which scores are logged.
        label: function ``(inputs, targets) -> labels``, one label per sample; targets are the second part of a batch
            that is a pair, and the whole batch otherwise.
        key: key of the labels in a batch that is a mapping, or position in one that is a sequence.
        examples: your own pair (inputs, labels), which is used instead of the data.
        kind: ``"binary"``: labels 0 and 1, or booleans; ``"continuous"``: any finite numbers. NaN labels are left out.

    Raises:
        ValueError: unless exactly one source of labels is given; if examples and labels differ in length.

    Examples:
        >>> Concept("large", label=lambda x, y: x.sum(1) > 1)
        Concept('large', binary)
    """

    @checked
    def __init__(
        self,
        name: Name,
        label: LabelFunction | None = None,
        *,
        key: str | int | None = None,
        examples: tuple[Tensor, Any] | None = None,
        kind: Kind = "binary",
    ) -> None:
        given = [n for n, v in (("label", label), ("key", key), ("examples", examples)) if v is not None]
        if len(given) != 1:
            raise ValueError(
                f"concept {name!r}: give one of label=, key= and examples=, not {' and '.join(given) or 'none'}."
            )
        if "/" in name:
            raise ValueError(f"Concept: name={name!r}: give a name without '/', which separates parts of a metric.")
        if examples is not None and len(examples[0]) != len(torch.as_tensor(examples[1])):
            raise ValueError(
                f"concept {name!r}: {len(torch.as_tensor(examples[1]))} labels for {len(examples[0])} examples; give "
                "one label an example."
            )
        self.name, self.label, self.key, self.examples, self.kind = name, label, key, examples, kind

    def __repr__(self) -> str:
        return f"Concept({self.name!r}, {self.kind})"

    def labels(self, batch: Any, inputs: Any) -> Tensor:
        """Return the labels of a batch, float64 of shape (B,).

        Args:
            batch: a batch of the data loader.
            inputs: the network's inputs from this batch.

        Raises:
            ValueError: for labels of the wrong length, values that the kind does not allow, or an unknown key.
        """
        found = self.label(inputs, target_of(batch)) if self.label else _at(batch, self.key, self.name)
        return self.checked(found, len(inputs))

    def checked(self, found: Any, rows: int) -> Tensor:
        """Return labels as float64, or raise ValueError if they cannot be labels of this number of samples."""
        labels = torch.as_tensor(found).detach().to("cpu", torch.float64)
        if labels.shape != (rows,):
            raise ValueError(
                f"concept {self.name!r}: labels of shape {tuple(labels.shape)} for {rows} samples; give one label a "
                f"sample, shape ({rows},)."
            )
        known = labels[~labels.isnan()]
        if self.kind == "binary" and not ((known == 0) | (known == 1)).all():
            raise ValueError(
                f"concept {self.name!r}: labels from {known.min():g} to {known.max():g}; a binary concept has 0 and 1 "
                "(NaN: unknown). Pass kind='continuous' for other values."
            )
        if known.isinf().any():
            raise ValueError(f"concept {self.name!r}: infinite labels; give finite numbers, or NaN where unknown.")
        return labels


class Labeled(NamedTuple):
    """A sample set of one concept."""

    rows: Tensor
    labels: Tensor


def known(concept: Concept, labels: Tensor) -> Labeled:
    """Return the rows whose label is known, and their labels.

    Raises:
        ValueError: if the concept has one class only, or fewer examples than a probe needs.
    """
    rows = torch.nonzero(~labels.isnan()).squeeze(1)
    values = labels[rows]
    if concept.kind == "binary":
        counts = {0: int((values == 0).sum()), 1: int((values == 1).sum())}
        if min(counts.values()) < MIN_OF_A_CLASS:
            state = "one class only" if min(counts.values()) == 0 else "too few examples"
            raise ValueError(
                f"concept {concept.name!r}: {state}: {counts[1]} with it and {counts[0]} without; a probe needs "
                f"{MIN_OF_A_CLASS} of each at least. Give more data (max_samples=), or another concept."
            )
    elif len(values) < 2 * MIN_OF_A_CLASS or float(values.std()) == 0:
        state = "one value only" if len(values) and float(values.max()) == float(values.min()) else "too few examples"
        raise ValueError(
            f"concept {concept.name!r}: {state} in {len(values)} samples; a probe of a continuous concept needs "
            f"{2 * MIN_OF_A_CLASS} samples that differ."
        )
    return Labeled(rows, values)


def as_concepts(concepts: Concept | Sequence[Concept] | Mapping[str, LabelFunction | str]) -> list[Concept]:
    """Return concepts in a list; a mapping from names gives label functions, or keys of the batch.

    Raises:
        ValueError: for no concept, or two of the same name.

    Examples:
        >>> as_concepts({"large": lambda x, y: x > 1, "old": "is_old"})
        [Concept('large', binary), Concept('old', binary)]
    """
    if isinstance(concepts, Concept):
        found = [concepts]
    elif isinstance(concepts, Mapping):
        found = [Concept(n, key=v) if isinstance(v, str) else Concept(n, v) for n, v in concepts.items()]
    else:
        found = list(concepts)
    names = [concept.name for concept in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"concepts: {names}; give one at least, each with a name of its own.")
    return found


def target_of(batch: Any) -> Any:
    """Return the second part of a batch that is a pair; the batch itself otherwise."""
    return batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else batch


def input_of(batch: Any, inputs: str | int | Callable[[Any], Any] | None = None) -> Any:
    """Return the part of a batch that the network sees.

    Args:
        batch: what the data loader gives.
        inputs: its key or position, or a function of the batch; None for the first part of a sequence, or the batch.

    Raises:
        ValueError: for a mapping without ``inputs``, or an unknown key.
    """
    if callable(inputs):
        return inputs(batch)
    if inputs is not None:
        return _at(batch, inputs, "inputs")
    if isinstance(batch, Mapping):
        raise ValueError(f"inputs: the batch is a mapping with keys {list(batch)}; name the one that the network sees.")
    return batch[0] if isinstance(batch, tuple | list) else batch


def _at(batch: Any, key: str | int | None, name: str) -> Any:
    try:
        return batch[key]
    except (KeyError, IndexError, TypeError) as error:
        keys = list(batch) if isinstance(batch, Mapping) else f"0 to {len(batch) - 1}"
        raise ValueError(f"{name!r}: the batch has no {key!r}; it has {keys}.") from error
