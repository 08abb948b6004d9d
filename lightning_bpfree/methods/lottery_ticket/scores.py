"""Scores of weights that need a Trainer: deviations of a rule's search, and gradients over the training set."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_bpfree.core.params import Params, Slot, widen
from lightning_bpfree.core.step import SkipBatchError, loss_of
from lightning_bpfree.methods.lottery_ticket.masks import Masks, Restricts
from lightning_bpfree.methods.lottery_ticket.plan import Score
from lightning_bpfree.methods.lottery_ticket.pruning import magnitude, random_scores, snip, snr
from lightning_bpfree.training.module_state import ModuleState
from lightning_bpfree.training.ranks import mean_over_ranks
from lightning_bpfree.training.training_rule import TrainingRule

_CURE = (
    "Use score='magnitude', or a search with one deviation per weight (SNES, separable CMA-ES, PGPE, DES), such as "
    "EvolutionStrategy's."
)


def scored(
    score: Score, mean: Params, std: Params | None, previous: Masks | None, *, rule: TrainingRule | None, seed: int
) -> Params:
    """Return the score of every trained weight: signal to noise, magnitude or random (SNIP is computed at the start).

    Args:
        score: which.
        mean: the weights.
        std: deviations that ``rule`` has said, for ``"snr"``.
        previous: masks of the level that was trained.
        rule: the training rule, for messages.
        seed: for ``"random"``.
    """
    if score == "snr":
        std = deviations(std, list(mean), rule)
        warn_of_floor(std, previous)
        return snr(mean, std)
    return random_scores(mean, seed) if score == "random" else magnitude(mean)


def check_has_deviations(rule: TrainingRule | None) -> None:
    """Raise MisconfigurationException if there is no rule that has a deviation of every weight."""
    if not isinstance(rule, Restricts):
        whose = "plain backprop" if rule is None else type(rule).__name__
        raise MisconfigurationException(
            f"LotteryTicket(score='snr') divides weights by their deviations in a search, and {whose} has none. {_CURE}"
        )


def deviations(std: Params | None, names: Collection[str], rule: TrainingRule | None) -> Params:
    """Return the deviation of every named weight among ``std``, which ``rule`` has said.

    Raises:
        MisconfigurationException: if there are none, or not of all of them.
    """
    name = type(rule).__name__
    if std is None:
        raise MisconfigurationException(
            f"LotteryTicket(score='snr'): {name} has one deviation for all weights (or none yet), so the "
            f"score is the magnitude. {_CURE}"
        )
    lacking = [weight for weight in names if weight not in std]
    if lacking:
        raise MisconfigurationException(
            f"LotteryTicket(score='snr'): {name} keeps no deviation of {', '.join(lacking)}: exclude them by "
            "exclude=, or let the rule train them."
        )
    return {weight: std[weight] for weight in names}


def warn_of_floor(std: Mapping[str, Tensor], survivors: Mapping[str, Tensor] | None) -> None:
    """Warn if most deviations of surviving weights are one number: the score is then the magnitude."""
    parts = [widen(s)[survivors[name]] if survivors else widen(s).flatten() for name, s in std.items()]
    values = torch.cat([part.cpu() for part in parts])
    # What more than half of the values are, the median is.
    share = float((values == values.median()).float().mean())
    if share > 0.5:
        rank_zero_warn(
            f"LotteryTicket(score='snr'): {share:.0%} of the deviations are {float(values.median()):.3g}, their lower "
            "bound or initial value: for these weights the score is the magnitude. Lower sigma_min, or train each "
            "level for longer."
        )


def snip_scores(
    trainer: pl.Trainer, module: pl.LightningModule, rule: TrainingRule | None, names: list[str]
) -> tuple[Params, int]:
    """Return ``|w dL/dw|`` of the named weights as they are now, and the number of batches; L is the mean loss.

    One pass by backprop. Random streams, buffers, metrics and logs are as if it had not taken place; a data set that
    counts what is taken from it is not.

    Raises:
        MisconfigurationException: if the loss cannot be differentiated.
    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"LotteryTicket(score='snip') differentiates the loss that training_step returns, but "
            f"{type(module).__name__} sets automatic_optimization=False: use another score."
        )
    view = ModuleState(module, None)
    slots = [slot for slot in view.slots if slot.name in names]
    replay = view.replay()
    replay.rewind()
    own = contextlib.nullcontext() if rule is None else rule.without()
    step = module.training_step if rule is None or rule.original_step is None else rule.original_step
    try:
        with own, view.buffers.copies(), view.quiet(), torch.enable_grad():
            gradients, batches = _mean_gradients(trainer, module, step, slots)
    finally:
        replay.finish()
    if mean := mean_over_ranks(trainer):
        gradients = {name: mean(gradient) for name, gradient in gradients.items()}
    return snip({slot.name: slot.parameter.detach() for slot in slots}, gradients), batches


def _mean_gradients(
    trainer: pl.Trainer, module: pl.LightningModule, step: Any, slots: list[Slot]
) -> tuple[Params, int]:
    totals = {slot.name: torch.zeros_like(widen(slot.parameter.detach())) for slot in slots}
    batches = 0
    for arguments in _training_set(trainer, module, step):
        with trainer.precision_plugin.train_step_context():
            output = step(*arguments)
        try:
            loss = loss_of(output)
        except SkipBatchError:
            continue
        if not loss.requires_grad:
            raise MisconfigurationException(
                "LotteryTicket(score='snip') needs the gradient once, but this loss has no graph: use "
                "score='magnitude', or 'snr' with a search that has deviations."
            )
        parameters = [slot.parameter for slot in slots]
        found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for slot, gradient in zip(slots, found, strict=True):
            totals[slot.name] += gradient
        batches += 1
    if not batches:
        raise MisconfigurationException("LotteryTicket(score='snip') found no batch in the training set.")
    return {name: total / batches for name, total in totals.items()}, batches


def _training_set(trainer: pl.Trainer, module: pl.LightningModule, step: Any) -> Iterator[list[Any]]:
    """Yield the arguments of the training step for every batch of an epoch, ready on the device."""
    loader = copy.copy(trainer.fit_loop._combined_loader)
    assert loader is not None, "there is a training set once training starts"
    generators = [g for dl in loader.flattened for g in _generators(dl)]
    before = [generator.get_state() for generator in generators]
    loader.flattened = [_second(dl) for dl in loader.flattened]
    with_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    limit = trainer.num_training_batches
    try:
        for batch, index, _ in islice(loader, None if limit == float("inf") else int(limit)):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            yield [batch, index] if with_index else [batch]
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def _second(loader: Any) -> Any:
    """Return a loader of the same data that can be gone through while the Trainer has begun with the first."""
    if not isinstance(loader, DataLoader):
        return loader
    second = copy.copy(loader)
    second._iterator = None  # persistent workers would be taken away from the first
    return second


def _generators(loader: Any) -> list[torch.Generator]:
    batches = getattr(loader, "batch_sampler", None)
    holders = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    found = {id(g): g for holder in holders if isinstance(g := getattr(holder, "generator", None), torch.Generator)}
    return list(found.values())
