"""Checks before the first batch; every error says how to fix the problem."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning, Callback

from lightning_bpfree.core.exchange import ScalarExchange
from lightning_bpfree.core.forward_override import override_of
from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.core.replay.backward_only import hooks_of_modules
from lightning_bpfree.core.replay.inner_derivatives import watched
from lightning_bpfree.core.replay.rehearsal import uninitialized
from lightning_bpfree.training.trainer_attributes import callbacks_of

if TYPE_CHECKING:
    from lightning_bpfree.training.training_rule import TrainingRule

# By name, for a Trainer from `pytorch_lightning` brings its own classes of the same names.
TESTED_STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy"}


def check_fit(rule: TrainingRule, rules: list[str], trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise MisconfigurationException if ``rule`` cannot train ``module`` in this Trainer.

    Args:
        rule: the rule that is about to start.
        rules: names of all rules among the Trainer's callbacks.
        trainer: the Trainer.
        module: the module in training.
    """
    name = type(rule).__name__
    if len(rules) > 1:
        raise MisconfigurationException(
            f"Two training rules in one Trainer ({', '.join(rules)}): keep one. To change the rule during a fit, give "
            "it start_epoch or stop_epoch; to change it between fits, resume from a checkpoint with another rule."
        )
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} hands its estimate to Lightning's automatic optimization, but {type(module).__name__} sets "
            "automatic_optimization=False. Return the loss from training_step and leave the optimizer to Lightning, or "
            "call lightning_bpfree.functional inside the manual step."
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise MisconfigurationException(
            f"{name} evaluates a batch several times, but {type(module).__name__}.training_step takes dataloader_iter "
            "and would use up a new batch at each evaluation. Take (batch, batch_idx) instead."
        )
    for part in module.modules():
        override = override_of(part)
        other = name if override is None else override.rule
        if other != name:
            raise MisconfigurationException(
                f"{name} cannot train {type(part).__name__}: {other} still replaces its forward pass. Call "
                f"{other}(...).uninstall(module) first."
            )
    _check_strategy(rule, trainer)


def _check_strategy(rule: TrainingRule, trainer: pl.Trainer) -> None:
    name, strategy = type(rule).__name__, type(trainer.strategy).__name__
    if isinstance(trainer.strategy, ScalarExchange):
        if not rule.exchanges_scalars:
            raise MisconfigurationException(
                f"{name}'s gradient is not a function of a few numbers, which is all that {strategy} sends between "
                "ranks: use strategy='ddp'."
            )
        if rule.start_epoch > 0 or rule.stop_epoch is not None:
            raise MisconfigurationException(
                f"{name}(start_epoch={rule.start_epoch}, stop_epoch={rule.stop_epoch}) has epochs of plain backprop, "
                f"and {strategy} sends no gradients between ranks: use strategy='ddp'."
            )
        return
    if rule.allow_untested:
        return
    if not _is_tested(trainer):
        raise MisconfigurationException(
            f"{name} has not been tested under {strategy}. Use one device, strategy='ddp' or 'bpfree_scalar_sync', or "
            "pass allow_untested=True and compare a few steps with one device."
        )


