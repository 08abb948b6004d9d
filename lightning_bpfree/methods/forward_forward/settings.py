"""Settings of learning and prediction by goodness, checked."""

from __future__ import annotations

import dataclasses

from lightning_bpfree.core.blocks import Cut
from lightning_bpfree.core.labels import LabelsOf
from lightning_bpfree.methods.forward_forward.goodness import Goodness, Length
from lightning_bpfree.methods.forward_forward.network import LabelInput, Negatives

CHOICES: dict[str, tuple[str, ...]] = {
    "prediction": ("goodness", "readout"),
    "goodness": ("sum", "mean"),
    "length": ("rms", "unit", "none"),
    "negatives": ("wrong_label", "hard", "hybrid"),
    "label": ("overlay", "embedding", "none"),
    "schedule": ("simultaneous", "greedy"),
}


@dataclasses.dataclass(frozen=True)
class GoodnessSettings:
    """See the arguments of ``ForwardForward``.

    Raises:
        ValueError: for arguments out of range, or that contradict each other.

    Examples:
        >>> GoodnessSettings(goodness="mean").threshold
        1.0
    """

    prediction: str = "goodness"
    goodness: Goodness = "sum"
    threshold: float = 1.0
    temperature: float = 1.0
    length: Length = "rms"
    negatives: str | Negatives = "wrong_label"
    label: str | LabelInput = "overlay"
    first_block: int = 0
    schedule: str = "simultaneous"
    epochs_per_block: int | None = None
    peer_normalization: float = 0.0
    num_classes: int | None = None
    labels: LabelsOf | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value, function = getattr(self, name), name in ("negatives", "label")
            if value not in allowed and not (function and callable(value)):
                shown = ", ".join(map(repr, allowed)) + " or a function" * function
                raise ValueError(f"{name}={value!r}: choose {shown}.")
        for name in ("threshold", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: give a number above 0.")
        for name, least in {"peer_normalization": 0, "first_block": 0, "epochs_per_block": 1, "num_classes": 2}.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise ValueError(f"{name}={value}: give a number of at least {least}.")
        self._check_labels()

    def _check_labels(self) -> None:
        if self.label == "none" and self.negatives in ("wrong_label", "hard"):
            raise ValueError(
                f"label='none' with negatives={self.negatives!r}: without labels in the input there are no wrong ones. "
                "Use negatives='hybrid', or a function that returns negative inputs."
            )
        if self.negatives == "hybrid" and self.label != "none":
            raise ValueError("negatives='hybrid' makes negatives without labels: pass label='none'.")
        if self.label == "none" and self.prediction == "goodness":
            raise ValueError(
                "label='none' with prediction='goodness': without labels in the input their goodness cannot be "
                "compared. Use prediction='readout'."
            )

    def check_cut(self, parts: Cut) -> None:
        """Raise ValueError if the settings do not go with a network's blocks."""
        if self.first_block >= len(parts.blocks):
            raise ValueError(f"first_block={self.first_block}: there are {len(parts.blocks)} blocks, counted from 0.")
        if self.prediction == "readout" and not parts.rest:
            raise ValueError(
                "prediction='readout': every layer is in a block, and none is left to read them out. Leave the last "
                "layer out of blocks, or use prediction='goodness'."
            )
