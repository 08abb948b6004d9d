"""The arguments of ``LotteryTicket``: their checks, and the epochs of each level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_bpfree.core.arguments import FractionBelowOne, NonEmpty, OpenFraction, PositiveInt, checked
from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.methods.lottery_ticket.masks import Masks
from lightning_bpfree.methods.lottery_ticket.pruning import Scope, num_kept
from lightning_bpfree.methods.lottery_ticket.ticket import Ticket
from lightning_bpfree.training.trainer_attributes import is_dry_run

Score = Literal["snr", "magnitude", "random", "snip"]
Weights = Literal["init", "fresh", "permuted"]
Sparsities = Annotated[Sequence[FractionBelowOne], NonEmpty()]


@dataclass(frozen=True)
class Plan:
    """Which level trains in which epochs, and how sparse.

    Args:
        sparsities: cumulative, one a level.
        epochs_per_level: how many epochs a level trains.

    Examples:
        >>> plan = Plan.of(levels=3, keep=0.5, sparsities=None, epochs_per_level=2)
        >>> plan.sparsities, [plan.level_at(epoch) for epoch in range(8)]
        ([0.0, 0.5, 0.75], [0, 0, 1, 1, 2, 2, 2, 2])
    """

    sparsities: list[float]
    epochs_per_level: int

    @classmethod
    @checked
    def of(
        cls,
        levels: PositiveInt,
        keep: OpenFraction,
        sparsities: Sparsities | None,
        epochs_per_level: PositiveInt,
        start: FractionBelowOne = 0.0,
    ) -> Plan:
        """Return the plan that arguments of LotteryTicket describe.

        Args:
            levels: how many, >= 1.
            keep: the share of weights that every level keeps of those before it, in (0, 1).
            sparsities: replaces the two.
            epochs_per_level: >= 1.
            start: sparsity of the first level where ``sparsities`` does not say.

        Raises:
            ValueError: for sparsities that fall.
        """
        if sparsities is None:
            return cls([1 - (1 - start) * keep**level for level in range(levels)], epochs_per_level)
        given = list(sparsities)
        if given != sorted(given):
            raise ValueError(
                f"LotteryTicket: sparsities={given!r}: give the share of pruned weights for every level, in [0, 1), "
                "non-decreasing."
            )
        return cls(given, epochs_per_level)

    def behind(self, masks: Masks, keep: float, sparsities: Sequence[float] | None, score: Score) -> Plan:
        """Return the plan of a fit that begins with a ticket: given sparsities, or those that go on from its own.

        Raises:
            ValueError: if sparsities would bring weights back, or prune by deviations before any training.
        """
        if sparsities is None:
            return Plan.of(self.levels, keep, None, self.epochs_per_level, masks.sparsity)
        kept = [num_kept(masks.total, sparsity) for sparsity in sparsities]
        if max(kept) > masks.kept:
            raise ValueError(
                f"LotteryTicket: sparsities={list(sparsities)!r}: the ticket of init_from has "
                f"{masks.sparsity:.6g} of its weights pruned, and pruned weights stay pruned. "
                "Give sparsities of at least this value, or leave sparsities out."
            )
        if score == "snr" and kept[0] < masks.kept:
            raise ValueError(early_snr(sparsities))
        return self

    @property
    def levels(self) -> int:
        """How many levels there are."""
        return len(self.sparsities)

    def level_at(self, epoch: int) -> int:
        """Return the level that trains in an epoch; the last one trains on."""
        return min(epoch // self.epochs_per_level, self.levels - 1)

    def check_epochs(self, trainer: pl.Trainer) -> None:
        """Raise MisconfigurationException if the Trainer stops before the last level is through."""
        needed, given = self.levels * self.epochs_per_level, trainer.max_epochs
        if given is None or is_dry_run(trainer):
            return
        if 0 <= given < needed:
            raise MisconfigurationException(
                f"LotteryTicket trains {self.levels} levels of {self.epochs_per_level} epochs, {needed} in all, but "
                f"the Trainer stops at max_epochs={given}: set max_epochs={needed}, or use fewer levels."
            )
        if given != needed:
            more = "without end" if given < 0 else f"to epoch {given}"
            rank_zero_info(f"LotteryTicket needs {needed} epochs; the last level trains on, {more}.")


def early_snr(sparsities: Sequence[float]) -> str:
    """Return the error message for pruning by deviations before any training."""
    return (
        f"LotteryTicket: sparsities={list(sparsities)!r} prunes before the first level, when no weight has a "
        "deviation yet: begin with 0.0 (or the sparsity of the ticket in init_from), or use "
        "score='magnitude', 'random' or 'snip'."
    )


def described(masks: Masks) -> str:
    """Return how many weights are left, in all and in the first layers.

    Examples:
        >>> import torch
        >>> described(Masks({"w": torch.tensor([True, False])}))
        '1 of 2 weights left (50.00%): w 1'
    """
    parts = [f"{name} {kept:,}" for name, kept in masks.counts.items()]
    more = f" and {len(parts) - 6} more" if len(parts) > 6 else ""
    return f"{masks.kept:,} of {masks.total:,} weights left ({masks.weights_left:.2%}): {', '.join(parts[:6])}{more}"


@dataclass(frozen=True)
class TicketArguments:
    """The arguments of ``LotteryTicket``; see there.

    Raises:
        ValueError: for arguments that contradict each other.
    """

    score: Score
    levels: int
    keep: float
    sparsities: Sequence[float] | None
    epochs_per_level: int
    scope: Scope
    weights: Weights
    permute_masks: bool
    params: str | Sequence[str] | None
    exclude: str | Sequence[str] | None
    init_from: str | Path | Ticket | None
    seed: int | None

    def __post_init__(self) -> None:
        sparsities = self.plan.sparsities
        if self.sparsities is not None and (self.levels not in (8, len(sparsities)) or self.keep != 0.8):
            raise ValueError(
                f"LotteryTicket: levels={self.levels} and keep={self.keep} with sparsities={list(sparsities)!r}, "
                "which replaces them: leave out one of the two."
            )
        if self.score == "snr" and sparsities[0] > 0 and self.init_from is None:
            raise ValueError(early_snr(sparsities))

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the arguments."""
        return [field.name for field in fields(cls)]

    @property
    def plan(self) -> Plan:
        """Which level trains in which epochs."""
        return Plan.of(self.levels, self.keep, self.sparsities, self.epochs_per_level)

    def settings(self, plan: Plan) -> dict[str, Any]:
        """Return the arguments, as plain values that loggers take.

        Args:
            plan: the one that is followed, which may go on from a ticket.
        """
        names = ("score", "keep", "scope", "weights", "permute_masks", "params", "exclude", "init_from", "seed")
        values = {name: getattr(self, name) for name in names}
        plain = {name: v if isinstance(v, int | float | str | None) else _named(v) for name, v in values.items()}
        sparsities = str([round(sparsity, 6) for sparsity in plan.sparsities])
        return {**plain, "sparsities": sparsities, "epochs_per_level": plan.epochs_per_level}


