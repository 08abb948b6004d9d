"""The base of all training rules: swaps the training step, hands the estimate over, and undoes the swap."""

from __future__ import annotations

import inspect
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_bpfree.core.directions import mix
from lightning_bpfree.core.exchange import ScalarExchange
from lightning_bpfree.core.injection import inject
from lightning_bpfree.core.params import ParameterSlots, norm
from lightning_bpfree.core.replay import Buffers, RandomStreams, Replay
from lightning_bpfree.core.step import Estimate, NonFiniteLossError, SkipBatchError, Step
from lightning_bpfree.rules.guards import check_fit
from lightning_bpfree.rules.quiet import Metrics, Quiet
from lightning_bpfree.rules.record import Record, banner

BACKPROP_COST = 3.0  # forward passes: one forward, and two matrix products per layer on the way back


class Probe(Protocol):
    """Looks at estimates while the step can still be evaluated, such as a comparison with the true gradient."""

    def due(self, trainer: pl.Trainer) -> bool:
        """Whether to look at the coming step."""

    def observe(self, trainer: pl.Trainer, module: pl.LightningModule, step: Step, estimate: Estimate) -> None:
        """Look at the step; further evaluations of it leave no trace."""


class _View:
    """The parts of a module that every step needs; collected once an epoch, for walking a large module takes time."""

    def __init__(self, module: pl.LightningModule, params: str | Sequence[str] | None) -> None:
        self.slots = ParameterSlots(module, params)
        self.buffers, self.metrics, self.quiet = Buffers(module), Metrics(module), Quiet(module)
        self.streams = RandomStreams([module.device])


