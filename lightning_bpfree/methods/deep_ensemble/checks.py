"""Checks before the first batch that an ensemble is possible; every error says how to fix the problem."""

from __future__ import annotations

import inspect

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging
from torch import nn

from lightning_bpfree.core.vectorizing import vectorizes_badly
from lightning_bpfree.methods.deep_ensemble.overriding import overridden
from lightning_bpfree.training.gradient_alignment import GradientAlignment
from lightning_bpfree.training.trainer_attributes import callbacks_of
from lightning_bpfree.training.training_rule import TrainingRule

# What changes weights or gradients of the module alone, which is one member. By name, since methods know no others.
_ONE_MEMBER = {"LotteryTicket", "WeightAveraging", "EMAWeightAveraging", "ReversibleRecompute", "LearnableArchitecture"}
_LARGE = 1 << 19  # parameters of a member, beyond which side by side gains nothing on a CPU
_HOOKS = ("configure_gradient_clipping", "on_before_optimizer_step", "on_after_backward")


def check_strategy(trainer: pl.Trainer) -> None:
    """Raise MisconfigurationException unless the module is whole on one device."""
    # By name, for a Trainer from `pytorch_lightning` brings its own class.
    if "SingleDeviceStrategy" not in {kind.__name__ for kind in type(trainer.strategy).__mro__}:
        raise MisconfigurationException(
            f"DeepEnsemble trains all members on one device, and {type(trainer.strategy).__name__} would synchronize "
            "the gradients of the first alone: use devices=1, or one run for each member."
        )


def check_fit(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise MisconfigurationException if an ensemble of the module cannot be trained in this Trainer."""
    name = type(module).__name__
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"DeepEnsemble needs Lightning's automatic optimization, but {name} sets automatic_optimization=False and "
            "steps optimizers that only the first member has. Return the loss from training_step instead."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise MisconfigurationException(
            f"DeepEnsemble evaluates a batch for each member, but {name}.training_step takes dataloader_iter and would "
            "use up a new batch each time. Take (batch, batch_idx) instead."
        )
    for rule in callbacks_of(trainer, TrainingRule):
        if not rule.estimates_user_loss:
            raise MisconfigurationException(
                f"DeepEnsemble cannot train members by {type(rule).__name__}, which puts its own layers and losses "
                "into the one module that all members share: train the members in separate runs."
            )
        if getattr(rule, "learning_rates", None) is not None:
            raise MisconfigurationException(
                f"DeepEnsemble with {type(rule).__name__}(learning_rates=...): the factors would hold for the blocks "
                "of the first member alone. Leave learning_rates=None, and give parameter groups in "
                "configure_optimizers rates of their own."
            )
    kinds = (BaseFinetuning, ModelPruning, StochasticWeightAveraging, GradientAlignment)
    for kind in kinds:
        for callback in callbacks_of(trainer, kind):
            _refuse(type(callback).__name__)
    for callback in callbacks_of(trainer, pl.Callback):
        if _ONE_MEMBER & {base.__name__ for base in type(callback).__mro__}:
            _refuse(type(callback).__name__)


def _refuse(name: str) -> None:
    raise MisconfigurationException(
        f"DeepEnsemble cannot be combined with {name}, which sees or changes the module's own parameters, and these "
        "are those of the first member alone: leave one of the two out."
    )


def why_in_turn(trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
    """Return why the members of this module are better trained in turn; None if nothing is known against stacks."""
    rules = callbacks_of(trainer, TrainingRule)
    if rules:
        return f"{type(rules[0]).__name__} evaluates each member by itself"
    for hook in _HOOKS:
        if overridden(hook, module):
            return f"{type(module).__name__} defines {hook}, which is called for each member"
    return why_not_worth_it(module)


def why_not_worth_it(module: nn.Module) -> str | None:
    """Return why a module is not faster in stacks; None if it may be."""
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        return "it contains TorchScript"
    device = next(module.parameters()).device
    if device.type == "cpu" and vectorizes_badly(module):
        return "convolutions and recurrent layers are slower in stacks on a CPU"
    size = sum(parameter.numel() for parameter in module.parameters())
    if device.type == "cpu" and size > _LARGE:
        return f"{size:,} parameters a member keep a CPU busy by themselves"
    return None
