"""Report of a conversion: the replaced layers, and how to undo it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from lightning_bpfree.methods.reversible_recompute.families.base import Rewire
from lightning_bpfree.methods.reversible_recompute.layer_stack import ReversibleLayers


class Converted(NamedTuple):
    """One stack that was made reversible.

    Args:
        path: name of the stack in the model.
        family: what its layers are.
        reversible: how many layers are reversible blocks now.
        ordinary: how many are not, for they change the shape.
        rewire: what became of normalizations after the skips.
        scale: factors of the skips.
        fusion: how the streams become one.
        new_parameters: how many were added, by the fusion.
    """

    path: str
    family: str
    reversible: int
    ordinary: int
    rewire: Rewire | None
    scale: tuple[float, float]
    fusion: str
    new_parameters: int


class Conversion:
    """What ``convert_to_reversible`` has replaced: ``report`` has an entry for each of ``stacks``.

    Examples:
        >>> layer = nn.TransformerEncoderLayer(8, 2, norm_first=True)
        >>> from lightning_bpfree.methods.reversible_recompute.conversion import convert_to_reversible
        >>> model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        >>> conversion = convert_to_reversible(model, ["layers"], warn=False)
        >>> print(conversion)
        layers: 3 x torch.nn.TransformerEncoderLayer, streams fused by mean, all weights reused
        >>> conversion.undo()
        >>> type(model.layers).__name__
        'ModuleList'
    """

    def __init__(self) -> None:
        self.report: list[Converted] = []
        self.stacks: list[ReversibleLayers] = []
        self._places: list[tuple[nn.Module, str, nn.Module]] = []
        self._flags: list[tuple[nn.Module, str, Any]] = []

    def undo(self) -> None:
        """Restore the lists of layers; the layers keep their current weights."""
        for owner, name, original in reversed(self._places):
            setattr(owner, name, original)
        for owner, name, value in reversed(self._flags):
            setattr(owner, name, value)
        self._places, self._flags, self.stacks = [], [], []

    def replace(self, path: str, places: Sequence[tuple[nn.Module, str]], stack: ReversibleLayers) -> None:
        """Replace the list ``path`` by the stack, in all modules that hold it."""
        self.stacks.append(stack)
        self.report.append(_entry(path, stack))
        for owner, name in places:
            self._places.append((owner, name, getattr(owner, name)))
            setattr(owner, name, stack)
            self._turn_off_fast_path(owner)

    def _turn_off_fast_path(self, owner: nn.Module) -> None:
        for flag in ("use_nested_tensor", "enable_nested_tensor"):  # the fast path of nn.TransformerEncoder
            if hasattr(owner, flag):
                self._flags.append((owner, flag, getattr(owner, flag)))
                setattr(owner, flag, False)

    def __str__(self) -> str:
        return "\n".join(map(_line, self.report))


def _entry(path: str, stack: ReversibleLayers) -> Converted:
    count = sum(map(len, stack.stretches))
    new = 0 if stack.fusions is None else sum(p.numel() for p in stack.fusions.parameters())
    family, ordinary = stack.family.name, len(stack) - count
    return Converted(path, family, count, ordinary, stack.rewire, stack.scale, stack.fusion, new)


def _line(entry: Converted) -> str:
    wiring = {None: "", "pre_norm": ", normalizations moved before the branches", "scaled": ", whole sublayers"}
    scale = "" if entry.scale == (1.0, 1.0) else f", skips scaled by {entry.scale[0]:g} and {entry.scale[1]:g}"
    rest = f", {entry.ordinary} ordinary between them" if entry.ordinary else ""
    weights = f"{entry.new_parameters} parameters new" if entry.new_parameters else "all weights reused"
    return (
        f"{entry.path}: {entry.reversible} x {entry.family}{rest}{wiring[entry.rewire]}{scale}, streams fused by "
        f"{entry.fusion}, {weights}"
    )