class TrainingRule(Callback, ABC):
    """Trains any LightningModule by another rule than backprop; subclasses implement :meth:`estimate`.

    As a callback of the Trainer, a rule replaces ``module.training_step`` for the duration of ``fit``. Optimizer,
    schedulers, clipping, accumulation, precision, DDP, loggers and checkpoints go on working, for the estimate reaches
    them as an ordinary gradient.

    Args:
        params: shell-style patterns of the parameters to train (``"*.lora_*"``); None for all. The others stay
            untouched while the rule is active.
        start_epoch: first epoch of the rule, >= 0. Before it, the whole module trains by plain backprop.
        stop_epoch: first epoch that is no longer the rule's, > ``start_epoch``; None for never.
        seed: of the rule's own random directions; None takes torch's initial seed (``seed_everything``) of rank 0.
        on_nonfinite: what to do if an evaluation gives NaN or infinity: ``"raise"`` stops the run before any parameter
            moves, ``"skip"`` leaves out the batch.
        allow_untested: run under strategies for which nothing is known.
        strict_rule: refuse, rather than warn, to resume from a checkpoint that another rule has made.

    Raises:
        ValueError: for arguments out of range.
    """

    citation: ClassVar[str] = ""
    exchanges_scalars: ClassVar[bool] = False
    """Whether the estimate is a function of the numbers on which ranks agree by ``Step.measure``."""
    reevaluates: ClassVar[bool] = True
    """Whether the rule evaluates the training step more than once a batch."""

    def __init__(
        self,
        *,
        params: str | Sequence[str] | None = None,
        start_epoch: int = 0,
        stop_epoch: int | None = None,
        seed: int | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        allow_untested: bool = False,
        strict_rule: bool = False,
    ) -> None:
        if start_epoch < 0:
            raise ValueError(f"start_epoch={start_epoch}: epochs count from 0.")
        if stop_epoch is not None and stop_epoch <= start_epoch:
            raise ValueError(
                f"stop_epoch={stop_epoch} must come after start_epoch={start_epoch}: the rule has no epoch."
            )
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite={on_nonfinite!r}: choose 'raise' or 'skip'.")
        self.params, self.start_epoch, self.stop_epoch, self.seed = params, start_epoch, stop_epoch, seed
        self.on_nonfinite, self.allow_untested, self.strict_rule = on_nonfinite, allow_untested, strict_rule
        self.probes: list[Probe] = []
        self.record = Record(type(self).__name__)
        self.original_step: Callable[..., Any] | None = None
        self._undo: Callable[[], None] | None = None
        self._view: _View | None = None

    # --- what a rule says of itself -------------------------------------------------------------------------------

    @abstractmethod
    def estimate(self, step: Step) -> Estimate:
        """Return loss and gradient of one mini-batch; called with gradients enabled."""

    def check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raise MisconfigurationException if the rule cannot train this module; called before the first batch."""

    def describe(self) -> dict[str, str]:
        """Return rows for the banner: what the rule evaluates in a step, and by which route."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return the rule's arguments, as plain values that loggers and checkpoints take."""
        names = {
            name
            for kind in type(self).__mro__
            if issubclass(kind, TrainingRule)
            for name in inspect.signature(kind.__init__).parameters
        }
        values = {name: getattr(self, name) for name in sorted(names) if hasattr(self, name)}
        return {
            name: value if isinstance(value, int | float | str | None) else str(value) for name, value in values.items()
        }

    def active(self, epoch: int) -> bool:
        """Whether the epoch (counted from 0) is the rule's; the others are plain backprop's."""
        return epoch >= self.start_epoch and (self.stop_epoch is None or epoch < self.stop_epoch)

    # --- swap and undo --------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Replace the module's training step, once everything that could stand in the way has been checked."""
        if stage != "fit":
            return
        others = [cb for cb in trainer.callbacks if isinstance(cb, TrainingRule)]  # type: ignore[attr-defined]
        check_fit(self, [type(rule).__name__ for rule in others], trainer, pl_module)
        self.check(trainer, pl_module)
        original = pl_module.training_step
        had_own = "training_step" in pl_module.__dict__
        training_step = _like(original, partial(self._run, trainer, pl_module, original), pl_module)

        def undo() -> None:
            if pl_module.__dict__.get("training_step") is training_step:  # else someone has wrapped it further
                if had_own:
                    pl_module.training_step = original  # type: ignore[method-assign]
                else:
                    del pl_module.__dict__["training_step"]

        pl_module.training_step = training_step  # type: ignore[method-assign]
        self.original_step, self._undo = original, undo

    def _restore(self) -> None:
        if self._undo is not None:
            self._undo()
        self._undo, self.original_step, self._view, self.probes = None, None, None, []

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the module's own training step back."""
        if stage == "fit":
            self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the module's own training step back: Lightning calls no teardown hooks after an exception."""
        self._restore()

    # --- one fit --------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say which rule trains what."""
        self._view = _View(pl_module, self.params)
        if self.record.seed is None:
            seed = torch.initial_seed() if self.seed is None else self.seed
            self.record.seed = int(trainer.strategy.broadcast(seed)) & ((1 << 63) - 1)
        rank_zero_info(banner(self, self._view.slots, trainer))
        for logger in trainer.loggers:
            logger.log_hyperparams({"bpfree": {"rule": type(self).__name__, **self.settings()}})

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note whose epoch this is."""
        self._view = _View(pl_module, self.params)
        self.record.start_epoch(trainer.current_epoch, self.active(trainer.current_epoch))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count batches: directions are new for every batch, not for every evaluation of one."""
        self.record.batches += 1

    def _run(self, trainer: pl.Trainer, module: pl.LightningModule, original: Any, *args: Any, **kwargs: Any) -> Any:
        evaluate = partial(original, *args, **kwargs)
        if not self.active(trainer.current_epoch):
            self.record.forward_evals += BACKPROP_COST
            return evaluate()
        probes = [probe for probe in self.probes if probe.due(trainer)]
        step = self._step(trainer, module, evaluate, args, replayable=self.reevaluates or bool(probes))
        failure: NonFiniteLossError | None = None
        try:
            estimate = self.estimate(step)
            for probe in probes:
                probe.observe(trainer, module, step, estimate)
        except SkipBatchError:
            return None
        except NonFiniteLossError as error:
            failure = error
        finally:
            self.record.forward_evals += step.forward_evals
            step.finish()
        if self._failed(trainer, failure):
            return None
        if not step.recorded:
            raise RuntimeError(f"{type(self).__name__}.estimate made no recorded evaluation: call step.loss() once.")
        self._log(
            trainer, module, {"bpfree/loss": estimate.loss.detach(), "bpfree/forward_evals": self.record.forward_evals}
        )
        return self._handed_over(trainer, step, estimate)

    def _step(self, trainer: pl.Trainer, module: Any, evaluate: Callable[[], Any], args: Any, replayable: bool) -> Step:
        assert self._view is not None, "the training step ran outside of fit"
        view = self._view
        return Step(
            module,
            evaluate,
            view.slots,
            mix(self.record.seed or 0, self.record.batches),
            args=args,
            replay=Replay([view.streams, view.metrics], view.buffers) if replayable else None,
            quiet=view.quiet,
            exchange=trainer.strategy if isinstance(trainer.strategy, ScalarExchange) else None,
        )

    def _failed(self, trainer: pl.Trainer, failure: NonFiniteLossError | None) -> bool:
        if self.on_nonfinite == "raise":
            if failure is None:
                return False
            raise RuntimeError(
                f"{type(self).__name__}: {failure} in batch {self.record.batches - 1}. No parameter has moved. Lower the "
                "learning rate or sigma, or leave out such batches with on_nonfinite='skip'."
            ) from failure
        failed = failure is not None
        if trainer.world_size > 1 and not isinstance(trainer.strategy, ScalarExchange):
            # Ranks must skip together, or the others wait in DDP's reducer for ever.
            failed = bool(
                trainer.strategy.reduce(
                    torch.tensor(float(failed), device=trainer.strategy.root_device), reduce_op="sum"
                )
            )
        if failed:
            self.record.skipped += 1
            rank_zero_warn(
                f"{type(self).__name__}: {failure or 'another rank failed'}; batch {self.record.batches - 1} is skipped."
            )
        return failed

    def _handed_over(self, trainer: pl.Trainer, step: Step, estimate: Estimate) -> Any:
        if estimate.gradients is None and estimate.loss is step.recorded_loss:
            return step.output
        if estimate.gradients is None:
            loss = estimate.loss
        else:
            loss = self._injected(trainer, step, estimate)
        if isinstance(step.output, Mapping):
            return {**step.output, "loss": loss}
        return loss

    def _injected(self, trainer: pl.Trainer, step: Step, estimate: Estimate) -> Tensor:
        names = [slot.name for slot in step.trained]
        parameters = [slot.parameter for slot in step.trained]
        rest: list[Tensor] = []
        if trainer.world_size > 1 and not isinstance(trainer.strategy, ScalarExchange):
            # DDP's reducer waits for every parameter; these zeros are taken away again before the optimizer's step.
            rest = [slot.parameter for slot in step.slots.rest if slot.parameter.requires_grad]

        def gradients(scale: Tensor) -> list[Tensor]:
            made = estimate.resolved(scale)
            return [*(made[name] for name in names), *(torch.zeros_like(parameter) for parameter in rest)]

        loss = estimate.loss.to(parameters[0].device) if parameters else estimate.loss
        return inject(loss, [*parameters, *rest], gradients)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Keep parameters that the rule does not train untouched, and log the norm of the estimate."""
        if not self.active(trainer.current_epoch) or self._view is None:
            return
        if self.params is not None:
            for slot in self._view.slots.rest:
                slot.parameter.grad = None
        if self._log_due(trainer):
            grads = {slot.name: slot.parameter.grad for slot in self._view.slots if slot.parameter.grad is not None}
            self._log(trainer, pl_module, {"bpfree/grad_norm": norm(grads)})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the cost so far, and check that ranks agree where only scalars cross them."""
        if not trainer.barebones:
            pl_module.log("bpfree/forward_evals", self.record.forward_evals, on_step=False, on_epoch=True)
        if isinstance(trainer.strategy, ScalarExchange):
            trainer.strategy.verify(pl_module)

    # --- logs and checkpoints -------------------------------------------------------------------------------------

    def _log_due(self, trainer: pl.Trainer) -> bool:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every) and (trainer.global_step + 1) % every == 0

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule, values: dict[str, Any]) -> None:
        if not self._log_due(trainer) or trainer.barebones:
            return
        if isinstance(trainer.strategy, ScalarExchange):
            values["bpfree/bytes_sent"] = float(trainer.strategy.bytes_sent)
        values["bpfree/active"] = 1.0
        module.log_dict(values, on_step=True, on_epoch=False)

    def rule_state(self) -> dict[str, Any]:
        """Return state of the rule's own, in plain numbers, strings, lists, dicts and tensors."""
        return {}

    def load_rule_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`rule_state` returned."""

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs: seed, counters, history, and the rule's own state."""
        return {"record": self.record.state_dict(), "rule": self.rule_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back the state of a checkpoint."""
        self.record.load_state_dict(state_dict["record"])
        self.load_rule_state(state_dict["rule"])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write down which rule trained the module, with which settings, in which epochs."""
        checkpoint["bpfree"] = {
            "rule": type(self).__name__,
            "settings": self.settings(),
            "history": self.record.history,
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say so if the checkpoint comes from another rule."""
        self.record.check_origin(checkpoint.get("bpfree"), self.strict_rule)


def _like(original: Callable[..., Any], run: Callable[..., Any], module: pl.LightningModule) -> Callable[..., Any]:
    """Return ``run`` in the shape of ``original``: Lightning inspects the training step to know its arguments."""
    shape = getattr(original, "__wrapped__", original)  # Lightning looks through one decorator, such as torch.compile's
    if not inspect.ismethod(shape):

        def function(*args: Any, **kwargs: Any) -> Any:
            return run(*args, **kwargs)

        function.__signature__ = inspect.signature(shape)  # type: ignore[attr-defined]
        return function

    def method(self: pl.LightningModule, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001  # `self` is bound in `run`
        return run(*args, **kwargs)

    method.__signature__ = inspect.signature(shape.__func__)  # type: ignore[attr-defined]
    return types.MethodType(method, module)