def check_begin(rule: TrainingRule, slots: ParameterSlots, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise MisconfigurationException if a rule cannot train the parameters with these optimizers and hooks.

    Args:
        rule: the rule.
        slots: the parameters that it should train.
        trainer: the Trainer, with its optimizers.
        module: the module in training.
    """
    name = type(rule).__name__
    if not rule.backpropagates:
        check_backward_only(name, hooks_of_modules(module))
        check_optimizers(name, slots, trainer.optimizers)
    if not rule.backpropagates or not rule.estimates_user_loss:  # else autograd reaches whatever the loss does
        check_registered(name, module, trainer.optimizers)
    check_trains(rule, slots, trainer, module)


def check_trains(rule: TrainingRule, slots: ParameterSlots, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise MisconfigurationException if all parameters that a rule should train are frozen and stay frozen.

    Args:
        rule: the rule.
        slots: the parameters that it should train.
        trainer: the Trainer, whose callbacks may unfreeze some later.
        module: the module in training.
    """
    if slots.trainable() or any(isinstance(callback, BaseFinetuning) for callback in callbacks_of(trainer, Callback)):
        return
    names = ", ".join(slot.name for slot in list(slots)[:5]) or "none"
    raise MisconfigurationException(
        f"{type(rule).__name__}(params={rule.params!r}) has nothing to train: all parameters that this selects in "
        f"{type(module).__name__} are frozen ({names}). Call requires_grad_(True) on them before the fit, or select "
        "others by params=."
    )


def check_made(name: str, module: torch.nn.Module) -> None:
    """Raise MisconfigurationException if lazy layers have not been initialized by a first forward pass.

    Args:
        name: the name of the rule or callback that inspects the layers.
        module: the module in training.
    """
    lazy = [type(part).__name__ for part in uninitialized(module)]
    if lazy:
        raise MisconfigurationException(
            f"{name} looks at the shapes of layers before the first batch, and {type(module).__name__} has lazy ones "
            f"({', '.join(lazy)}) that have none yet. Call the module on a batch before the fit, in __init__ or "
            "setup, or use layers with given sizes."
        )


def check_even(rule: str, trainer: pl.Trainer) -> None:
    """Raise MisconfigurationException if ranks have different numbers of batches: one would wait forever.

    Args:
        rule: the rule's name.
        trainer: the Trainer, once it has set up its loaders.
    """
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return
    found: list[float] = [0.0] * trainer.world_size
    torch.distributed.all_gather_object(found, float(trainer.num_training_batches))
    if len(set(found)) > 1:
        numbers = ", ".join(f"{number:g}" for number in found)
        raise MisconfigurationException(
            f"{rule}: the ranks have {numbers} training batches, and those with more would wait for the others "
            f"forever. Set limit_train_batches={int(min(found))}, use a DistributedSampler (drop_last=True), or let "
            "the Trainer add one (use_distributed_sampler=True)."
        )


def check_writes(rule: str, written: Sequence[str]) -> None:
    """Raise MisconfigurationException if a training step writes to parameters that are trained.

    Args:
        rule: the rule's name.
        written: names of the parameters.
    """
    if written:
        raise MisconfigurationException(
            f"{rule} evaluates the training step several times, at other parameters than the module's own, and the "
            f"step writes to parameters that are trained: {', '.join(written[:5])}. Normalize or clamp them in "
            "on_train_batch_start or on_train_batch_end, which run once a batch."
        )


def undifferentiated(rule: TrainingRule, evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """Return a training step that raises MisconfigurationException if it computes gradients itself.

    Args:
        rule: the rule that changes the network's forward or backward pass.
        evaluate: the module's own training step.
    """

    def refuse() -> None:
        raise MisconfigurationException(
            f"{type(rule).__name__}: the training step itself computes gradients (autograd.grad, backward). While the "
            "rule is active, gradients that pass through the network are not its derivatives. Train such a step with "
            "Backprop(), ForwardGradient(), ZerothOrder() or EvolutionStrategy(), or move the differentiated part out "
            "of the network (network=...)."
        )

    files = {kind.__module__ for kind in type(rule).__mro__}  # a rule of the user's own differentiates in its hooks

    def evaluated(*args: Any, **kwargs: Any) -> Any:
        with watched(refuse, files):
            return evaluate(*args, **kwargs)

    return evaluated


def _is_tested(trainer: pl.Trainer) -> bool:
    return bool(TESTED_STRATEGIES & {kind.__name__ for kind in type(trainer.strategy).__mro__})


def check_whole_parameters(name: str, trainer: pl.Trainer, strategies: str) -> None:
    """Raise MisconfigurationException under strategies whose ranks may hold parts of the parameters.

    Args:
        name: the name of the callback that needs whole parameters.
        trainer: the Trainer.
        strategies: the supported strategies, under the names that Trainer accepts.
    """
    if not _is_tested(trainer):
        raise MisconfigurationException(
            f"{name} needs whole parameters on every rank, which {type(trainer.strategy).__name__} may not have: use "
            f"one device, or {strategies}."
        )


def check_backward_only(rule: str, found: Sequence[str]) -> None:
    """Raise MisconfigurationException if the backward pass of a module is not the derivative of its loss.

    Args:
        rule: the rule's name.
        found: names of hooks and functions that change the backward pass.
    """
    if found:
        raise MisconfigurationException(
            f"{rule} runs no backward pass through the training step, and would ignore what changes the gradients "
            f"there: {', '.join(found[:5])}. Write the loss so that its derivative is the gradient that you want (for "
            "example, a term with the opposite sign instead of gradient reversal), register hooks on parameters, "
            "outside of the step (parameter.register_hook receives the estimate), or train with Backprop()."
        )


def check_registered(rule: str, module: pl.LightningModule, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise MisconfigurationException if an optimizer holds parameters that the module does not register.

    Args:
        rule: the rule's name; it estimates gradients of the module's own parameters.
        module: the module in training.
        optimizers: those of the Trainer. One that also updates copies of the module, as in an ensemble, has the groups
            of the module itself in ``module_param_groups``.
    """
    known = {id(parameter) for parameter in module.parameters()}
    groups = [getattr(optimizer, "module_param_groups", optimizer.param_groups) for optimizer in optimizers]
    held = [p for group in chain.from_iterable(groups) for p in group["params"]]
    unknown = [tuple(p.shape) for p in held if id(p) not in known and p.requires_grad]
    if unknown and len(unknown) < len(held):  # else the optimizer has copies, or flattened ones
        raise MisconfigurationException(
            f"{rule} estimates the gradients of parameters that {type(module).__name__} registers, and the optimizer "
            f"holds others, of shapes {', '.join(map(str, unknown[:5]))}: layers in a plain list, dict or helper "
            "object. Put them into an nn.ModuleList, nn.ModuleDict or nn.ParameterList, or assign them to the module, "
            "or leave them out of the optimizer."
        )


def check_optimizers(rule: str, slots: ParameterSlots, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Raise MisconfigurationException if an optimizer accepts only sparse gradients, which rules do not compute.

    Args:
        rule: the rule's name.
        slots: the parameters that it trains.
        optimizers: those of the Trainer.
    """
    trained = {id(slot.parameter): slot.name for slot in slots.trainable()}
    for optimizer in optimizers:
        held = [trained.get(id(p)) for group in optimizer.param_groups for p in group["params"]]
        names = [name for name in held if name is not None]
        if isinstance(optimizer, torch.optim.SparseAdam) and names:
            raise MisconfigurationException(
                f"{rule} computes dense gradients, and SparseAdam takes sparse ones only ({', '.join(names[:5])}): use "
                "torch.optim.Adam for them, or leave them out by params=...."
            )
