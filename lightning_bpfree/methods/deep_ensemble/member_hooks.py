"""Gradient hooks of the user's module, called once for each member."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_bpfree.methods.deep_ensemble.members import Members
from lightning_bpfree.methods.deep_ensemble.overriding import overridden
from lightning_bpfree.methods.deep_ensemble.vectorized.clipping import clip_members_

_HOOKS = ("on_before_optimizer_step", "on_after_backward")
_CLIP = "configure_gradient_clipping"


class MemberHooks:
    """Replaces hooks of a module, on the instance: clipping by each member's own norm, and what the user defines.

    Args:
        module: the module.
        members: its members.
        optimizers: optimizers of the members; empty where one optimizer moves the stacks.
        clip_val: of the Trainer; None for none.
        algorithm: of the Trainer's clipping.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        members: Members,
        optimizers: Sequence[Optimizer],
        clip_val: float | None,
        algorithm: str | None,
    ) -> None:
        self.module, self.members, self.optimizers = module, members, list(optimizers)
        self.clip_val, self.algorithm = clip_val, algorithm
        self._replaced: list[str] = []
        for hook in _HOOKS:
            if overridden(hook, module):
                self._replace(hook, partial(self._each, getattr(module, hook)))
        if members.stacked:
            if not overridden(_CLIP, module):
                self._replace(_CLIP, self._clip_stacks)
        else:
            self._replace(_CLIP, partial(self._each, getattr(module, _CLIP)))

    def _replace(self, hook: str, function: Any) -> None:
        self.module.__dict__[hook] = function
        self._replaced.append(hook)

    def undo(self) -> None:
        """Restore the module's own hooks."""
        for hook in self._replaced:
            self.module.__dict__.pop(hook, None)
        self._replaced = []

    def _each(self, hook: Any, *args: Any, **kwargs: Any) -> None:
        for member in range(self.members.count):
            own = self.optimizers[member] if self.optimizers else None
            with self.members.at_work(member, grads=True):
                hook(
                    *(own if own is not None and isinstance(arg, Optimizer) else arg for arg in args),
                    **{k: own if own is not None and isinstance(v, Optimizer) else v for k, v in kwargs.items()},
                )

    def _clip_stacks(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        value = self.clip_val if gradient_clip_val is None else gradient_clip_val
        if not value or value <= 0:
            return
        # Only what the optimizer moves counts, as for one member alone.
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if (
            str(getattr(gradient_clip_algorithm or self.algorithm, "value", gradient_clip_algorithm or self.algorithm))
            == "value"
        ):
            for grad in grads:
                grad.clamp_(-value, value)
        elif grads:
            clip_members_(grads, float(value))
