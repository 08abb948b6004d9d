"""Replacement of a module's training step during a fit, and injection of an estimate into Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from lightning_bpfree.core.injection import inject, zeros
from lightning_bpfree.core.params import Slot
from lightning_bpfree.core.step import Estimate, Step


class StepSwap:
    """Runs a rule in place of ``module.training_step`` whenever the Trainer's strategy calls it for training.

    The training step is replaced only during such a call. Code that calls ``module.training_step`` at another time
    (a validation step, a callback), or that copies or saves the module during a fit, gets the module's own.

    The swap replaces an existing one: one left by an interrupted fit, or that of a rule that now runs for each member
    of an ensemble.

    Args:
        trainer: the Trainer.
        module: the module.
        rule: the callback that owns the swap.
        run: called with the module's own training step and its arguments.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, rule: Callback, run: Callable[..., Any]
    ) -> None:
        self.trainer, self.module, self.rule, self._run = trainer, module, rule, run
        self.strategy: Any = trainer.strategy
        _remove(self.strategy)
        self._strategy_step = self.strategy.training_step
        self._call = self._training_step  # one object, by which it is known again
        self.strategy.__dict__["training_step"] = self._call

    def original(self) -> Callable[..., Any]:
        """Return the module's own training step."""
        return cast("Callable[..., Any]", self.module.training_step)

    def undo(self) -> None:
        """Let the strategy call the module's own step again, unless other code has replaced the call since."""
        if self.strategy.__dict__.get("training_step") is self._call:
            del self.strategy.training_step

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        if not self._in_charge():
            return self._strategy_step(*args, **kwargs)
        if self._calls_the_module():
            with self.strategy.precision_plugin.train_step_context():
                return self._run(self.module.training_step, *args, **kwargs)
        own = self.module.__dict__
        before, original = own.get("training_step", _MISSING), self.module.training_step

        def restore() -> None:
            if before is _MISSING:
                own.pop("training_step", None)
            else:
                own["training_step"] = before

        def swapped(*step_args: Any, **step_kwargs: Any) -> Any:
            restore()
            return self._run(original, *step_args, **step_kwargs)

        own["training_step"] = swapped
        try:
            return self._strategy_step(*args, **kwargs)
        finally:
            restore()

    def _calls_the_module(self) -> bool:
        """Whether the strategy calls the training step as Lightning's base class does, and through no wrapper.

        The rule is then called in the same way. Writing to the module in every step makes Python look up its methods
        again, which takes about 2 % of the step of a small network.
        """
        method = getattr(self._strategy_step, "__func__", None)
        return method is Strategy.training_step and self.strategy.model is self.module

    def _in_charge(self) -> bool:
        """Whether the rule is among the callbacks, or a Tuner has put its own in their place for a while."""
        callbacks: list[Any] = cast(Any, self.trainer).callbacks
        if any(callback is self.rule for callback in callbacks):
            return True
        return all(".tuner." in type(callback).__module__ for callback in callbacks)


_MISSING = object()


def _remove(strategy: Any) -> None:
    left = getattr(strategy.__dict__.get("training_step"), "__self__", None)
    if isinstance(left, StepSwap):
        left.undo()


def _padding_rows(slot: Slot) -> list[int]:
    """Return the rows of an embedding, tied to nothing else, that backprop never moves although the loss sees them."""
    found = {owner.padding_idx if isinstance(owner, nn.Embedding) else None for owner, _ in slot.places}
    return [row for row in found if row is not None] if len(found) == 1 else []


def with_injected_gradients(step: Step, estimate: Estimate, zeros_for: list[Tensor]) -> Any:
    """Return the output of the training step, with the estimate as the gradient of its loss.

    Args:
        step: the step, evaluated.
        estimate: the rule's estimate.
        zeros_for: further parameters that must get a zero gradient.
    """
    if estimate.gradients is None and estimate.loss is step.recorded_loss:
        return step.output
    loss = estimate.loss
    if estimate.gradients is not None:
        names = [slot.name for slot in step.trained]
        parameters: list[Tensor] = [slot.parameter for slot in step.trained]

        def gradients(scale: Tensor) -> list[Tensor]:
            made = estimate.resolved(scale)
            for slot in step.trained:
                for row in _padding_rows(slot):
                    made[slot.name][row] = 0.0
            # Taken out of the dict: autograd keeps a gradient that nobody else holds, and copies the others.
            return [*(made.pop(name) for name in names), *map(zeros, zeros_for)]

        # A loss from NumPy may be on another device and of another type than the parameters: Lightning does not mind,
        # but DDP and gradient scalers do.
        loss = inject(loss.to(cast("torch.device", step.module.device)), [*parameters, *zeros_for], gradients)
    return {**step.output, "loss": loss} if isinstance(step.output, Mapping) else loss
