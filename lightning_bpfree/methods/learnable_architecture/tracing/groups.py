"""Groups of layers whose channels are tied by residual streams, norms, attention heads, and their readers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

from torch import nn

from lightning_bpfree.methods.learnable_architecture.tracing.layers import Held, Layer, layers_of
from lightning_bpfree.methods.learnable_architecture.tracing.probe import (
    INPUT,
    ExampleCall,
    Poison,
    Raw,
    Seen,
    seen,
)

_ALL = range(1 << 14)  # channels of layers whose number is not known


class Layout(NamedTuple):
    """Where the entries of units lie along an axis: those of unit u are ``base + u * stride``.

    Args:
        base: the entries of the first unit.
        stride: distance between the entries of neighboring units.
    """

    base: tuple[int, ...]
    stride: int

    def of(self, units: Sequence[int]) -> set[int]:
        """Return the entries of some units."""
        return {b + u * self.stride for u in units for b in self.base}

    def ordered(self, kept: int) -> list[tuple[int, int]]:
        """Return the entries of the first units, in their order along the axis, each with its unit."""
        return sorted((b + u * self.stride, u) for u in range(kept) for b in self.base)

    @property
    def is_prefix(self) -> bool:
        """Whether the entries of the first units are the first entries."""
        return self.base == tuple(range(self.stride))


class Member(NamedTuple):
    """One axis of one tensor that is cropped with a group.

    Args:
        layer: name of the layer.
        held: the axis.
        role: whether its entries read the units, make them, or go along with them.
        layout: where its units lie.
    """

    layer: str
    held: Held
    role: Literal["reads", "makes", "passes"]
    layout: Layout


@dataclass
class Group:
    """Units that are kept or cropped together.

    Args:
        name: the layers that make them.
        count: units.
        members: everything that is cropped with them.
        makers: names of the layers that make them.
        readers: names of the layers that read them.
        places: where the units lie in the inputs of all layers that they come to.
    """

    name: str
    count: int
    members: list[Member]
    makers: list[str]
    readers: list[str]
    places: dict[str, Layout]

    @property
    def are_heads(self) -> bool:
        """Whether a unit has several rows, as a head of attention has."""
        return any(len(m.layout.base) > 1 for m in self.members if m.role == "makes")


@dataclass
class Widths:
    """What can be cropped, and what cannot.

    Args:
        groups: the groups.
        fixed: names of layers whose channels cannot be cropped, with the reason.
    """

    groups: list[Group] = field(default_factory=list)
    fixed: dict[str, str] = field(default_factory=dict)


Maker = str | Raw


class _Reach(NamedTuple):
    """Where channels of a maker are seen: the first, the second, the last, and all of them."""

    first: Seen
    second: Seen
    last: Seen
    all: Seen


def trace_widths(network: nn.Module, call: ExampleCall, layers: Mapping[str, Layer] | None = None) -> Widths:
    """Return the groups of units of a network; the caller holds it in evaluation mode.

    Args:
        network: the network.
        call: of it, of one sample.
        layers: its layers.
    """
    layers = layers_of(network) if layers is None else layers
    look = partial(seen, network, call, layers)
    makers: dict[Maker, int] = {name: layer.makes for name, layer in layers.items() if layer.role == "mixes"}
    makers.update({name: len(_ALL) for name, layer in layers.items() if layer.role == "fixed"})
    makers[INPUT] = len(_ALL)
    reach: dict[Maker, _Reach] = {}
    for maker, channels in makers.items():
        known = channels < len(_ALL)
        every = look({maker: range(channels) if known else _ALL})
        if not every.columns and not every.output:
            continue  # it takes no part in this call
        if known:
            first, second, last = (look({maker: [c]}) for c in (0, min(1, channels - 1), channels - 1))
            reach[maker] = _Reach(first, second, last, every)
        else:
            reach[maker] = _Reach(every, every, every, every)
    for raw in _raw_parameters(network, layers):
        found = _raw_reach(look, raw)
        if found is not None:
            key = (*raw, found[0])
            reach[key], makers[key] = found[1], _size(key)
    widths = Widths()
    for tied in _tied(reach):
        _add(widths, layers, look, {maker: makers[maker] for maker in tied}, reach)
    return widths


def _size(raw: Raw) -> int:
    parameter = raw[0]._parameters[raw[1]]
    assert parameter is not None
    return parameter.shape[raw[2]]


def _raw_parameters(network: nn.Module, layers: Mapping[str, Layer]) -> Iterator[tuple[nn.Module, str]]:
    """Yield the parameters that are used by no layer: positions, class tokens, scales of layers."""
    inside = {id(part) for layer in layers.values() for part in layer.module.modules()}
    for owner in network.modules():
        if id(owner) not in inside:
            yield from ((owner, name) for name, p in owner._parameters.items() if p is not None and p.numel() > 1)


def _raw_reach(look: partial[Seen], raw: tuple[nn.Module, str]) -> tuple[int, _Reach] | None:
    """Return the axis of a raw parameter that holds channels, and where they are seen."""
    parameter = raw[0]._parameters[raw[1]]
    assert parameter is not None
    for dim in range(parameter.dim() - 1, -1, -1):
        size = parameter.shape[dim]
        if size < 2 or not parameter.is_floating_point():
            continue
        first, second, last = (look({(*raw, dim): [c]}) for c in (0, 1, size - 1))
        if first.columns != last.columns:
            return dim, _Reach(first, second, last, look({(*raw, dim): range(size)}))
    return None


def _tied(reach: Mapping[Maker, _Reach]) -> list[list[Maker]]:
    """Return the makers in groups: those that are seen in the same channels of some layer are tied."""
    root: dict[Maker, Maker] = {maker: maker for maker in reach}

    def find(maker: Maker) -> Maker:
        while root[maker] != maker:
            maker = root[maker]
        return maker

    owner: dict[tuple[str, int], Maker] = {}
    for maker, found in reach.items():
        for layer, columns in found.all.columns.items():
            for column in columns:
                root[find(maker)] = find(owner.setdefault((layer, column), maker))
    groups: dict[Maker, list[Maker]] = {}
    for maker in reach:
        groups.setdefault(find(maker), []).append(maker)
    return list(groups.values())


def _units(channels: int, found: _Reach) -> int:
    """Return into how many units a maker's channels fall: as many as are seen apart."""
    units = channels
    for layer, columns in found.all.columns.items():
        one = found.first.columns.get(layer, frozenset())
        if one and one & found.second.columns.get(layer, frozenset()):
            units = min(units, len(columns) // len(one))
    return max(units, 1)


def _add(
    widths: Widths, layers: Mapping[str, Layer], look: partial[Seen], tied: dict[Maker, int], reach: dict[Maker, _Reach]
) -> None:
    """Add a group, or say why its layers are fixed."""
    named = [maker for maker in tied if isinstance(maker, str) and maker != INPUT]
    places = sorted({layer for maker in tied for layer in reach[maker].all.columns})
    if any(reach[maker].all.output for maker in tied):
        return  # the network's outputs, or what goes into them without a layer between
    if INPUT in tied:
        widths.fixed.update(dict.fromkeys(named, "its channels are added to the network's input"))
        return
    why = _why_fixed(layers, named, places)
    count = min((_units(tied[maker], reach[maker]) for maker in tied), default=1)
    if not why and (count < 2 or any(channels % count for channels in tied.values())):
        why = "its channels are mixed by code outside of layers, so that none can be left out alone"
    if not why and not any(layers[place].role == "mixes" for place in places):
        return
    layouts = None if why else _layouts(look, tied, places, count)
    if layouts is None:
        why = why or "its channels lie in no regular order where they are read"
        widths.fixed.update(dict.fromkeys(named, why))
        return
    members = _members(layers, tied, layouts, count)
    readers = [place for place in places if layers[place].role == "mixes"]
    widths.groups.append(Group(" + ".join(named) or "parameters", count, members, named, readers, layouts))


def _why_fixed(layers: Mapping[str, Layer], makers: Sequence[str], places: Sequence[str]) -> str:
    for name in [*makers, *places]:
        if layers[name].role == "fixed":
            return f"{name}: {layers[name].why}"
    return ""


def _layouts(
    look: partial[Seen], tied: Mapping[Maker, int], places: Sequence[str], count: int
) -> dict[str, Layout] | None:
    """Return where the units of a group are seen; None if they lie in no regular order."""

    def rows(units: Sequence[int]) -> Poison:
        return {
            maker: [u * (channels // count) + j for u in units for j in range(channels // count)]
            for maker, channels in tied.items()
        }

    half = range(count // 2)
    first, second, last, several = (look(rows(units)) for units in ([0], [1], [count - 1], half))
    layouts: dict[str, Layout] = {}
    for place in places:
        base = tuple(sorted(first.columns.get(place, ())))
        after = second.columns.get(place, frozenset())
        if not base or not after or min(after) <= base[0]:
            return None
        layouts[place] = layout = Layout(base, min(after) - base[0])
        for found, units in ((second, [1]), (last, [count - 1]), (several, half)):
            if set(found.columns.get(place, ())) != layout.of(units):
                return None
    return layouts


def _members(
    layers: Mapping[str, Layer], tied: Mapping[Maker, int], layouts: Mapping[str, Layout], count: int
) -> list[Member]:
    """Return what is cropped with a group."""
    members: list[Member] = []
    for place, layout in layouts.items():
        role: Literal["reads", "passes"] = "reads" if layers[place].role == "mixes" else "passes"
        members += [Member(place, held, role, layout) for held in layers[place].held if held.side == "in"]
    for maker, channels in tied.items():
        block = Layout(tuple(range(channels // count)), channels // count)
        if isinstance(maker, tuple):
            owner, name, dim = maker
            members.append(Member("", Held(owner, name, dim, "out"), "makes", block))
        else:
            members += [Member(maker, h, "makes", block) for h in layers[maker].held if h.side == "out"]
    return [member for member in members if member.held.tensor is not None]
