"""The arguments of an ensemble, checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from lightning_bpfree.core.seeds import mix
from lightning_bpfree.methods.deep_ensemble.activations import check_activations
from lightning_bpfree.methods.deep_ensemble.combining.aggregation import check_weights
from lightning_bpfree.methods.deep_ensemble.combining.combination import Combine, Task
from lightning_bpfree.methods.deep_ensemble.combining.report import TargetsOf
from lightning_bpfree.methods.deep_ensemble.initialization import Initialize

Route = Literal["auto", "stacked", "sequential"]


@dataclass
class Settings:
    """What :class:`DeepEnsemble` was given; its documentation explains the fields.

    Raises:
        ValueError: for values that do not go together, with the names of the arguments.
    """

    members: int
    activations: Sequence[str] | None
    combine: Combine
    task: Task
    weights: Sequence[float] | None
    bootstrap: bool
    lr_factors: Sequence[float]
    initialize: Initialize
    seed: int | Sequence[int] | None
    route: Route
    network: str | None
    probabilities: bool
    class_dim: int | None
    targets: TargetsOf

    def __post_init__(self) -> None:
        """Check the fields against each other."""
        if self.activations is not None:
            check_activations(self.activations, self.members)
        if self.weights is not None:
            check_weights(self.weights, self.members)
        self._check_combination()
        factors = self.lr_factors or [1.0] * self.members
        if len(factors) != self.members:
            raise ValueError(
                f"lr_factors={list(factors)}: give {self.members} numbers above 0, by which each member's learning "
                "rate differs from the one configured."
            )
        self.lr_factors = [float(factor) for factor in factors]
        if isinstance(self.seed, Sequence) and (len(self.seed) != self.members or len(set(self.seed)) < self.members):
            raise ValueError(
                f"seed={list(self.seed)}: give {self.members} different seeds, one a member, or one for all."
            )

    def _check_combination(self) -> None:
        if self.combine == "stack" and self.weights is not None:
            raise ValueError("combine='stack' fits the weights itself: leave weights=None.")
        if self.combine == "vote" and self.task == "regression":
            raise ValueError("combine='vote' counts classes, and task='regression' has none: use combine='mean'.")

    def seeds(self, base: int) -> list[int]:
        """Return a 32-bit seed for each member, as ``seed_everything`` takes them."""
        if isinstance(self.seed, Sequence):
            return [int(seed) for seed in self.seed]
        start = base if self.seed is None else self.seed
        return [mix(start, member) >> 31 for member in range(self.members)]

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain values that loggers and checkpoints take."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v if isinstance(v, int | float | str | None) else _named(v) for name, v in values.items()}


def _named(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__) if callable(value) else str(list(value))
