"""A training rule for each member: members are trained apart, with directions and search states of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl

from lightning_bpfree.core.seeds import mix
from lightning_bpfree.methods.deep_ensemble.members import Members
from lightning_bpfree.training.module_state import SilencedLogging
from lightning_bpfree.training.record import Record
from lightning_bpfree.training.training_rule import TrainingRule

_SHARED = {"_swap", "_module_state", "_streams", "observers", "_slots", "masks"}  # that know the module, not the member
_HOOKS = ("on_train_epoch_start", "on_train_batch_start", "on_before_optimizer_step")


class RuleCopies:
    """The rules of all members: the Trainer's own for the first, and copies of it, with seeds of their own.

    Args:
        rule: of the Trainer, which has begun its fit.
        trainer: the Trainer.
        module: the module.
        members: how many.
    """

    def __init__(self, rule: TrainingRule, trainer: pl.Trainer, module: pl.LightningModule, members: int) -> None:
        self.rule, self.trainer, self.module = rule, trainer, module
        self.copies = [self._copy(member) for member in range(1, members)]

    def _copy(self, member: int) -> TrainingRule:
        rule = self.rule
        known = [self.trainer, *self.module.modules(), *self.module.parameters(), *self.module.buffers()]
        memo = {id(thing): thing for thing in known}
        clone = copy.copy(rule)
        own = {key: value for key, value in rule.__dict__.items() if key not in _SHARED}
        clone.__dict__.update(copy.deepcopy(own, memo))
        clone.__dict__.update({key: value for key, value in rule.__dict__.items() if key in _SHARED})
        clone.observers = []
        clone.record = Record(type(rule).__name__)
        clone.record.load_state_dict(rule.record.state_dict())
        clone.record.seed = mix(rule.record.seed or 0, member)
        return clone

    def steps(self, original: Callable[..., Any]) -> list[Callable[..., Any]]:
        """Return the training step as each member's rule evaluates it."""
        return [partial(rule._run, self.trainer, self.module, original) for rule in (self.rule, *self.copies)]

    def forward(self, hook: str, members: Members, *args: Any) -> None:
        """Call a hook of the copies, each while its member is at work."""
        for member, clone in enumerate(self.copies, start=1):
            clone._module_state = self.rule._module_state
            with members.at_work(member, grads=hook == "on_before_optimizer_step"), self._silent():
                getattr(clone, hook)(self.trainer, self.module, *args)

    @contextmanager
    def _silent(self) -> Iterator[None]:
        with SilencedLogging(self.module)():
            yield

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the states of the copies."""
        return [clone.state_dict() for clone in self.copies]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Take back their states."""
        for clone, state in zip(self.copies, states, strict=True):
            clone.load_state_dict(state)
            clone._streams.take([])  # the streams are the members'
