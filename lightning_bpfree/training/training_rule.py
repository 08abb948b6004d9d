"""The base class of all training rules: it replaces the training step, injects the estimate, and restores the step."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_bpfree.core.arguments import NonNegativeInt, Patterns, PositiveInt, check_attributes, checked
from lightning_bpfree.core.exchange import ScalarExchange
from lightning_bpfree.core.injection import inject, zeros
from lightning_bpfree.core.params import ParameterSlots, norm
from lightning_bpfree.core.replay.backward_only import findings
from lightning_bpfree.core.replay.batch import BatchCopies
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.core.step import Estimate, NonFiniteLossError, SkipBatchError, Step, loss_of
from lightning_bpfree.training.checks import (
    check_backward_only,
    check_begin,
    check_even,
    check_fit,
    check_writes,
    undifferentiated,
)
from lightning_bpfree.training.logging_of_rules import is_log_due, log_settings, named_after, settings_of
from lightning_bpfree.training.module_state import ModuleState
from lightning_bpfree.training.record import LOGGED, Record, banner
from lightning_bpfree.training.refusal import refusing
from lightning_bpfree.training.saved_streams import SavedStreams
from lightning_bpfree.training.skipping import gradients_cross_ranks, is_skipped, waited_for
from lightning_bpfree.training.step_swap import StepSwap, with_injected_gradients
from lightning_bpfree.training.trainer_attributes import callbacks_of, without_module

BACKPROP_COST = 3.0  # forward passes: one forward, and two matrix products per layer on the way back


class StepObserver(Protocol):
    """Inspects estimates while the step can still be evaluated, for example to compare them with the true gradient."""

    def due(self, trainer: pl.Trainer) -> bool:
        """Whether to inspect the next step."""

    def observe(self, trainer: pl.Trainer, module: pl.LightningModule, step: Step, estimate: Estimate) -> None:
        """Inspect the step; further evaluations of it have no side effects."""


class TrainingRule(Callback, ABC):
    """Trains any LightningModule by a rule other than backprop; subclasses implement :meth:`estimate`.

    As a callback of the Trainer, a rule replaces ``module.training_step`` for the duration of ``fit``. Optimizer,
    schedulers, clipping, accumulation, precision, DDP, loggers and checkpoints keep working, since they receive the
    estimate as an ordinary gradient.

    Args:
        params: shell-style patterns of the parameters to train (``"*.lora_*"``); None for all. The others stay
            unchanged while the rule is active.
        start_epoch: first epoch of the rule, >= 0. Before it, the whole module trains by plain backprop.
        stop_epoch: first epoch of plain backprop after the rule's, > ``start_epoch``; None for never.
        seed: seed of the rule's own random directions; None uses torch's initial seed (``seed_everything``) of rank 0.
        on_nonfinite: what to do if a number that the rule measures is NaN or infinite: ``"raise"`` stops the run before
            any parameter changes, ``"skip"`` skips the batch. Rules that only differentiate measure no such number.
        allow_untested: run under strategies that are not tested.
        strict_rule: raise instead of warn when the fit resumes from a checkpoint of another rule.

    Raises:
        ValueError: for arguments out of range.
    """

    citation: ClassVar[str] = ""
    logged: ClassVar[dict[str, str]] = LOGGED
    """What is logged, with its meaning; ``bpfree metrics`` prints it. A rule adds what its estimates report."""
    exchanges_scalars: bool = False
    """Whether the estimate is a function of the numbers on which ranks agree by ``Step.measure``."""
    reevaluates: bool = True
    """Whether the rule evaluates the training step more than once a batch."""
    rehearses: ClassVar[bool] = True
    """Whether the whole step is evaluated several times, not only parts of the network; if so, it is rehearsed."""
    estimates_user_loss: ClassVar[bool] = True
    """Whether the rule estimates the gradient of the user's loss; False for rules with losses of their own."""
    backpropagates: ClassVar[bool] = True
    """Whether hooks and functions that change the backward pass through the training step take effect."""
    cuts_graphs: bool = False
    """Whether derivatives within the step go through graphs other than the module's own."""
    differentiates_forward: ClassVar[bool] = False
    """Whether the rule differentiates in forward mode, by the ``jvp`` of custom functions."""
    of_a_fit: ClassVar[tuple[str, ...]] = ("_swap", "_module_state", "_last_fit")
    """Attributes that refer to the Trainer or the module of a fit; they are None in a copy of the rule."""

    @checked
    def __init__(
        self,
        *,
        params: Patterns | None = None,
        start_epoch: NonNegativeInt = 0,
        stop_epoch: PositiveInt | None = None,
        seed: int | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        allow_untested: bool = False,
        strict_rule: bool = False,
    ) -> None:
        self.params, self.start_epoch, self.stop_epoch, self.seed = params, start_epoch, stop_epoch, seed
        self.on_nonfinite, self.allow_untested, self.strict_rule = on_nonfinite, allow_untested, strict_rule
        self.observers: list[StepObserver] = []
        self.record = Record(type(self).__name__)
        self._estimates = 0  # since the last step of the optimizer
        self._streams = SavedStreams()
        self._loaded_for_fit = self._has_trained = False
        self._last_fit: tuple[weakref.ref[Any], ...] | None = None  # Trainer and module
        self._swap: StepSwap | None = None
        self._module_state: ModuleState | None = None
        TrainingRule.resolve(self)

    # --- hooks of a rule ---

    @abstractmethod
    def estimate(self, step: Step) -> Estimate:
        """Return the loss and gradient of one mini-batch; called with gradients enabled."""

    def on_batch_settled(self, succeeded: bool) -> None:
        """Keep or drop further state learned from the batch: all ranks now know whether the batch counts."""

    def check(self, trainer: pl.Trainer, module: pl.LightningModule, slots: ParameterSlots) -> None:
        """Raise MisconfigurationException if the rule cannot train these parameters; called before the first batch."""

    def read(self, output: Any) -> Tensor:
        """Return the scalar to minimize from the output of the training step."""
        return loss_of(output)

    def computes_in(self, dtype: torch.dtype) -> None:
        """Receive the coarsest floating-point type that an evaluation of the training step computes in.

        Called before the first estimate, and again if the training step changes.

        Raises:
            MisconfigurationException: if the rule's settings do not fit the type.
        """

    def describe(self) -> dict[str, str]:
        """Return rows for the banner: what the rule evaluates in a step, and how."""
        return {}

    def resolve(self) -> None:
        """Check settings against each other, and set derived attributes.

        Called when the attributes may have changed: at the end of a constructor, and when a fit starts. A rule builds
        objects from its arguments here, and keeps their learned state.

        Raises:
            ValueError: for settings that contradict each other.
        """
        if self.stop_epoch is not None and self.stop_epoch <= self.start_epoch:
            raise ValueError(
                f"{type(self).__name__}: stop_epoch={self.stop_epoch} must be above start_epoch={self.start_epoch}: "
                "the rule would have no epoch."
            )

    def start_over(self) -> None:
        """Drop state from an earlier fit; the base class resets counters and history."""

    def settings(self) -> dict[str, Any]:
        """Return the rule's arguments as plain values for loggers and checkpoints."""
        return settings_of(self, TrainingRule)

    def active(self, epoch: int) -> bool:
        """Whether the rule trains this epoch (counted from 0); plain backprop trains the others."""
        return epoch >= self.start_epoch and (self.stop_epoch is None or epoch < self.stop_epoch)

    @property
    def original_step(self) -> Callable[..., Any] | None:
        """The module's own training step while it is swapped; None outside of fit."""
        return None if self._swap is None else self._swap.original()

    def without(self) -> AbstractContextManager[None]:
        """Return a context in which the module computes as it does without the rule."""
        return nullcontext()

    # --- swap and undo ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replace the module's training step, after all checks."""
        if stage != "fit":
            return
        check_attributes(self)  # they may have been set since the constructor
        self.resolve()
        self._begin_anew(trainer, pl_module)
        rules = callbacks_of(trainer, TrainingRule)
        check_fit(self, [type(rule).__name__ for rule in rules], trainer, pl_module)
        self._swap = StepSwap(trainer, pl_module, self, partial(self.run, trainer, pl_module))

    def _begin_anew(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Reset the rule, unless a state was loaded for this fit or the same Trainer continues its epochs."""
        before, self._last_fit = self._last_fit, (weakref.ref(trainer), weakref.ref(module))
        goes_on = before == self._last_fit and trainer.current_epoch > 0
        if self._loaded_for_fit or goes_on:
            return
        self.record.reset()
        self._streams.take([])
        self._estimates = 0
        if self._has_trained:
            self._has_trained = False
            self.start_over()
            rank_zero_info(
                f"{type(self).__name__} starts over: what it learned in an earlier fit is dropped. To keep that, "
                "resume from a checkpoint, trainer.fit(..., ckpt_path=...)."
            )

    def _restore(self) -> None:
        if self._swap is not None:
            self._swap.undo()
        if self._has_trained:  # else a Tuner has tried the module, and the fit is still to come
            self._loaded_for_fit = False
        self._streams.take([])
        self._swap, self._module_state, self.observers = None, None, []

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy or pickle of the rule: without the fit."""
        kept = without_module(self.__dict__)
        return {**kept, **dict.fromkeys(set(self.of_a_fit) & kept.keys()), "observers": []}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the module's own training step."""
        if stage == "fit":
            self._restore()
        else:
            self._loaded_for_fit = False  # a checkpoint of an evaluation

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the module's own training step: Lightning calls no teardown hooks after an exception."""
        self._restore()

    # --- one fit ---

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the banner and log the settings; called before the data loaders draw their order."""
        state = self._begin(trainer, pl_module)
        self._streams.on_fit_start(trainer)
        rank_zero_info(banner(self, state.slots, trainer))
        log_settings(trainer, pl_module, {"bpfree": {"rule": type(self).__name__, **self.settings()}})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record that the fit has begun."""
        check_even(type(self).__name__, trainer)
        self._has_trained = True

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> ModuleState:
        """Inspect the module and choose the seed; a Tuner evaluates the step before callbacks start."""
        datamodule = getattr(trainer, "datamodule", None)
        others = [] if datamodule is None else [datamodule]
        self._module_state = state = ModuleState(module, self.params, others, trainer.optimizers)
        if self.record.seed is None:
            seed = torch.initial_seed() if self.seed is None else self.seed
            self.record.seed = int(trainer.strategy.broadcast(seed)) & ((1 << 63) - 1)
        check_begin(self, state.slots, trainer, module)
        self.check(trainer, module, state.slots)
        self._streams.watch(module.device)
        return state

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record whether the rule trains this epoch."""
        if self._swap is None:
            raise MisconfigurationException(
                f"{type(self).__name__} was added to the Trainer's callbacks after their setup, so it trains nothing: "
                "pass it to Trainer(callbacks=[...]), or add it before trainer.fit."
            )
        self.record.start_epoch(trainer.current_epoch, self.active(trainer.current_epoch))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count batches: directions change with every batch, not with every evaluation of it."""
        epoch = trainer.current_epoch
        if not self.record.has_started(epoch, self.active(epoch)):
            # Lightning starts no epoch after a resume behind the last batch of the one before.
            self.on_train_epoch_start(trainer, pl_module)
        self.record.batches += 1
        self._streams.on_train_batch_start(trainer, batch_idx)

    def run(self, trainer: pl.Trainer, module: pl.LightningModule, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the training step for one batch, with the estimate as the gradient of its loss.

        Args:
            trainer: the Trainer.
            module: the module.
            original: its own training step.
            *args: positional arguments of the training step.
            **kwargs: keyword arguments of the training step.
        """
        if not self.active(trainer.current_epoch):
            self.record.forward_evals += BACKPROP_COST
            self._log(trainer, module, {"bpfree/active": 0.0})
            return original(*args, **kwargs)
        observers = [observer for observer in self.observers if observer.due(trainer)]
        step = self._step(trainer, module, original, args, kwargs, observed=bool(observers))
        failure: NonFiniteLossError | None = None
        try:
            with refusing(type(self).__name__):
                estimate = self.estimate(step)
            for observer in observers:
                observer.observe(trainer, module, step, estimate)
        except SkipBatchError:
            return None
        except NonFiniteLossError as error:
            failure = error
        finally:
            self.record.forward_evals += step.forward_evals
            if self._module_state is not None:
                self._module_state.needs_graph |= step.needs_graph
            step.finish()
        zeros_for = waited_for(trainer, step)
        try:
            failed = is_skipped(trainer, self.record, failure, self.on_nonfinite)
        except RuntimeError:
            step.undo()
            self.on_batch_settled(False)
            raise
        self.on_batch_settled(not failed)
        if failed:
            step.undo()
            zeros_for += [slot.parameter for slot in step.trained]
            return inject(torch.full((), torch.nan, device=module.device), zeros_for, lambda _: map(zeros, zeros_for))
        if not step.recorded:
            raise RuntimeError(f"{type(self).__name__}.estimate made no recorded evaluation: call step.loss() once.")
        if is_log_due(trainer):
            own = named_after(type(self), estimate.metrics)
            self._log(trainer, module, {"bpfree/loss": estimate.loss.detach(), **own})
        # Where gradients cross ranks, another rank may have learned something, and all must step together.
        self._estimates += estimate.informative or gradients_cross_ranks(trainer)
        return with_injected_gradients(step, estimate, zeros_for)

    def _step(self, trainer: pl.Trainer, module: Any, evaluate: Any, args: Any, kwargs: Any, observed: bool) -> Step:
        state, replayable = self._looked_at(trainer, module), self.reevaluates or observed
        copies = BatchCopies(args, kwargs, state.writes_batch) if replayable else None
        if copies is not None and (self.rehearses or observed) and state.rehearsal_due():
            self._rehearse(trainer, module, state, partial(state.rehearse, evaluate, copies))
        return Step(
            module,
            undifferentiated(self, evaluate) if self.cuts_graphs else evaluate,
            state.slots,
            mix(self.record.seed or 0, self.record.batches),
            args=args,
            kwargs=kwargs,
            replay=state.replay() if replayable else None,
            copies=copies,
            needs_graph=state.needs_graph,
            vectorizable=not state.written,
            quiet=state.quiet,
            exchange=trainer.strategy if isinstance(trainer.strategy, ScalarExchange) else None,
            read=self.read,
        )

    def _rehearse(
        self, trainer: pl.Trainer, module: pl.LightningModule, state: ModuleState, rehearse: Callable[[], None]
    ) -> None:
        before, name = state.slots, type(self).__name__
        rehearse()
        check_writes(name, state.written_and_trained())
        if not self.backpropagates:
            check_backward_only(name, findings(state.backward_only, self.differentiates_forward))
        if state.slots is not before:  # the first forward pass has made layers
            self.check(trainer, module, state.slots)
        if state.computed_in is not None:
            self.computes_in(state.computed_in)

    def _looked_at(self, trainer: pl.Trainer, module: pl.LightningModule) -> ModuleState:
        """Return the module's state, updated if the module has changed since the last step."""
        state = self._module_state or self._begin(trainer, module)
        if state.refresh():
            self.check(trainer, module, state.slots)
        return state

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Leave parameters that the rule does not train unchanged, and log the norm of the estimate."""
        if not self.active(trainer.current_epoch) or self._module_state is None:
            return
        slots, skipped = self._module_state.slots, self._estimates == 0
        self._estimates = 0
        for slot in [*slots.rest, *(slots if skipped else [])]:
            slot.parameter.grad = None  # a gradient of zero would still move it, by momentum or weight decay
        if is_log_due(trainer):
            grads = {slot.name: slot.parameter.grad for slot in slots if slot.parameter.grad is not None}
            self._log(trainer, pl_module, {"bpfree/grad_norm": norm(grads)})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the cost so far, and check that ranks agree if they exchange only scalars."""
        if not trainer.barebones:
            evals, ranks = self.record.forward_evals, trainer.world_size
            pl_module.log("bpfree/forward_evals", evals, on_step=False, on_epoch=True, sync_dist=ranks > 1)
        if isinstance(trainer.strategy, ScalarExchange):
            trainer.strategy.verify(pl_module)

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule, values: dict[str, Any]) -> None:
        if not is_log_due(trainer):
            return
        values = {"bpfree/forward_evals": self.record.forward_evals, "bpfree/active": 1.0, **values}
        if isinstance(trainer.strategy, ScalarExchange):
            values["bpfree/bytes_sent"] = float(trainer.strategy.bytes_sent)
        module.log_dict(values, on_step=True, on_epoch=False)

    # --- checkpoints ---

    def rule_state(self) -> dict[str, Any]:
        """Return the rule's own state, in plain numbers, strings, lists, dicts and tensors."""
        return {}

    def load_rule_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`rule_state` returned."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for an exact resume: seed, counters, history, and the rule's own state."""
        return {"record": self.record.state_dict(), "rule": self.rule_state(), "streams": self._streams.to_plain()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.record.load_state_dict(state_dict["record"])
        self.load_rule_state(state_dict["rule"])
        self._streams.take(state_dict["streams"])
        self._loaded_for_fit = True

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the rule, its settings and epochs, and the random streams of all ranks."""
        own = checkpoint["callbacks"][self.state_key]
        own["streams"] = self._streams.of_all_ranks(trainer, own["streams"])
        checkpoint["bpfree"] = {
            "rule": type(self).__name__,
            "settings": self.settings(),
            "history": self.record.state_dict()["history"],
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Warn or raise if the checkpoint comes from another rule."""
        self.record.check_origin(checkpoint.get("bpfree"), self.strict_rule)
