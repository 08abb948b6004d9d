"""Evaluation of a trained module, with gradients with respect to inputs, without side effects on the module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_bpfree.core.block_hooks import whole_graph
from lightning_bpfree.core.replay.held_state import HeldState
from lightning_bpfree.core.replay.object_graph import walk
from lightning_bpfree.core.replay.random_streams import RandomStreams
from lightning_bpfree.core.replay.replay import Recoverable
from lightning_bpfree.core.replay.tensor_copies import TensorCopies, buffer_places
from lightning_bpfree.training.module_state import SilencedLogging

Forward = Callable[[nn.Module, Any], Any] | str | None
"""How a module is evaluated: by itself, by a submodule of this name, or by a function of the module and the inputs."""


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Evaluate ``module`` in evaluation mode with fixed parameters; afterwards all is as before, bit for bit.

    Parameters, their gradients and ``requires_grad``, buffers, training flags, attributes, metrics and random streams
    come back. Inside, gradients are recorded even where the caller has switched them off or is in inference mode, and
    parameters that were made in inference mode are replaced by copies, for torch cannot differentiate through them.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        >>> with torch.inference_mode(), frozen(net):
        ...     x = torch.ones(1, 2, requires_grad=True)
        ...     net(x).sum().backward()
        >>> x.grad is not None, net[0].weight.grad is None, net.training
        (True, True, True)
    """
    with torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as stack:
        devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
        streams = RandomStreams(sorted(devices, key=str))
        found = walk(module)
        parts: list[Recoverable] = [streams, HeldState(found)]
        for part in parts:
            stack.callback(part.load, part.save())
        stack.callback(_set_modes, [(part, part.training) for part in module.modules()])
        tensors = TensorCopies([*buffer_places(found.modules), *found.tensors, *found.arrays])
        tensors.remember()
        stack.enter_context(tensors.copies())
        stack.enter_context(SilencedLogging(module)())
        stack.enter_context(_constant(module))
        stack.enter_context(whole_graph())
        module.eval()
        yield


def _set_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for part, training in modes:  # metrics too, whose other attributes are put back by their states
        part.training = training


@contextlib.contextmanager
def _constant(module: nn.Module) -> Iterator[None]:
    """Let no parameter ask for a gradient."""
    own = [
        (owner._parameters, key, p)
        for owner in module.modules()
        for key, p in owner._parameters.items()
        if p is not None
    ]
    flags = {id(p): (p, p.requires_grad) for _, _, p in own}
    copies = {id(p): nn.Parameter(p.clone(), requires_grad=False) for _, _, p in own if p.is_inference()}
    for places, key, p in own:
        if p.is_inference():
            places[key] = copies[id(p)]  # tied parameters stay tied
        else:
            p.requires_grad_(False)
    try:
        yield
    finally:
        for places, key, p in own:
            places[key] = p
        for p, flag in flags.values():
            if not p.is_inference():
                p.requires_grad_(flag)


def evaluate(module: nn.Module, inputs: Any, forward: Forward = None) -> Any:
    """Return the output of the module for the inputs.

    Raises:
        ValueError: if ``forward`` names no submodule, or the module has no forward.
    """
    if callable(forward):
        return forward(module, inputs)
    if forward is None:
        if type(module).forward in (nn.Module.forward, pl.LightningModule.forward) and "forward" not in module.__dict__:
            names = [name for name, part in module.named_children() if not isinstance(part, torchmetrics.Metric)]
            raise ValueError(
                f"forward: {type(module).__name__} has no forward of its own; give the name of the submodule that maps "
                f"inputs to outputs, one of {names}, or a function (module, inputs) -> outputs."
            )
        return module(inputs)
    try:
        part = module.get_submodule(forward)
    except AttributeError as error:
        names = [name for name, _ in module.named_children()]
        raise ValueError(f"forward={forward!r}: no such submodule; give one of {names}, or a function.") from error
    return part(inputs)


def usable(value: Any, device: torch.device) -> Any:
    """Return tensors on the device that autograd can work with: those of inference mode are copied."""

    def moved(tensor: Tensor) -> Tensor:
        return (tensor.clone() if tensor.is_inference() else tensor.detach()).to(device)

    return tree_map_only(Tensor, moved, value)


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the module's first parameter or buffer; the CPU without any."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
