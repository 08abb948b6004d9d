"""Alignment of a rule's estimate with the true gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_bpfree.core.arguments import PositiveInt, check_attributes, checked
from lightning_bpfree.core.params import Params, dot, norm
from lightning_bpfree.core.replay.uncounted import uncounted
from lightning_bpfree.core.step import Estimate, Step
from lightning_bpfree.training.ranks import mean_over_ranks
from lightning_bpfree.training.trainer_attributes import callbacks_of, log_every_n_steps
from lightning_bpfree.training.training_rule import TrainingRule


class GradientAlignment(Callback):
    """Compares the estimate of the training rule with the true gradient, on the same batch and dropout noise.

    Logs ``bpfree/cosine_to_backprop`` (in [-1, 1]), ``bpfree/norm_ratio`` (norm of the estimate over that of the
    gradient) and ``bpfree/cosine_to_backprop/<layer>``. At the end of an epoch it logs the mean over the fit so far,
    ``bpfree/mean_cosine``. It works with every rule that estimates the gradient of the module's loss. For rules with
    their own losses (``ForwardForward``, ``TeamReinforce``) it prints a note and measures nothing. A measured step
    costs one more forward and backward pass with the memory of backprop; the other steps cost nothing.

    Args:
        every_n_steps: optimizer steps between measurements, >= 1; None uses the Trainer's ``log_every_n_steps``.
            Loggers show values only for steps that are multiples of ``log_every_n_steps``.
        per_layer: whether to log the cosine of every layer too.

    Raises:
        ValueError: for ``every_n_steps < 1``.

    Examples:
        >>> GradientAlignment(every_n_steps=100).every_n_steps
        100
    """

    logged: ClassVar[dict[str, str]] = {
        "bpfree/cosine_to_backprop": "cosine between the estimate and backprop's gradient of the same batch",
        "bpfree/norm_ratio": "norm of the estimate divided by the norm of backprop's gradient",
        "bpfree/cosine_to_backprop/<layer>": "the same cosine for one layer (per_layer=True only)",
        "bpfree/mean_cosine": "mean of the cosine over the fit so far, logged each epoch",
    }

    @checked
    def __init__(self, every_n_steps: PositiveInt | None = None, per_layer: bool = True) -> None:
        self.every_n_steps, self.per_layer = every_n_steps, per_layer
        self.measured = 0
        self.mean_cosine = float("nan")
        self._every, self._last_step, self._loaded = 1, -1, False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the rule whose estimates are measured."""
        if stage != "fit":
            return
        check_attributes(self)
        if not self._loaded:
            self.measured, self.mean_cosine = 0, float("nan")  # of an earlier fit
        rules = callbacks_of(trainer, TrainingRule)
        if not rules:
            raise MisconfigurationException(
                "GradientAlignment compares a training rule with backprop, and no rule is among the callbacks: add one."
            )
        if not rules[0].estimates_user_loss:
            rank_zero_info(
                f"GradientAlignment measures nothing: {type(rules[0]).__name__} trains by losses of its own, not by "
                "the gradient of the module's loss."
            )
            return
        logged = log_every_n_steps(trainer)
        self._every = self.every_n_steps or logged or 1
        if logged and self._every % logged:
            rank_zero_warn(
                f"GradientAlignment(every_n_steps={self._every}) is not a multiple of the Trainer's log_every_n_steps="
                f"{logged}: loggers will miss some of its values (bpfree/mean_cosine counts them all)."
            )
        self._last_step = -1
        rules[0].observers.append(self)

    def due(self, trainer: pl.Trainer) -> bool:
        """Whether to measure the next step; with accumulation, once per optimizer step."""
        step = trainer.global_step + 1
        return step % self._every == 0 and step != self._last_step

    def observe(self, trainer: pl.Trainer, module: pl.LightningModule, step: Step, estimate: Estimate) -> None:
        """Measure the estimate of one step, and log the results."""
        self._last_step = trainer.global_step + 1
        names = [slot.name for slot in step.trained]
        parameters = [slot.parameter for slot in step.trained]
        own = estimate.gradients is None
        guess = _differentiated(estimate.loss, parameters, names) if own else estimate.resolved()
        evals = step.forward_evals
        with torch.enable_grad(), uncounted():
            loss = step.loss(recorded=False)
            if not loss.requires_grad:
                raise MisconfigurationException(
                    "GradientAlignment needs a differentiable training step, and this loss has no graph: leave "
                    "GradientAlignment out."
                )
            truth = _differentiated(loss, parameters, names)
        step.forward_evals = evals  # the measurement is not part of the rule's cost
        if mean := mean_over_ranks(trainer):
            guess, truth = ({name: mean(gradient) for name, gradient in p.items()} for p in (guess, truth))
        self._log(trainer, module, guess, truth)

    def _log(self, trainer: pl.Trainer, module: pl.LightningModule, guess: Params, truth: Params) -> None:
        found = float(cosine(guess, truth))
        self.measured += 1
        self.mean_cosine = (
            found if self.measured == 1 else self.mean_cosine + (found - self.mean_cosine) / self.measured
        )
        if trainer.barebones:
            return
        values = {"bpfree/cosine_to_backprop": found, "bpfree/norm_ratio": float(norm(guess) / norm(truth))}
        if self.per_layer:
            for layer, names in _layers(truth).items():
                part = cosine({n: guess[n] for n in names}, {n: truth[n] for n in names})
                values[f"bpfree/cosine_to_backprop/{layer}"] = float(part)
        module.log_dict(values, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the mean cosine over the fit so far."""
        if self.measured and not trainer.barebones:
            ranks = trainer.world_size  # the same number on all of them; without sync_dist Lightning warns
            pl_module.log("bpfree/mean_cosine", self.mean_cosine, on_step=False, on_epoch=True, sync_dist=ranks > 1)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reset the mean for the next fit; the values of this fit remain available."""
        self._loaded = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Reset the mean for the next fit: Lightning calls no teardown hooks after an exception."""
        self._loaded = False

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean."""
        return {"measured": self.measured, "mean_cosine": self.mean_cosine}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the running mean."""
        self.measured, self.mean_cosine = state_dict["measured"], state_dict["mean_cosine"]
        self._loaded = True


@checked
def cosine(a: Params, b: Params) -> Tensor:
    """Return the cosine between two named gradients, a scalar; 0 if one of them is zero.

    Examples:
        >>> cosine({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([2.0, 0.0])})
        tensor(1.)
    """
    norms = norm(a) * norm(b)
    return torch.where(norms > 0, dot(a, b) / norms.clamp_min(torch.finfo(norms.dtype).tiny), torch.zeros_like(norms))


def _differentiated(loss: Tensor, parameters: list[torch.nn.Parameter], names: list[str]) -> Params:
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def _layers(names: Iterable[str]) -> dict[str, list[str]]:
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return layers
