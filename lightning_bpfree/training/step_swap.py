"""Replacing a module's training step for the time of a fit, and handing an estimate to Lightning."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_bpfree.core.injection import inject, zeros
from lightning_bpfree.core.params import Slot
from lightning_bpfree.core.step import Estimate, Step

TrainingStep = Callable[..., Any]


class StepSwap:
    """Puts ``run`` in the place of ``module.training_step``, on the instance, until :meth:`undo`.

    Args:
        module: the module.
        run: called with the original training step and its arguments.
    """

    def __init__(self, module: pl.LightningModule, run: Callable[..., Any]) -> None:
        self.module = module
        self.original = module.training_step
        self._had_own = "training_step" in module.__dict__  # a compiled module has, and must get it back
        original = self.original
        self._swapped = _shaped_like(original, lambda *args, **kwargs: run(original, *args, **kwargs), module)
        module.training_step = self._swapped  # type: ignore[method-assign]

    def undo(self) -> None:
        """Put the original back, unless someone has replaced the step since."""
        if self.module.__dict__.get("training_step") is not self._swapped:
            return
        if self._had_own:
            self.module.training_step = self.original  # type: ignore[method-assign]
        else:
            del self.module.__dict__["training_step"]


def _shaped_like(
    original: Callable[..., Any], run: Callable[..., Any], module: pl.LightningModule
) -> Callable[..., Any]:
    """Return ``run`` in the shape of ``original``: Lightning inspects the training step to know its arguments."""
    shape = getattr(original, "__wrapped__", original)  # Lightning looks through one decorator, such as torch.compile's
    if not inspect.ismethod(shape):

        def function(*args: Any, **kwargs: Any) -> Any:
            return run(*args, **kwargs)

        function.__signature__ = inspect.signature(shape)  # type: ignore[attr-defined]
        return function

    def method(self: pl.LightningModule, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001  # bound in `run` already
        return run(*args, **kwargs)

    method.__signature__ = inspect.signature(shape.__func__)  # type: ignore[attr-defined]
    return types.MethodType(method, module)


def _padding_rows(slot: Slot) -> list[int]:
    """Return the rows of an embedding that backprop never moves, although the loss depends on them."""
    owners = [owner for owner, _ in slot.places if isinstance(owner, nn.Embedding)]
    return [owner.padding_idx for owner in owners if owner.padding_idx is not None]


def with_injected_gradients(step: Step, estimate: Estimate, zeros_for: list[Tensor]) -> Any:
    """Return what the training step returns to Lightning: its own output, with the estimate behind the loss.

    Args:
        step: the step, evaluated.
        estimate: what the rule made of it.
        zeros_for: further parameters that must get a gradient, of zeros.
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
