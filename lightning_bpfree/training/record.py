"""The record of a training rule: counters, history of epochs, banner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.nn.parameter import is_lazy

from lightning_bpfree.core.params import ParameterSlots

if TYPE_CHECKING:
    from lightning_bpfree.training.training_rule import TrainingRule

# What every rule logs, with its meaning.
LOGGED = {
    "bpfree/loss": "the loss of the training step, without perturbation",
    "bpfree/grad_norm": "norm of the estimated gradient, after the averaging over ranks and before clipping",
    "bpfree/forward_evals": "forward passes used since the start of the fit; backprop counts 3 a batch",
    "bpfree/active": "1 if the rule trains this epoch, 0 if plain backprop does",
    "bpfree/bytes_sent": "bytes sent to other ranks since the start of the fit (ScalarSyncStrategy only)",
}


class Record:
    """Counters and history of one rule, saved with the checkpoint.

    Args:
        rule: the rule's name.
    """

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.reset()

    def reset(self) -> None:
        """Reset counters and history."""
        self.seed: int | None = None
        self.batches = 0
        self.forward_evals = 0.0
        self.skipped = 0
        self.history: list[dict[str, Any]] = []

    def start_epoch(self, epoch: int, active: bool) -> None:
        """Record which rule trains this epoch; consecutive epochs of one rule share an entry."""
        name = self.rule if active else "Backprop"
        last = self.history[-1] if self.history else None
        if last is not None and last["rule"] == name and last["last_epoch"] >= epoch - 1:
            last["last_epoch"] = max(epoch, last["last_epoch"])
        else:
            self.history.append({"rule": name, "first_epoch": epoch, "last_epoch": epoch})

    def has_started(self, epoch: int, active: bool) -> bool:
        """Whether the record already has an entry for this epoch."""
        last = self.history[-1] if self.history else None
        return (
            last is not None and last["rule"] == (self.rule if active else "Backprop") and last["last_epoch"] == epoch
        )

    def trained_last(self, otherwise: bool) -> bool:
        """Whether the rule trained the last epoch; ``otherwise`` if there was none."""
        return bool(self.history[-1]["rule"] == self.rule) if self.history else otherwise

    def state_dict(self) -> dict[str, Any]:
        """Return the record in plain values."""
        return {
            "seed": self.seed,
            "batches": self.batches,
            "forward_evals": self.forward_evals,
            "skipped": self.skipped,
            "history": [dict(entry) for entry in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a record."""
        self.seed, self.batches = state["seed"], state["batches"]
        self.forward_evals, self.skipped = state["forward_evals"], state["skipped"]
        self.history = [dict(entry) for entry in state["history"]]

    def check_origin(self, origin: dict[str, Any] | None, strict: bool) -> None:
        """Warn, or raise if ``strict``, if a checkpoint was trained by another rule; continue its history."""
        if origin is not None and origin["rule"] == self.rule:
            return
        before = "no training rule of this package" if origin is None else origin["rule"]
        message = f"This checkpoint was trained by {before}; {self.rule} takes over from here."
        if strict:
            raise MisconfigurationException(f"{message} strict_rule=True forbids it: resume with {before}.")
        if origin is not None:
            self.history = [dict(entry) for entry in origin["history"]]
        rank_zero_warn(message)


def banner(rule: TrainingRule, slots: ParameterSlots, trainer: pl.Trainer) -> str:
    """Return the table that a run prints at its start: the rule, what it trains, and the cost of a step."""
    lazy = [slot for slot in [*slots, *slots.rest] if is_lazy(slot.parameter)]
    trained = sum(slot.parameter.numel() for slot in slots.trainable() if not is_lazy(slot.parameter))
    total = sum(slot.parameter.numel() for slot in [*slots, *slots.rest] if not is_lazy(slot.parameter))
    more = f", and {len(lazy)} tensors that the first batch creates" if lazy else ""
    stop = "end" if rule.stop_epoch is None else str(rule.stop_epoch - 1)
    always = rule.start_epoch == 0 and rule.stop_epoch is None
    rows = {
        "training rule": type(rule).__name__,
        "parameters": f"{trained:,} of {total:,}{more}" + (f" ({rule.params})" if rule.params else ""),
        **rule.describe(),
        "epochs": "all" if always else f"{rule.start_epoch} to {stop}; plain backprop in all others",
        "ranks": f"{trainer.world_size} ({type(trainer.strategy).__name__})",
        "seed": str(rule.record.seed),
    }
    width = max(len(key) for key in rows)
    lines = [f" {key:<{width}} | {value}" for key, value in rows.items()]
    rule_line = "-" * max(len(line) for line in lines)
    return "\n".join(["", rule_line, *lines, rule_line])
