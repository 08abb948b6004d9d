"""Channels in layers: which axis of which parameter reads channels, produces them or is indexed by them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from lightning_bpfree.methods.learnable_architecture.continuous.convolution import ContinuousConv
from lightning_bpfree.methods.learnable_architecture.continuous.striding import FrequencyCrop, FrequencyRestore

Role = Literal["mixes", "passes", "fixed"]
"""Reads some channels and makes others; keeps channels apart; does something else with them."""


class Held(NamedTuple):
    """One axis of one tensor of a layer.

    Args:
        owner: the module that holds the tensor.
        name: name of the tensor in it.
        dim: the axis.
        side: ``"in"`` if its entries belong to channels that are read, ``"out"`` if to those that are made; for layers
            that keep channels apart, ``"in"``.
    """

    owner: nn.Module
    name: str
    dim: int
    side: Literal["in", "out"]

    @property
    def tensor(self) -> Tensor | None:
        """The tensor; None where the layer has none."""
        found = self.owner._parameters.get(self.name)
        return self.owner._buffers.get(self.name) if found is None else found


class Layer(NamedTuple):
    """A layer as the tracer sees it.

    Args:
        name: name of the module.
        module: the module.
        role: what it does with channels.
        axis: of its inputs and outputs that holds channels.
        held: tensors that are cropped with the channels.
        reads: channels of its input.
        makes: channels of its output.
        why: for fixed ones, why their channels cannot be cropped.
    """

    name: str
    module: nn.Module
    role: Role
    axis: int
    held: tuple[Held, ...]
    reads: int
    makes: int
    why: str = ""


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FIXED: dict[type, tuple[int, str]] = {
    nn.MultiheadAttention: (-1, "nn.MultiheadAttention computes all its heads from one width"),
    nn.RNNBase: (-1, "recurrent layers hold weights of all gates in one tensor"),
    nn.ConvTranspose1d: (1, "transposed convolutions are not supported"),
    nn.ConvTranspose2d: (1, "transposed convolutions are not supported"),
    nn.ConvTranspose3d: (1, "transposed convolutions are not supported"),
    nn.Bilinear: (-1, "bilinear layers are not supported"),
}


def layer_of(name: str, module: nn.Module) -> Layer | None:
    """Return the tracer's description of a module; None if it is not a layer.

    Args:
        name: name of the module.
        module: the module.
    """
    for kind, (axis, why) in _FIXED.items():
        if isinstance(module, kind):
            return Layer(name, module, "fixed", axis, (), 0, 0, why)
    if isinstance(module, ContinuousConv):
        held: tuple[Held, ...] = (
            Held(module.generator.out, "weight", 0, "in"),
            Held(module.generator.out, "bias", 0, "in"),
        )
        held += (Held(module, "bias", 0, "in"),)
        return Layer(name, module, "passes", 1, held, module.channels, module.channels)
    if isinstance(module, FrequencyCrop | FrequencyRestore):
        return Layer(name, module, "passes", 1, (), 0, 0)
    if isinstance(module, _CONVOLUTIONS):
        return _convolution(name, module)
    if isinstance(module, nn.Linear):
        held = (Held(module, "weight", 0, "out"), Held(module, "weight", 1, "in"), Held(module, "bias", 0, "out"))
        return _plain(Layer(name, module, "mixes", -1, held, module.in_features, module.out_features))
    if isinstance(module, nn.Embedding):
        held = (Held(module, "weight", 1, "out"),)
        return _plain(Layer(name, module, "mixes", -1, held, 0, module.embedding_dim))
    return _norm(name, module)


def _convolution(name: str, module: Any) -> Layer:
    held: tuple[Held, ...]
    reads, makes, groups = module.in_channels, module.out_channels, module.groups
    if groups == 1:
        held = (Held(module, "weight", 0, "out"), Held(module, "weight", 1, "in"), Held(module, "bias", 0, "out"))
        return _plain(Layer(name, module, "mixes", 1, held, reads, makes))
    if groups == reads == makes:
        held = (Held(module, "weight", 0, "in"), Held(module, "bias", 0, "in"))
        return _plain(Layer(name, module, "passes", 1, held, reads, makes))
    why = f"a convolution in {groups} groups of several channels would have groups of different sizes"
    return Layer(name, module, "fixed", 1, (), reads, makes, why)


def _norm(name: str, module: Any) -> Layer | None:
    names: tuple[str, ...]
    if isinstance(module, _BATCH_NORMS):
        names, size, axis = ("weight", "bias", "running_mean", "running_var"), module.num_features, 1
    elif isinstance(module, nn.GroupNorm):
        names, size, axis = ("weight", "bias"), module.num_channels, 1
    elif isinstance(module, nn.LayerNorm):
        if len(module.normalized_shape) != 1:
            why = "a LayerNorm over several axes has no channels of its own"
            return Layer(name, module, "fixed", -1, (), 0, 0, why)
        names, size = ("weight", "bias"), module.normalized_shape[0]
        axis = 1 if getattr(module, "data_format", None) == "channels_first" else -1
    else:
        return None
    if "running_mean" not in names and module.weight is None:
        return Layer(name, module, "fixed", axis, (), size, size, "a norm without weights says nothing of its channels")
    held = tuple(Held(module, key, 0, "in") for key in names)
    return _plain(Layer(name, module, "passes", axis, held, size, size))


def _plain(layer: Layer) -> Layer:
    """Return a layer, as a fixed one if its tensors are not plain parameters (parametrizations, weight_norm)."""
    if any(held.name == "weight" and "weight" not in held.owner._parameters for held in layer.held):
        return layer._replace(role="fixed", held=(), why="its weight is parametrized, and no plain parameter")
    return layer


def layers_of(network: nn.Module) -> dict[str, Layer]:
    """Return the layers of a network by name; what lies within a layer is left out.

    Args:
        network: the network.
    """
    found: dict[str, Layer] = {}
    inside: list[str] = []
    for name, module in network.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        layer = layer_of(name, module)
        if layer is not None:
            found[name] = layer
            inside.append(f"{name}.")
    return found
