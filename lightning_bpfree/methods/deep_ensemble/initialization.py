"""Other initial weights for each member."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.core.replay.random_streams import RandomStreams
from lightning_bpfree.methods.deep_ensemble.members import State, state_of

Initialize = Literal["reset", "same"] | Callable[[pl.LightningModule], Any]


def initial_states(module: pl.LightningModule, seeds: list[int], initialize: Initialize) -> list[State]:
    """Return the members' first parameters and buffers; the module and the global random streams stay as they are.

    The first member starts from the module as it is. Frozen parameters are those of the module in all members.

    Args:
        module: the module.
        seeds: seeds of the members; each decides its member's initialization alone.
        initialize: ``"reset"``: by ``reset_parameters()`` of the module, or of its parts; ``"same"``: not at all; or a
            function that initializes the module that it is given, in place.

    Raises:
        MisconfigurationException: if nothing in the module can be reset, or parameters have no shape yet.
    """
    lazy = [slot.name for slot in ParameterSlots(module) if nn.parameter.is_lazy(slot.parameter)]
    if lazy:
        raise MisconfigurationException(
            f"DeepEnsemble copies parameters before the first batch, and {', '.join(lazy)} have no shape yet: let the "
            "module see one batch before fit, or give its layers their sizes."
        )
    own = state_of(module)
    if initialize == "same" or len(seeds) == 1:
        return [own] * len(seeds)
    draw = redraw_of(module) if initialize == "reset" else initialize
    streams = RandomStreams([module.device])
    before, states = streams.save(), [own]
    try:
        for seed in seeds[1:]:
            streams.seed(seed)
            with torch.no_grad():
                draw(module)
            fresh = state_of(module)
            states.append(fresh | {slot.name: own[slot.name] for slot in _frozen(module)})
            _restore(module, own)
    finally:
        _restore(module, own)
        streams.load(before)
    return states


def redraw_of(module: pl.LightningModule) -> Callable[[Any], None]:
    """Return a function that initializes the module again, and say which parameters it cannot reach."""
    if callable(getattr(module, "reset_parameters", None)):
        return lambda whole: whole.reset_parameters()
    resets, reached = _resets(module)
    left = [slot.name for slot in ParameterSlots(module).trainable() if id(slot.parameter) not in reached]
    if not resets:
        raise MisconfigurationException(
            f"DeepEnsemble(initialize='reset'): no part of {type(module).__name__} has a method reset_parameters() or "
            "is a transformers model, so that members would start alike. Define reset_parameters(self) on the module, "
            "pass a function that initializes it, or say initialize='same'."
        )
    if left:
        some = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        rank_zero_info(
            f"DeepEnsemble: {some} are the same in all members at the start, because nothing initializes them again."
        )

    def draw(_: Any) -> None:
        for reset in resets:
            reset()

    return draw


def _resets(module: nn.Module) -> tuple[list[Callable[[], Any]], set[int]]:
    """Return what initializes parts of the module again, inner parts first, and ids of the parameters reached."""
    resets: list[Callable[[], Any]] = []
    reached: set[int] = set()
    pretrained = [part for part in module.modules() if _is_transformers(part)]
    inside = {id(inner) for part in pretrained for inner in part.modules()}
    for part in reversed(list(module.modules())):
        if id(part) in inside:
            continue
        for name in ("reset_parameters", "_reset_parameters"):  # torch's attention has the latter
            if callable(getattr(part, name, None)):
                resets.append(getattr(part, name))
                reached |= {id(parameter) for parameter in part.parameters()}
                break
    outermost = [p for p in pretrained if not any(p is not q and p in list(q.modules()) for q in pretrained)]
    for part in outermost:
        resets.append(partial(_redraw_transformers, part))
        reached |= {id(parameter) for parameter in part.parameters()}
    return resets, reached


def _is_transformers(part: nn.Module) -> bool:
    return any(kind.__name__ == "PreTrainedModel" for kind in type(part).__mro__)


def _redraw_transformers(model: Any) -> None:
    """Initialize a transformers model as its constructor does."""
    for part in [*model.modules(), *model.parameters()]:
        part.__dict__.pop("_is_hf_initialized", None)
    model.init_weights()
    model.tie_weights()


def _frozen(module: nn.Module) -> Any:
    return [slot for slot in ParameterSlots(module) if not slot.parameter.requires_grad]


def _restore(module: nn.Module, state: State) -> None:
    with torch.no_grad():
        for slot in ParameterSlots(module):
            slot.parameter.copy_(state[slot.name])
        for name, buffer in module.named_buffers(remove_duplicate=False):
            if name in state:
                buffer.copy_(state[name])
