"""The learnable sizes of one network: built from what tracing finds, installed in its layers, and removed again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_bpfree.methods.learnable_architecture.continuous.convolution import ContinuousConv
from lightning_bpfree.methods.learnable_architecture.continuous.striding import FrequencyCrop
from lightning_bpfree.methods.learnable_architecture.sizes.axes import (
    Axis,
    Dimension,
    FrequencyAxis,
    KernelAxis,
    UnitAxis,
    refresh,
)
from lightning_bpfree.methods.learnable_architecture.sizes.cropping import (
    CroppedLayer,
    CroppedTensor,
    Cut,
    Gate,
    SkippedBlock,
    Taps,
)
from lightning_bpfree.methods.learnable_architecture.tracing.blocks import Stack, trace_blocks
from lightning_bpfree.methods.learnable_architecture.tracing.groups import Group, trace_widths
from lightning_bpfree.methods.learnable_architecture.tracing.layers import Layer, layers_of
from lightning_bpfree.methods.learnable_architecture.tracing.probe import ExampleCall, quiet_evaluation

_START = 2.2  # spread of the mask of an ordinary kernel: 0.9 at its outermost taps


class Architecture(nn.Module):
    """All learnable sizes of a network, and the layers that they crop.

    A part of the user's module while it trains, so that training rules and processes see its parameters. It stays out
    of the state dict, which remains that of the plain module.

    Args:
        network: the network.
        call: of it, of one sample.
        dims: which sizes are learned; None: all that the network has.
        exclude: patterns of names of layers and blocks that keep their size.
    """

    def __init__(
        self,
        network: nn.Module,
        call: ExampleCall,
        dims: Collection[Dimension] | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._network = [network]  # in a list, so that it is no part of this module
        self.call, self.dims, self.exclude = call, dims, tuple(exclude)
        self.layers: dict[str, Layer] = layers_of(network)
        self.groups: list[Group] = []
        self.stacks: list[Stack] = []
        self.fixed: dict[str, str] = {}
        self.named: dict[str, Axis] = {}
        self.own = nn.ModuleList()
        self.tensors: dict[str, dict[tuple[int, str], CroppedTensor]] = {}
        self.gates: dict[str, Gate] = {}
        self._installed: list[CroppedLayer | SkippedBlock] = []
        with quiet_evaluation(network):
            self._trace()
        self.manage()
        device = next((p.device for p in network.parameters()), None)
        self.to(device)
        self._register_state_dict_hook(_without_own)
        self.register_load_state_dict_post_hook(_none_missing)

    @property
    def network(self) -> nn.Module:
        """The network."""
        return self._network[0]

    @property
    def axes(self) -> list[Axis]:
        """All sizes that are learned."""
        return list(self.named.values())

    def wants(self, dimension: Dimension) -> bool:
        """Whether sizes of a kind are to be learned."""
        return self.dims is None or dimension in self.dims

    def _excluded(self, *names: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.exclude)

    # --- tracing ---

    def _trace(self) -> None:
        if self.wants("width"):
            widths = trace_widths(self.network, self.call, self.layers)
            self.fixed = {name: why for name, why in widths.fixed.items() if not self._excluded(name)}
            for group in widths.groups:
                if not self._excluded(*group.makers):
                    self._add_group(group)
        if self.wants("depth"):
            for stack in trace_blocks(self.network, self.call, self.layers):
                if not self._excluded(stack.name, *(block.name for block in stack.blocks)):
                    self._add_stack(stack)
        for name, module in self.network.named_modules():
            self._add_taps_and_frequencies(name, module)

    def _new(self, name: str, axis: Axis, own: bool = True) -> None:
        self.named[name] = axis
        axis.managed = True
        if own:
            self.own.append(axis)

    def _tensor(self, layer: str, owner: nn.Module, name: str) -> CroppedTensor:
        found = self.tensors.setdefault(layer, {})
        return found.setdefault((id(owner), name), CroppedTensor(owner, name))

    def _add_group(self, group: Group) -> None:
        axis = UnitAxis("width", group.count)
        self._new(f"width/{group.name}", axis)
        self.groups.append(group)
        for member in group.members:
            cut = Cut(member.held.dim, axis, member.layout, member.role == "reads")
            self._tensor(
                member.layer or self._owner_of(member.held.owner), member.held.owner, member.held.name
            ).cuts.append(cut)

    def _owner_of(self, owner: nn.Module) -> str:
        names: dict[int, str] = {id(module): name for name, module in self.network.named_modules()}
        return names[id(owner)]

    def _add_stack(self, stack: Stack) -> None:
        axis = UnitAxis("depth", len(stack.blocks), stack.least)
        self._new(f"depth/{stack.name or 'network'}", axis)
        self.stacks.append(stack)
        for index, block in enumerate(stack.blocks):
            gate = Gate(axis, index)
            self.gates[block.name] = gate
            for layer, held in block.last:
                self._tensor(layer, held.owner, held.name).gates.append(gate)

    def _add_taps_and_frequencies(self, name: str, module: nn.Module) -> None:
        axes: list[Axis] = []
        if isinstance(module, ContinuousConv):
            axes = list(module.kernel_axes)
        elif isinstance(module, FrequencyCrop):
            axes = list(module.frequency_axes)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and name in self.layers:
            self._add_plain_kernel(name, module)
        learned = axes and self.wants(axes[0].dimension) and not self._excluded(name)
        for d, axis in enumerate(axes):
            refresh([axis])
            if learned:
                self._new(f"{axis.dimension}/{name}.{d}", axis, own=False)

    def _add_plain_kernel(self, name: str, module: nn.Module) -> None:
        """Learn the kernel size of an ordinary convolution, where its padding keeps the sides whatever the kernel."""
        conv: Any = module
        layer = self.layers[name]
        fits = isinstance(conv.padding, tuple) and layer.role != "fixed" and "weight" in conv._parameters
        if not self.wants("kernel") or self._excluded(name) or not fits:
            return
        for d, (size, pad, spacing) in enumerate(zip(conv.kernel_size, conv.padding, conv.dilation, strict=True)):
            if size > 3 and size % 2 and pad >= size // 2 * spacing:
                axis = KernelAxis(size, _START)
                self._new(f"kernel/{name}.{d}", axis)
                self._tensor(name, module, "weight").taps.append(Taps(2 + d, axis))

    # --- in the layers ---

    def install(self) -> None:
        """Crop the layers from now on."""
        modules = dict(self.network.named_modules())
        for name, tensors in self.tensors.items():
            self._installed.append(CroppedLayer(modules[name], list(tensors.values())))
        for stack in self.stacks:
            for block in stack.blocks:
                inner = self._axes_within(block.name)
                self._installed.append(SkippedBlock(block.module, self.gates[block.name], block.in_tuple, inner))
        for installed in self._installed:
            installed.install()

    def _axes_within(self, block: str) -> list[Axis]:
        found: dict[int, Axis] = {}
        for name, tensors in self.tensors.items():
            if f"{name}.".startswith(f"{block}."):
                for tensor in tensors.values():
                    axes: list[Axis] = [cut.axis for cut in tensor.cuts]
                    axes += [taps.axis for taps in tensor.taps]
                    found.update({id(axis): axis for axis in axes})
        return list(found.values())

    def remove(self) -> None:
        """Crop no more; the layers are as they were, with the weights of now."""
        for installed in reversed(self._installed):
            installed.remove()
        self._installed = []

    def manage(self, managed: bool = True) -> None:
        """Update crops from the masks when :func:`refresh` is called, or immediately in layers with their own sizes."""
        learned = {id(axis) for axis in self.axes}
        for module in self.network.modules():
            for axis in module.axes if isinstance(module, ContinuousConv | FrequencyCrop) else ():
                assert isinstance(axis, Axis)
                axis.managed = managed
                axis.size.requires_grad_(not managed or id(axis) in learned)

    @property
    def installed(self) -> bool:
        """Whether the layers are cropped."""
        return bool(self._installed)

    def sizes(self) -> dict[str, int]:
        """Return the present crop of each size, by name."""
        return {name: axis.crop for name, axis in self.named.items()}

    def shares(self) -> dict[str, float]:
        """Return the present crop of each size relative to the largest, by name."""
        return {name: axis.crop / axis.crops[-1] for name, axis in self.named.items()}

    def missing(self) -> list[Dimension]:
        """Return the kinds of sizes that were requested by name but that the network does not have."""
        there = {axis.dimension for axis in self.axes}
        return [dimension for dimension in self.dims or () if dimension not in there]

    def of(self, dimension: Dimension) -> Iterator[Axis]:
        """Yield the sizes of a kind."""
        return (axis for axis in self.axes if axis.dimension == dimension)


def _without_own(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}own.")]:
        del state[key]


def _none_missing(module: nn.Module, incompatible: Any) -> None:
    own = {f".own.{name}" for name, _ in module.get_submodule("own").named_parameters()}
    for key in [key for key in incompatible.missing_keys if any(f".{key}".endswith(end) for end in own)]:
        incompatible.missing_keys.remove(key)


def frequency_axes(network: nn.Module) -> dict[str, FrequencyAxis]:
    """Return the resolutions of a network, by name."""
    return {
        f"{name}.{d}": axis
        for name, module in network.named_modules()
        if isinstance(module, FrequencyCrop)
        for d, axis in enumerate(module.frequency_axes)
    }
