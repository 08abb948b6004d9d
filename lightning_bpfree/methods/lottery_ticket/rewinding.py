"""Resets of a module to its first initialization, or to a new one, during a fit."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_bpfree.core.params import ParameterSlots, Params
from lightning_bpfree.core.replay.random_streams import RandomStreams
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.methods.lottery_ticket.masks import Masks
from lightning_bpfree.methods.lottery_ticket.ticket import on_cpu


def captured(module: nn.Module) -> tuple[Params, Params]:
    """Return copies of all parameters and all buffers on the CPU, by name.

    Raises:
        MisconfigurationException: for parameters that have no shape yet.
    """
    slots = list(ParameterSlots(module))
    lazy = [slot.name for slot in slots if nn.parameter.is_lazy(slot.parameter)]
    if lazy:
        raise MisconfigurationException(
            f"{', '.join(lazy)} have no shape before the first batch, but LotteryTicket rewinds to the weights before "
            "it: run one batch through the module before fit, or give its layers their sizes."
        )
    return on_cpu({slot.name: slot.parameter for slot in slots}), on_cpu(dict(module.named_buffers()))


def rewind(module: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Set parameters and buffers bit for bit, in place, so that optimizers and wrappers keep hold of them."""
    with torch.no_grad():
        for slot in ParameterSlots(module):
            slot.parameter.copy_(params[slot.name])
        for name, buffer in module.named_buffers():
            if name not in buffers:
                continue  # born during training
            if buffer.shape == buffers[name].shape:
                buffer.copy_(buffers[name])
            else:
                owner, _, key = name.rpartition(".")
                module.get_submodule(owner)._buffers[key] = buffers[name].to(buffer.device, copy=True)


def shuffled(params: Mapping[str, Tensor], masks: Masks, seed: int) -> Params:
    """Return ``params`` with the survivors of each masked tensor in random order; pruned and other weights stay."""
    moved = dict(params)
    for i, name in enumerate(masks):
        index = masks.index(name).cpu()
        generator = torch.Generator().manual_seed(mix(seed, i))
        flat = params[name].flatten().clone()
        flat[index] = flat[index[torch.randperm(len(index), generator=generator)]]
        moved[name] = flat.view(params[name].shape)
    return moved


def check_redrawable(module: pl.LightningModule, names: Collection[str]) -> None:
    """Raise MisconfigurationException if some of the named parameters cannot be initialized again."""
    if callable(getattr(module, "reset_parameters", None)):
        return
    lacking = [path or type(module).__name__ for path, part in _owners(module, names) if _reset_of(part) is None]
    if lacking:
        raise MisconfigurationException(
            f"LotteryTicket(weights='fresh') initializes weights again, but {', '.join(lacking)}: has parameters, "
            f"but no method reset_parameters(). Give {type(module).__name__} a reset_parameters(self) that "
            "initializes all of its weights."
        )


def redraw(module: pl.LightningModule, names: Collection[str], seed: int) -> None:
    """Initialize the named parameters again, a function of ``seed`` alone; no other parameter and no stream moves.

    Args:
        module: with a method ``reset_parameters``, or with submodules that have one.
        names: which parameters.
        seed: seed of the initialization.
    """
    slots = list(ParameterSlots(module))
    others = [(slot.parameter, slot.parameter.detach().clone()) for slot in slots if slot.name not in names]
    with seeded(seed, module.device), torch.no_grad():
        whole = getattr(module, "reset_parameters", None)
        # Outer modules last, as in construction: some set parts of what they contain.
        for reset in [whole] if callable(whole) else [_reset_of(part) for _, part in reversed(_owners(module, names))]:
            assert reset is not None, "check_redrawable comes first"
            reset()
        for parameter, value in others:
            parameter.copy_(value)
    now = {slot.name: slot.parameter for slot in ParameterSlots(module)}
    replaced = [slot.name for slot in slots if now.get(slot.name) is not slot.parameter]
    if replaced:
        raise MisconfigurationException(
            f"reset_parameters() replaced the tensors of {', '.join(replaced)}, which the Trainer does "
            "not see: write into the parameters in place, as torch.nn.init does."
        )


def fresh_optimizers(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Ask the module for its optimizers and schedulers again; moments, schedules and gradients start again."""
    module.zero_grad(set_to_none=True)
    trainer.strategy.setup_optimizers(trainer)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from global random streams that start at ``seed``, and restore them afterward."""
    streams = RandomStreams([device])
    before = streams.save()
    streams.seed(seed)
    try:
        yield
    finally:
        streams.load(before)


def _owners(module: nn.Module, names: Collection[str]) -> list[tuple[str, nn.Module]]:
    wanted = {id(place) for slot in ParameterSlots(module) if slot.name in names for place, _ in slot.places}
    return [(path, part) for path, part in module.named_modules() if id(part) in wanted]


def _reset_of(part: nn.Module) -> Any:
    for name in ("reset_parameters", "_reset_parameters"):  # torch's attention has the latter
        if callable(getattr(part, name, None)):
            return getattr(part, name)
    return None