def _named(value: Any) -> str:
    return f"a ticket of level {value.level}" if isinstance(value, Ticket) else str(value)


def prunable_names(
    module: nn.Module,
    params: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    trained: str | Sequence[str] | None,
) -> list[str]:
    """Return the names of the weights that may be pruned: trained matrices and larger, never biases.

    Args:
        module: the module.
        params: patterns of what may be pruned; None for all.
        exclude: patterns of what stays dense; None for nothing.
        trained: patterns of what the training rule trains; None for all.

    Raises:
        ValueError: if a pattern matches no parameter.
        MisconfigurationException: if nothing is left.
    """
    chosen = [slot for slot in ParameterSlots(module, params).trainable() if slot.parameter.dim() >= 2]
    dense = set() if exclude is None else {slot.name for slot in _excluded(module, exclude)}
    moving = {slot.name for slot in ParameterSlots(module, trained)}
    names = [slot.name for slot in chosen if slot.name in moving - dense]
    if not names:
        raise MisconfigurationException(
            f"LotteryTicket(params={params!r}, exclude={exclude!r}) leaves nothing to prune in "
            f"{type(module).__name__}: only trained parameters with at least two dimensions are pruned, not biases."
        )
    return names


def check_selects(
    params: str | Sequence[str] | None, exclude: str | Sequence[str] | None, names: list[str], masked: list[str]
) -> None:
    """Raise ValueError if patterns are given, and select ``names`` that are others than a ticket's ``masked`` ones."""
    if (params is not None or exclude is not None) and set(names) != set(masked):
        raise ValueError(
            f"params={params!r} and exclude={exclude!r} select {', '.join(names)}, but the ticket of init_from has "
            f"masks of {', '.join(masked)}: leave both out."
        )


def _excluded(module: nn.Module, exclude: str | Sequence[str]) -> ParameterSlots:
    try:
        return ParameterSlots(module, exclude)
    except ValueError as error:
        raise ValueError(str(error).replace("params=", "exclude=", 1)) from None
