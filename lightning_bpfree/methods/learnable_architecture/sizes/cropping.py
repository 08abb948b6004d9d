"""Cropped layers: during a forward pass, cropped and masked tensors replace the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_bpfree.core.forward_override import ForwardOverride
from lightning_bpfree.methods.learnable_architecture.sizes.axes import Axis, KernelAxis, UnitAxis
from lightning_bpfree.methods.learnable_architecture.tracing.groups import Layout


class Cut(NamedTuple):
    """Units of one axis of a tensor.

    Args:
        dim: the axis.
        axis: their learnable number.
        layout: where they lie.
        masked: whether they are read here, and multiplied by the mask.
    """

    dim: int
    axis: UnitAxis
    layout: Layout
    masked: bool


class Gate(NamedTuple):
    """The mask of a residual block.

    Args:
        axis: the learnable number of blocks.
        number: number of the block, from 0.
    """

    axis: UnitAxis
    number: int


class Taps(NamedTuple):
    """Taps of one axis of a kernel.

    Args:
        dim: the axis of the weight.
        axis: their learnable number.
    """

    dim: int
    axis: KernelAxis


class CroppedTensor:
    """One parameter or buffer of a layer, and how it is cropped.

    Args:
        owner: the module that holds it.
        name: name of the tensor.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name = owner, name
        self.cuts: list[Cut] = []
        self.gates: list[Gate] = []
        self.taps: list[Taps] = []
        self._entries: dict[tuple[Any, ...], Tensor] = {}

    @property
    def is_buffer(self) -> bool:
        """Whether it is a buffer, which the layer may write to."""
        return self.name in self.owner._buffers

    @property
    def _home(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self.owner._buffers if self.is_buffer else self.owner._parameters)

    def get(self) -> Tensor:
        """Return the tensor that the layer holds now."""
        return cast("Tensor", self._home[self.name])

    def put(self, tensor: Tensor) -> None:
        """Replace the tensor in the layer."""
        self._home[self.name] = tensor

    def cropped(self, tensor: Tensor) -> Tensor:
        """Return the tensor cropped to its current size and multiplied by masks; differentiable."""
        dims = dict.fromkeys(cut.dim for cut in self.cuts)
        masks = []
        for dim in dims:
            cuts = [cut for cut in self.cuts if cut.dim == dim]
            tensor, mask = self._cut(tensor, dim, cuts)
            if mask is not None:
                masks.append((dim, mask))
        for dim, kernel in self.taps:
            window = kernel.window()
            tensor = tensor.narrow(dim, window.start, window.stop - window.start)
            masks.append((dim, kernel.values()))
        for dim, mask in masks:
            tensor = tensor * mask.to(tensor.dtype).view([-1 if d == dim else 1 for d in range(tensor.dim())])
        for axis, number in self.gates:
            tensor = tensor * axis.mask()[number].to(tensor.dtype)
        return tensor

    def _cut(self, tensor: Tensor, dim: int, cuts: Sequence[Cut]) -> tuple[Tensor, Tensor | None]:
        size, masked = tensor.shape[dim], cuts[0].masked
        if len(cuts) == 1 and cuts[0].layout.is_prefix and len(cuts[0].layout.base) * cuts[0].axis.count == size:
            kept, width = cuts[0].axis.kept, len(cuts[0].layout.base)
            values = cuts[0].axis.values() if masked else None
            if values is not None and width > 1:
                values = values.repeat_interleave(width)
            return tensor.narrow(dim, 0, kept * width), values
        entries, units = self._indices(size, cuts, tensor.device)
        values = None
        if masked:
            ones = torch.ones(1, dtype=cuts[0].axis.positions.dtype, device=tensor.device)
            values = torch.cat([ones, *(cut.axis.values() for cut in cuts)]).index_select(0, units)
        return tensor.index_select(dim, entries), values

    def _indices(self, size: int, cuts: Sequence[Cut], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return which entries are kept, and for each its place among ``[1, units of the first cut, ...]``."""
        key = (size, str(device), *(cut.axis.kept for cut in cuts), cuts[0].dim)
        if key not in self._entries:
            unit = dict.fromkeys(range(size), 0)
            start = 1
            for cut in cuts:
                for entry in cut.layout.of(range(cut.axis.count)):
                    del unit[entry]
                unit.update({entry: start + u for entry, u in cut.layout.ordered(cut.axis.kept)})
                start += cut.axis.kept
            listed = sorted(unit.items())
            self._entries = {key: torch.tensor(listed, dtype=torch.long, device=device).view(-1, 2)}
        found = self._entries[key]
        return found[:, 0], found[:, 1]


class CroppedLayer:
    """Hooks of a layer that crop its tensors for the time of its forward pass.

    Args:
        layer: the layer.
        tensors: the cropped tensors, and how they are cropped.
    """

    def __init__(self, layer: nn.Module, tensors: Sequence[CroppedTensor]) -> None:
        self.layer, self.tensors = layer, list(tensors)
        self._before: list[tuple[Tensor, Tensor]] = []
        self._attributes: dict[str, Any] = {}
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes along: a copied module has its hooks already."""
        return {**self.__dict__, "_before": [], "_attributes": {}, "_handles": []}

    def install(self) -> None:
        """Crop from now on."""
        self._handles = [
            self.layer.register_forward_pre_hook(self.enter),
            self.layer.register_forward_hook(self.leave, always_call=True),
        ]

    def remove(self) -> None:
        """Crop no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def enter(self, module: nn.Module, args: Any) -> None:
        """Replace the layer's tensors by cropped ones."""
        self._before = []
        for tensor in self.tensors:
            whole = tensor.get()
            part = tensor.cropped(whole)
            self._before.append((whole, part))
            tensor.put(part)
        self._attributes = set_sizes(module, [t for t in self.tensors if t.taps])

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """Restore the layer's own tensors."""
        for tensor, (whole, part) in zip(self.tensors, self._before, strict=False):
            tensor.put(whole)
            if tensor.is_buffer and part.data_ptr() != whole.data_ptr():  # a copy, which the layer has written to
                entries, _ = tensor._indices(whole.shape[0], tensor.cuts, whole.device)
                whole.index_copy_(0, entries, part)
        for name, value in self._attributes.items():
            setattr(module, name, value)
        self._before, self._attributes = [], {}


def set_sizes(module: Any, tapped: Sequence[CroppedTensor] = ()) -> dict[str, Any]:
    """Let a layer's attributes follow the tensors that it holds, and return what they were.

    Args:
        module: the layer.
        tapped: tensors of it whose kernel is cropped.
    """
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        new = _sizes_of_convolution(module, cast("Tensor", weight), tapped)
    elif weight is None:
        mean = module._buffers.get("running_mean")
        new = {"num_features": mean.shape[0]} if mean is not None else {}
    else:
        new = _sizes_of_others(module, weight)
    before = {name: getattr(module, name) for name in new}
    for name, value in new.items():
        setattr(module, name, value)
    return before


def _sizes_of_convolution(module: Any, weight: Tensor, tapped: Sequence[CroppedTensor]) -> dict[str, Any]:
    depthwise = module.groups > 1
    new: dict[str, Any] = {"out_channels": weight.shape[0], "in_channels": weight.shape[0 if depthwise else 1]}
    if depthwise:
        new["groups"] = weight.shape[0]
    for tensor in tapped:
        padding, size = list(module.padding), list(module.kernel_size)
        for dim, axis in tensor.taps:
            padding[dim - 2] -= (axis.count - axis.kept) // 2 * module.dilation[dim - 2]
            size[dim - 2] = axis.kept
        new |= {"padding": tuple(padding), "kernel_size": tuple(size)}
    return new


def _sizes_of_others(module: Any, weight: Tensor) -> dict[str, Any]:
    if isinstance(module, nn.Linear):
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": weight.shape[1]}
    if isinstance(module, nn.LayerNorm):
        return {"normalized_shape": (weight.shape[0],)}
    if isinstance(module, nn.GroupNorm):
        per_group = module.num_channels // module.num_groups
        return {"num_channels": weight.shape[0], "num_groups": weight.shape[0] // per_group}
    return {"num_features": weight.shape[0]} if hasattr(module, "num_features") else {}


class SkippedBlock(ForwardOverride):
    """Stands in for a residual block: the identity where the block's mask is below its threshold.

    Args:
        module: the block.
        gate: its mask.
        in_tuple: whether the block returns a tuple.
        inner: the sizes of its layers, which have no effect where it is left out.
    """

    def __init__(self, module: nn.Module, gate: Gate, in_tuple: bool, inner: Sequence[Axis] = ()) -> None:
        super().__init__(module)
        self.gate, self.in_tuple, self.inner = gate, in_tuple, [gate.axis, *inner]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output, or its input where it is left out."""
        if self.gate.number < self.gate.axis.kept:
            return self.original(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized():
            # DistributedDataParallel waits for the gradient of every parameter.
            sizes = [axis.size for axis in self.inner]
            x = cast("Tensor", _WithUnused.apply(x, *sizes, *self.module.parameters()))
        return (x,) if self.in_tuple else x


class _WithUnused(torch.autograd.Function):
    """The identity, in whose graph further parameters stand with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *unused: Tensor) -> Tensor:
        ctx.unused = unused
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad, *(torch.zeros_like(p) if p.requires_grad else None for p in ctx.unused))
