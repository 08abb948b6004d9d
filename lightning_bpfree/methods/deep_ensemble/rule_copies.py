"""A training rule for each member: members train separately, with their own directions and search states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import lightning.pytorch as pl
from torch import nn

from lightning_bpfree.core.seeds import mix
from lightning_bpfree.methods.deep_ensemble.members import Members
from lightning_bpfree.training.module_state import SilencedLogging
from lightning_bpfree.training.training_rule import TrainingRule

R = TypeVar("R", bound=TrainingRule)
_HOOKS = ("on_train_epoch_start", "on_train_batch_start", "on_before_optimizer_step")


class RuleCopies:
    """The rules of all members: the Trainer's own for the first, and copies with their own seeds for the others.

    Args:
        rule: of the Trainer, which has begun its fit.
        trainer: the Trainer.
        module: the module.
        members: how many.
    """

    def __init__(self, rule: TrainingRule, trainer: pl.Trainer, module: pl.LightningModule, members: int) -> None:
        self.rule, self.trainer, self.module = rule, trainer, module
        seed = rule.record.seed or 0
        self.copies = [twin_of(rule, module, mix(seed, member)) for member in range(1, members)]

    def steps(self, original: Callable[..., Any]) -> list[Callable[..., Any]]:
        """Return the training step as each member's rule evaluates it."""
        return [partial(rule.run, self.trainer, self.module, original) for rule in (self.rule, *self.copies)]

    def forward(self, hook: str, members: Members, *args: Any) -> None:
        """Call a hook of the copies, each while its member is at work."""
        for member, clone in enumerate(self.copies, start=1):
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
        """Restore their states, except the random streams, which belong to the members."""
        for clone, state in zip(self.copies, states, strict=True):
            clone.load_state_dict({**state, "streams": []})


def twin_of(rule: R, module: nn.Module, seed: int) -> R:
    """Return a copy of a rule that is in a fit, for other weights that take turns in the module.

    The copy shares what refers to the module. All else is its own: search states, auxiliary modules, counters. It is no
    callback of the Trainer: the caller evaluates its step by :meth:`TrainingRule.run` and passes hooks on to it.

    Args:
        rule: the rule.
        module: that it trains.
        seed: seed of the copy's random directions.

    Raises:
        RuntimeError: outside of a fit.
    """
    if rule.original_step is None:
        raise RuntimeError(f"{type(rule).__name__} is in no fit, so that a twin of it would know no module.")
    shared = [*module.modules(), *module.parameters(), *module.buffers()]
    twin = copy.copy(rule)
    own = {name: value for name, value in twin.__dict__.items() if name not in rule.of_a_fit}
    twin.__dict__.update(copy.deepcopy(own, {id(part): part for part in shared}))
    twin.__dict__.update({name: rule.__dict__[name] for name in rule.of_a_fit if name in rule.__dict__})
    twin.record.seed = seed
    return twin
