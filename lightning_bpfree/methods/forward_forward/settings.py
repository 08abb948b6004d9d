"""Settings of learning and prediction by goodness, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from lightning_bpfree.core.blocks import Cut
from lightning_bpfree.core.labels import LabelsOf
from lightning_bpfree.core.network.network_call import RefusedError
from lightning_bpfree.methods.forward_forward.goodness import Goodness, Length

LabelInput = Callable[[Tensor, Tensor | None], Tensor]
Negatives = Callable[[Tensor, Tensor], Tensor]
Prediction = Literal["goodness", "readout"]
NegativesKind = Literal["wrong_label", "hard", "hybrid"]
LabelKind = Literal["overlay", "embedding", "none"]
Schedule = Literal["simultaneous", "greedy"]


@dataclasses.dataclass(frozen=True)
class GoodnessSettings:
    """See the arguments of ``ForwardForward``.

    Raises:
        ValueError: for arguments that contradict each other.

    Examples:
        >>> GoodnessSettings(goodness="mean").threshold
        1.0
    """

    prediction: Prediction = "goodness"
    goodness: Goodness = "sum"
    threshold: float = 1.0
    temperature: float = 1.0
    length: Length = "rms"
    negatives: NegativesKind | Negatives = "wrong_label"
    label: LabelKind | LabelInput = "overlay"
    first_block: int = 0
    schedule: Schedule = "simultaneous"
    epochs_per_block: int | None = None
    embedding_lr: float = 0.01
    num_classes: int | None = None
    labels: LabelsOf | None = None

    def __post_init__(self) -> None:
        if self.epochs_per_block is not None and self.schedule != "greedy":
            raise ValueError(
                f"ForwardForward: epochs_per_block={self.epochs_per_block} is for schedule='greedy', and "
                f"schedule={self.schedule!r}: leave it out, or use schedule='greedy'."
            )
        if self.embedding_lr != GoodnessSettings.embedding_lr and self.label != "embedding":
            raise ValueError(
                f"ForwardForward: embedding_lr={self.embedding_lr} is for label='embedding', and label={self.label!r}: "
                "leave it out."
            )
        if self.labels is not None and self.label == "none" and self.negatives == "hybrid":
            raise ValueError(
                "ForwardForward: labels takes labels out of a batch, and with label='none', negatives='hybrid' none is "
                "needed: leave labels out."
            )
        if self.label == "none" and self.negatives in ("wrong_label", "hard"):
            raise ValueError(
                f"ForwardForward: label='none' with negatives={self.negatives!r}: without labels in the input there "
                "are no wrong ones. Use negatives='hybrid', or a function that returns negative inputs."
            )
        if self.negatives == "hybrid" and self.label != "none":
            raise ValueError("ForwardForward: negatives='hybrid' makes negatives without labels: pass label='none'.")
        if self.label == "none" and self.prediction == "goodness":
            raise ValueError(
                "ForwardForward: label='none' with prediction='goodness': without labels in the input their goodness "
                "cannot be compared. Use prediction='readout'."
            )

    def check_cut(self, parts: Cut) -> None:
        """Raise ValueError if the settings do not go with a network's blocks."""
        if self.first_block >= len(parts.blocks):
            raise RefusedError(
                f"ForwardForward: first_block={self.first_block}: there are {len(parts.blocks)} blocks, counted from 0."
            )
        if self.prediction == "readout" and not parts.rest:
            raise RefusedError(
                "ForwardForward: prediction='readout': every layer is in a block, and none is left for the readout. "
                "Leave the last layer out of blocks, or use prediction='goodness'."
            )
