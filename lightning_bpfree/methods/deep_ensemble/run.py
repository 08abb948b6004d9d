"""One ensemble in one module: storage, evaluation and updates of its members during a fit."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_bpfree.methods.deep_ensemble.activations import MemberActivations
from lightning_bpfree.methods.deep_ensemble.captured_log import CapturedLog
from lightning_bpfree.methods.deep_ensemble.checks import why_in_turn
from lightning_bpfree.methods.deep_ensemble.in_turn import InTurn
from lightning_bpfree.methods.deep_ensemble.member_hooks import MemberHooks
from lightning_bpfree.methods.deep_ensemble.members import Members, State
from lightning_bpfree.methods.deep_ensemble.optimizers import (
    MemberOptimizers,
    move_to_module,
    move_to_stacks,
    one_for_each,
    only_optimizer,
    why_not_stacked,
)
from lightning_bpfree.methods.deep_ensemble.rule_copies import RuleCopies
from lightning_bpfree.methods.deep_ensemble.settings import Settings
from lightning_bpfree.methods.deep_ensemble.streams import MemberStreams
from lightning_bpfree.methods.deep_ensemble.vectorized.per_member import AtWork
from lightning_bpfree.methods.deep_ensemble.vectorized.side_by_side import NotStackableError, SideBySide
from lightning_bpfree.training.step_swap import StepSwap
from lightning_bpfree.training.trainer_attributes import callbacks_of
from lightning_bpfree.training.training_rule import TrainingRule


class EnsembleRun:
    """The members of one module, and how they compute.

    Args:
        module: the module.
        states: the members' parameters and buffers.
        seeds: the members' seeds.
        settings: settings of the ensemble.
    """

    def __init__(
        self, module: pl.LightningModule, states: Sequence[State], seeds: Sequence[int], settings: Settings
    ) -> None:
        self.module, self.seeds, self.settings = module, list(seeds), settings
        self.at_work = AtWork(settings.members)
        self.activations = MemberActivations(module, settings.activations, self.at_work)
        self.members = Members(module, states, stacked=False)
        self.streams = MemberStreams(seeds, module.device)
        self.log = CapturedLog(module)
        self.side_by_side = False
        self.reason: str | None = None
        self.rules: RuleCopies | None = None
        self._side: SideBySide | None = None
        self._turn: InTurn | None = None
        self._swap: StepSwap | None = None
        self._hooks: MemberHooks | None = None
        self._settled = False

    # --- the route ---

    def start(self, trainer: pl.Trainer, owner: Callback, resumed: dict[str, Any] | None) -> None:
        """Take over the module's training step and the Trainer's optimizer; called once there are optimizers.

        Args:
            trainer: the Trainer.
            owner: the callback that the ensemble belongs to.
            resumed: ``side_by_side``, ``stacked`` and ``reason`` of a checkpoint; None to choose.
        """
        optimizer = only_optimizer(trainer)
        self.reason = why_in_turn(trainer, self.module) if resumed is None else resumed["reason"]
        if self.settings.route == "sequential" and resumed is None:
            self.reason = "route='sequential'"
        elif self.settings.route == "stacked" and resumed is None:
            self._refuse_rules(trainer)
            self.reason = None
        self.side_by_side = self.reason is None if resumed is None else resumed["side_by_side"]
        self._settled = resumed is not None
        stacked = (
            why_not_stacked(optimizer, self.settings.lr_factors) is None if resumed is None else resumed["stacked"]
        )
        self._arrange(trainer, stacked and self.side_by_side)
        self.activations.install()
        # In the place of a rule's own swap: the rule runs for each member, from within the ensemble's step.
        self._swap = StepSwap(trainer, self.module, owner, partial(self._step, trainer))

    def _refuse_rules(self, trainer: pl.Trainer) -> None:
        rules = callbacks_of(trainer, TrainingRule)
        if rules:
            raise MisconfigurationException(
                f"DeepEnsemble(route='stacked') with {type(rules[0]).__name__}, which evaluates each member by itself: "
                "leave route='auto'."
            )

    def _arrange(self, trainer: pl.Trainer, stacked: bool) -> None:
        """Keep the members stacked or apart, with the optimizers that belong to it."""
        optimizer = only_optimizer(trainer)
        if isinstance(optimizer, MemberOptimizers):
            optimizer = optimizer.optimizers[0]
            trainer.strategy.optimizers = [optimizer]
        if self.members.stacked:
            move_to_module(optimizer, self.members)
        if self.members.stacked != stacked:
            states = [self.members.state(m) for m in range(self.members.count)]
            self.members.release()
            self.members = Members(self.module, states, stacked)
        if stacked:
            move_to_stacks(optimizer, self.members)
        else:
            one_for_each(trainer, self.module, self.members, self.settings.lr_factors)
        if self._hooks is not None:
            self._hooks.undo()
        wrapped = trainer.strategy.optimizers[0]
        each = wrapped.optimizers if isinstance(wrapped, MemberOptimizers) else []
        clip: Any = trainer
        self._hooks = MemberHooks(self.module, self.members, each, clip.gradient_clip_val, clip.gradient_clip_algorithm)
        shared = (self.module, self.members, self.streams, self.log, self.at_work)
        self._side = SideBySide(*shared, own_batches=self.settings.bootstrap) if self.side_by_side else None
        self._turn = None if self.side_by_side else InTurn(*shared, own_batches=self.settings.bootstrap)

    def settle(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        """Before the first batch: try whether the training step can run side by side, and say which way is taken."""
        if self._settled:
            return
        self._settled = True
        if self._side is not None and self._swap is not None:
            try:
                with trainer.precision_plugin.train_step_context(), torch.enable_grad():
                    self._side.attempt(self._swap.original(), self._arguments(batch, batch_idx), {})
            except NotStackableError as error:
                if self.settings.route == "stacked":
                    raise MisconfigurationException(
                        f"DeepEnsemble(route='stacked'): the training step of {type(self.module).__name__} cannot run "
                        f"for all members at once ({error}). Leave route='auto' to train them in turn."
                    ) from error
                self.reason, self.side_by_side = str(error), False
                self._arrange(trainer, stacked=False)
        rank_zero_info(self.route())

    def _arguments(self, batch: Any, batch_idx: int) -> tuple[Any, ...]:
        assert self._swap is not None
        parameters = inspect.signature(self._swap.original()).parameters
        return (batch, batch_idx) if "batch_idx" in parameters or len(parameters) > 1 else (batch,)

    def route(self) -> str:
        """Return in one line how the members are trained."""
        how = "side by side (torch.func.vmap)" if self.side_by_side else f"in turn ({self.reason})"
        optimizers = "one optimizer over their stacks" if self.members.stacked else "one optimizer each"
        return f"DeepEnsemble: {self.members.count} members of {type(self.module).__name__}, {how}, {optimizers}."

    # --- a step ---

    def _step(self, trainer: pl.Trainer, original: Any, *args: Any, **kwargs: Any) -> Any:
        self.members.mirror()
        if self._side is not None:
            losses = self._side.losses(original, args, kwargs)
            self.log.say()
            if losses is None:
                return None
            total = losses.sum()
            # The mean is what is shown; the sum is what has each member's own gradient.
            return self._like(self._side.first_output, losses.detach().mean() + (total - total.detach()))
        assert self._turn is not None
        steps = [original] * self.members.count if self.rules is None else self.rules.steps(original)
        loss = self._turn.loss(steps, args, kwargs, _factor(trainer))
        self.log.say()
        return None if loss is None else self._like(self._turn.first_output, loss)

    @staticmethod
    def _like(output: Any, loss: Tensor) -> Any:
        return {**output, "loss": loss} if isinstance(output, dict) else loss

    def copy_rules(self, trainer: pl.Trainer, states: list[dict[str, Any]] | None) -> None:
        """Give each member its own rule, if the Trainer has one; called after all callbacks have started."""
        rules = callbacks_of(trainer, TrainingRule)
        if rules:
            self.rules = RuleCopies(rules[0], trainer, self.module, self.members.count)
            if states:
                self.rules.load_state_dict(states)

    def forward(self, hook: str, *args: Any) -> None:
        """Call a hook of the members' own rules."""
        if self.rules is not None:
            self.rules.forward(hook, self.members, *args)

    # --- the end ---

    def stop(self) -> None:
        """Give the module its own training step, hooks and activations back; it keeps the first member's weights."""
        if self._swap is not None:
            self._swap.undo()
        if self._hooks is not None:
            self._hooks.undo()
        self.activations.remove()
        if self.members.stacked:
            self.members.release()
        self._swap = self._hooks = self._side = self._turn = None


def _factor(trainer: pl.Trainer) -> Tensor:
    """Return what Lightning multiplies a loss by before its backward pass, computed as it does."""
    factor = torch.ones(())
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        factor = factor * scaler.get_scale()
    return factor / trainer.accumulate_grad_batches
