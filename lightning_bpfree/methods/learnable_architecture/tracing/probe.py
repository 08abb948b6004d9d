"""Evaluations with some channels set to NaN, which show where they are read."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_bpfree.core.replay.random_streams import RandomStreams
from lightning_bpfree.methods.learnable_architecture.tracing.layers import Layer

OUTPUT = "output"
"""Stands for the network's output among the places where channels are seen."""
INPUT = "input"

Raw = tuple[nn.Module, str, int]
"""A parameter that is used by no layer: its owner, its name, an axis of it."""
Poison = Mapping[str | Raw, Sequence[int]]
"""Channels to set to NaN, of layers by name and of raw parameters."""


class Seen(NamedTuple):
    """Where NaNs were seen.

    Args:
        columns: channels of the inputs of layers that were NaN, by the layer's name.
        left: names of modules whose output had NaNs.
        output: whether the network's output had any.
    """

    columns: dict[str, frozenset[int]]
    left: frozenset[str]
    output: bool


class ExampleCall(NamedTuple):
    """A call of the network: one that tracing repeats.

    Args:
        args: by position.
        kwargs: by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, network: nn.Module) -> Any:
        """Return the network's output."""
        return network(*self.args, **self.kwargs)


@contextlib.contextmanager
def quiet_evaluation(network: nn.Module) -> Iterator[None]:
    """Evaluate without gradient, dropout and statistics; modes and random streams come back as they were."""
    modes = {module: module.training for module in network.modules()}
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    streams = RandomStreams([device])
    kept = streams.to_plain()
    network.eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # goes past the layers
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode
        streams.from_plain(kept)


def seen(
    network: nn.Module,
    call: ExampleCall,
    layers: Mapping[str, Layer],
    poison: Poison,
    watched: Sequence[str] = (),
    ends: Collection[str] = (),
) -> Seen:
    """Evaluate the network with some channels set to NaN, and return where they are seen.

    NaNs end where a layer reads them, so that the next layer sees its own input only.

    Args:
        network: the network.
        call: of it.
        layers: its layers.
        poison: the channels to set to NaN.
        watched: names of further modules whose outputs are looked at.
        ends: names of layers that keep channels apart, at which NaNs end all the same.
    """
    columns: dict[str, frozenset[int]] = {}
    left: set[str] = set()
    handles = []
    modules = dict(network.named_modules())
    try:
        for name, known in layers.items():
            layer = known._replace(role="mixes") if name in ends else known
            handles.append(layer.module.register_forward_pre_hook(partial(_look, layer, columns), with_kwargs=True))
            handles.append(layer.module.register_forward_hook(partial(_emit, layer, columns, poison.get(name, ()))))
        for name in watched:
            handles.append(modules[name].register_forward_hook(partial(_watch, name, left)))
        with _poisoned_parameters(poison), _poisoned_input(call, poison) as given:
            out = given(network)
    finally:
        for handle in handles:
            handle.remove()
    return Seen(columns, frozenset(left), any(bool(t.isnan().any()) for t in _floats(out)))


def _floats(value: Any) -> list[Tensor]:
    # Model outputs of transformers are mappings that pytree knows, once transformers has registered them.
    leaves = tree_leaves(dict(value) if isinstance(value, Mapping) else value)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


@contextlib.contextmanager
def _poisoned_input(call: ExampleCall, poison: Poison) -> Iterator[ExampleCall]:
    if INPUT not in poison:
        yield call
        return
    rows = list(poison[INPUT])

    def mark(x: Tensor) -> Tensor:
        if not x.is_floating_point() or x.dim() < 2:
            return x
        axis = 1 if x.dim() > 3 else -1
        return x.index_fill(axis, torch.tensor([r for r in rows if r < x.shape[axis]], dtype=torch.long), float("nan"))

    yield ExampleCall(*tree_map_only(Tensor, mark, (call.args, call.kwargs)))


@contextlib.contextmanager
def _poisoned_parameters(poison: Poison) -> Iterator[None]:
    kept = []
    try:
        for key, rows in poison.items():
            if isinstance(key, tuple):
                owner, name, dim = key
                parameter = owner._parameters[name]
                assert parameter is not None
                kept.append((owner, name, parameter))
                at = torch.tensor(list(rows), dtype=torch.long, device=parameter.device)
                owner._parameters[name] = parameter.detach().index_fill(dim, at, float("nan"))  # type: ignore[assignment]
        yield
    finally:
        for owner, name, parameter in reversed(kept):
            owner._parameters[name] = parameter


def _look(
    layer: Layer, columns: dict[str, frozenset[int]], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Note which channels of the input are NaN, and take the NaNs away where they would spread."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
    found = set(columns.get(layer.name, ()))
    for tensor in tensors:
        if bool(tensor.isnan().any()):
            axis = layer.axis % tensor.dim()
            other = [d for d in range(tensor.dim()) if d != axis]
            found |= set(tensor.isnan().any(dim=other).nonzero().flatten().tolist() if other else [])
    if found:
        columns[layer.name] = frozenset(found)
    if layer.role == "passes" and not isinstance(module, nn.LayerNorm):
        return None  # channels stay apart by themselves; a group of GroupNorm becomes NaN as a whole
    return tree_map_only(Tensor, lambda t: torch.nan_to_num(t) if t.is_floating_point() else t, (args, kwargs))


def _emit(
    layer: Layer,
    columns: Mapping[str, frozenset[int]],
    rows: Sequence[int],
    module: nn.Module,
    _: Any,
    out: Any,
) -> Any:
    """Set channels of the output to NaN: those asked for, and those that came in where channels stay apart."""
    marked = set(rows)
    if isinstance(module, nn.LayerNorm) and layer.role == "passes":
        marked |= columns.get(layer.name, frozenset())
    if not marked:
        return out

    def fill(t: Tensor) -> Tensor:
        at = torch.tensor([r for r in marked if r < t.shape[layer.axis]], dtype=torch.long, device=t.device)
        return t.index_fill(layer.axis, at, float("nan")) if t.is_floating_point() and t.dim() > 1 else t

    return tree_map_only(Tensor, fill, out)


def _watch(name: str, left: set[str], _: nn.Module, __: Any, out: Any) -> None:
    if any(bool(t.isnan().any()) for t in _floats(out)):
        left.add(name)
