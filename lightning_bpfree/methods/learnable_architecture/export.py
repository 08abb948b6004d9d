"""A plain network of the learned sizes, without masks and hooks, and everything needed to load it elsewhere."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_bpfree.methods.learnable_architecture.architecture import Architecture
from lightning_bpfree.methods.learnable_architecture.continuous.ccnn import CCNN, CCNNBlock
from lightning_bpfree.methods.learnable_architecture.continuous.convolution import ContinuousConv
from lightning_bpfree.methods.learnable_architecture.continuous.fourier import resize_matrix
from lightning_bpfree.methods.learnable_architecture.continuous.plain import PlainConv, PlainResize
from lightning_bpfree.methods.learnable_architecture.continuous.striding import FrequencyCrop, FrequencyRestore
from lightning_bpfree.methods.learnable_architecture.sizes.cropping import set_sizes
from lightning_bpfree.methods.learnable_architecture.tracing.counting import count_macs
from lightning_bpfree.methods.learnable_architecture.tracing.probe import quiet_evaluation


class ExportedNetwork(NamedTuple):
    """A network of the learned sizes.

    Args:
        network: a plain ``nn.Module`` without masks, in evaluation mode.
        config: sizes, as plain values that JSON takes; with it and the state dict the network can be made elsewhere.
        macs: multiply-accumulates of one sample, counted on ``network`` by ``torch.utils.flop_counter``.
        params: number of its parameters.
    """

    network: nn.Module
    config: dict[str, Any]
    macs: int
    params: int

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``state_dict.pt`` into a folder, which is made if need be.

        Args:
            folder: where they go.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(self.config, indent=1), encoding="utf-8")
        torch.save(self.network.state_dict(), place / "state_dict.pt")


def export(architecture: Architecture) -> ExportedNetwork:
    """Return the network as a plain module of the present sizes.

    Args:
        architecture: installed in a network.

    Raises:
        RuntimeError: if the plain network does not compute what the masked one computes.
    """
    network = architecture.network
    with quiet_evaluation(network):
        expected = architecture.call(network)
        tensors = {
            name: [(t.owner, t.name, t.cropped(t.get()).detach().clone(), t) for t in found.values()]
            for name, found in architecture.tensors.items()
        }
        plain, twins = _copied(architecture)
        layers: dict[str, Any] = {}
        modules = dict(plain.named_modules())
        for name, found in tensors.items():
            for owner, key, value, _ in found:
                twin = twins[id(owner)]
                if key in twin._buffers:
                    twin._buffers[key] = value
                else:
                    twin._parameters[key] = nn.Parameter(value)
            before = set_sizes(modules[name], [t for *_, t in found if t.taps])
            changed = {key: getattr(modules[name], key) for key in before}
            inner = {id(module): path for path, module in modules[name].named_modules()}
            shapes = {
                ".".join(filter(None, (inner[id(twins[id(owner)])], key))): list(value.shape)
                for owner, key, value, _ in found
            }
            layers[name] = {"attributes": changed, "shapes": shapes}
        config: dict[str, Any] = {"layers": layers, **_without_blocks(architecture, plain)}
        config["replaced"] = _replace_continuous(architecture, plain)
        gone = [*config["replaced"], *config["skipped"], *config["removed"]]
        for name in [n for n in layers if any(f"{n}.".startswith(f"{prefix}.") for prefix in gone)]:
            del layers[name]
        if isinstance(network, CCNN):
            config = _config_of_ccnn(cast("CCNN", plain))
        plain.eval()
        _check_equal(expected, architecture.call(plain))
    call = architecture.call
    macs = count_macs(plain, *call.args, **call.kwargs)
    return ExportedNetwork(plain, config, macs, sum(p.numel() for p in plain.parameters()))


def _copied(architecture: Architecture) -> tuple[nn.Module, dict[int, nn.Module]]:
    """Return a copy of the network without hooks of ours, and its modules by the ids of the originals."""
    network: Any = architecture.network
    kept = network.__dict__.get("_trainer")
    architecture.remove()
    try:
        if kept is not None:
            network.__dict__["_trainer"] = None
        plain = copy.deepcopy(network)
    finally:
        if kept is not None:
            network.__dict__["_trainer"] = kept
        architecture.install()
    plain._modules.pop("learnable_architecture", None)
    plain.__dict__.pop("configure_optimizers", None)
    originals = {name: module for name, module in network.named_modules() if not name.startswith("learnable_arch")}
    copies = dict(plain.named_modules())
    return plain, {id(module): copies[name] for name, module in originals.items()}


def _without_blocks(architecture: Architecture, plain: nn.Module) -> dict[str, list[str]]:
    skipped: list[str] = []
    removed: list[str] = []
    for stack in architecture.stacks:
        for block in stack.blocks:
            gate = architecture.gates[block.name]
            if gate.number >= gate.axis.kept:
                (skipped if block.plain_call else removed).append(block.name)
    for name in skipped:
        parent, _, last = name.rpartition(".")
        setattr(plain.get_submodule(parent), last, nn.Identity())
    for name in reversed(removed):
        parent, _, last = name.rpartition(".")
        container: Any = plain.get_submodule(parent)
        del container[int(last)]
    return {"skipped": skipped, "removed": removed}


def _replace_continuous(architecture: Architecture, plain: nn.Module) -> dict[str, Any]:
    """Replace continuous convolutions and Fourier crops by plain layers, and return these."""
    new: dict[str, nn.Module] = {}
    for name, module in plain.named_modules():
        if isinstance(module, ContinuousConv):
            new[name] = _plain_convolution(module)
    sides: dict[str, list[int]] = {}
    handles = []
    for name, module in plain.named_modules():
        if isinstance(module, FrequencyCrop | FrequencyRestore):

            def note(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                sides[name] = list(args[0].shape[2:])

            handles.append(module.register_forward_pre_hook(note))
    architecture.call(plain)
    for handle in handles:
        handle.remove()
    for name, found in sides.items():
        new[name] = _plain_resize(plain.get_submodule(name), found)
    for name, module in new.items():
        parent, _, last = name.rpartition(".")
        setattr(plain.get_submodule(parent), last, module)
    return {name: module.config for name, module in new.items() if isinstance(module, PlainConv | PlainResize)}


def _plain_convolution(conv: ContinuousConv) -> PlainConv:
    kernel = conv.kernel().detach()
    taps = list(kernel.shape[2:])
    plain = PlainConv(kernel.shape[0], taps, conv.causal, conv.bias is not None).to(kernel)
    plain.weight.data = kernel.clone()
    if conv.bias is not None:
        assert plain.bias is not None
        plain.bias.data = conv.bias.detach().clone()
    return plain


def _plain_resize(module: nn.Module, sides: list[int]) -> PlainResize:
    like = next(module.parameters(), None)
    matrices: list[Tensor] = []
    if isinstance(module, FrequencyCrop):
        for n, axis in zip(sides, module.frequency_axes, strict=True):
            matrices.append(resize_matrix(n, min(n, axis.crop), axis.values()[: n // 2 + 1], like))
    elif isinstance(module, FrequencyRestore):
        matrices = [resize_matrix(n, side, torch.ones(n // 2 + 1)) for n, side in zip(sides, module.sides, strict=True)]
    plain = PlainResize([list(matrix.shape) for matrix in matrices])
    for d, matrix in enumerate(matrices):
        plain._buffers[f"matrix_{d}"] = matrix.detach().contiguous()
    return plain


def _config_of_ccnn(plain: CCNN) -> dict[str, Any]:
    """Return from what a PlainCCNN of the same state dict is made."""
    stem: Any = plain.stem
    head: Any = plain.head
    blocks: list[Any] = [
        {"kernel": cast("Any", block.conv).taps, "hidden": cast("Any", block.mix).out_channels}
        if isinstance(block, CCNNBlock)
        else None
        for block in plain.blocks
    ]
    crops = None
    if plain.crops is not None:
        restore = plain.restore.shapes if isinstance(plain.restore, PlainResize) else None
        crops = {"shapes": [cast("Any", crop).shapes for crop in plain.crops], "restore": restore}
    return {
        "in_shape": list(plain.in_shape),
        "outputs": head.out_channels if plain.dense else head.out_features,
        "dense": plain.dense,
        "width": stem[1].out_channels,
        "stem_kernel": stem[0].taps,
        "blocks": blocks,
        "crops": crops,
    }


def _check_equal(expected: Any, found: Any) -> None:
    pairs = zip(_tensors(expected), _tensors(found), strict=True)
    for a, b in pairs:
        scale = float(a.abs().max()) if a.numel() else 0.0
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3, atol=1e-4 * (1 + scale)):
            raise RuntimeError(
                "LearnableArchitecture.export: the plain network does not compute what the masked one computes. Its "
                "forward pass uses something of a layer that is not cropped; leave that layer out by exclude=."
            )


def _tensors(value: Any) -> list[Tensor]:
    leaves = tree_leaves(dict(value) if isinstance(value, dict) else value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
