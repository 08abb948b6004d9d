"""Residual blocks that can be removed from a network, and which of their layers write to the residual stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_bpfree.methods.learnable_architecture.tracing.layers import Held, Layer
from lightning_bpfree.methods.learnable_architecture.tracing.probe import ExampleCall, seen


@dataclass(frozen=True)
class Block:
    """A block whose output is its input as soon as its last layers are zero.

    Args:
        name: name of the module.
        module: the module.
        last: weights and biases of the layers that write to the residual stream, with the layer's name.
        in_tuple: whether the block returns a tuple with one tensor.
        plain_call: whether it is called with one tensor and returns one, as ``nn.Identity`` is.
    """

    name: str
    module: nn.Module
    last: tuple[tuple[str, Held], ...]
    in_tuple: bool
    plain_call: bool


@dataclass(frozen=True)
class Stack:
    """Blocks of one list, of which the last can be left out.

    Args:
        name: name of the list.
        blocks: those that can be left out, in their order.
        least: how many stay: 0 where the list has other blocks as well.
    """

    name: str
    blocks: tuple[Block, ...]
    least: int


def trace_blocks(network: nn.Module, call: ExampleCall, layers: Mapping[str, Layer]) -> list[Stack]:
    """Return the lists of residual blocks; the caller holds the network in evaluation mode.

    Args:
        network: the network.
        call: of it, of one sample.
        layers: its layers.
    """
    names = {id(module): name for name, module in network.named_modules()}
    stacks: list[Stack] = []
    # Inner lists first: a stage of blocks that can be left out is no such block itself.
    for name, container in reversed(list(network.named_modules())):
        if not isinstance(container, nn.ModuleList | nn.Sequential) or name in layers:
            continue
        inside = [block.name for stack in stacks for block in stack.blocks]
        children = [names[id(child)] for child in container if names[id(child)] not in layers]
        inner = {child: [x for x in layers if x.startswith(f"{child}.")] for child in children}
        whole = [child for child in children if not any(block.startswith(f"{child}.") for block in inside)]
        candidates = [child for child in whole if len(inner[child]) > 1]
        found = [block for child in candidates if (block := _block(network, call, layers, child)) is not None]
        if found:
            stacks.append(Stack(name, tuple(found), int(len(found) == len(container))))
    return stacks[::-1]


def _block(network: nn.Module, call: ExampleCall, layers: Mapping[str, Layer], name: str) -> Block | None:
    module = network.get_submodule(name)
    before = _passed(network, call, module)
    if len(before) != 1 or not _keeps_shape(before[0].given, before[0].returned):
        return None
    last: dict[str, tuple[Held, ...]] = {}
    inside = {key: layer for key, layer in layers.items() if key.startswith(f"{name}.")}
    for key, layer in inside.items():
        if layer.role != "passes":
            rows = range(layer.makes or 1 << 14)
            found = seen(network, call, layers, {key: rows}, [name])
            if name in found.left:
                # A norm between the layer and the stream takes its scale away: the norm is the last layer then.
                norms = [k for k in found.columns if k in inside and _is_norm(inside[k])]
                behind = norms and name not in seen(network, call, layers, {key: rows}, [name], norms).left
                last_key = norms[-1] if behind else key
                last[last_key] = _affine(inside[last_key])
    held = tuple((key, h) for key, affine in last.items() for h in affine if h.tensor is not None)
    if not held or any(
        not any(h.name == "weight" and h.tensor is not None for h in affine) for affine in last.values()
    ):
        return None
    with _zeroed([h for _, h in held]):
        given, returned, alone = _passed(network, call, module)[0]
    out = returned[0] if isinstance(returned, tuple) else returned
    if not torch.allclose(out, given, rtol=0, atol=1e-6 * (1 + float(given.abs().max()))):
        return None
    in_tuple = isinstance(returned, tuple)
    return Block(name, module, held, in_tuple, alone and not in_tuple)


def _is_norm(layer: Layer) -> bool:
    return layer.role == "passes" and "Norm" in type(layer.module).__name__


def _affine(layer: Layer) -> tuple[Held, ...]:
    owner: nn.Module = layer.module
    if isinstance(owner, nn.MultiheadAttention):
        owner = owner.out_proj
    return Held(owner, "weight", 0, "out"), Held(owner, "bias", 0, "out")


def _keeps_shape(given: Any, returned: Any) -> bool:
    if isinstance(returned, tuple):
        if len(returned) != 1:
            return False
        returned = returned[0]
    tensors = isinstance(given, Tensor) and isinstance(returned, Tensor)
    return tensors and given.shape == returned.shape


class _Passed(NamedTuple):
    """One call of a part of a network: its first argument, its output, and whether there are other arguments."""

    given: Any
    returned: Any
    alone: bool


def _passed(network: nn.Module, call: ExampleCall, module: nn.Module) -> list[_Passed]:
    """Return the calls of a part of the network."""
    given: list[tuple[Any, bool]] = []
    calls: list[_Passed] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else next(iter(kwargs.values()), None)
        # A copy: some blocks add to their input in place.
        given.append((first.clone() if isinstance(first, Tensor) else first, len(args) == 1 and not kwargs))

    def after(_: nn.Module, __: Any, out: Any) -> None:
        first, alone = given.pop()
        calls.append(_Passed(first, out, alone))

    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        call(network)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextlib.contextmanager
def _zeroed(held: list[Held]) -> Iterator[None]:
    kept = [(h.owner, h.name, h.owner._parameters[h.name]) for h in held]
    try:
        for owner, name, parameter in kept:
            assert parameter is not None
            owner._parameters[name] = torch.zeros_like(parameter)  # type: ignore[assignment]
        yield
    finally:
        for owner, name, parameter in kept:
            owner._parameters[name] = parameter
