"""The cost of a network's layers as a function of its sizes; and an independent count of a whole network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_bpfree.core.arguments import checked
from lightning_bpfree.methods.learnable_architecture.architecture import Architecture
from lightning_bpfree.methods.learnable_architecture.continuous.convolution import (
    ContinuousConv,
    sampled_kernels,
)
from lightning_bpfree.methods.learnable_architecture.continuous.fourier import MATRIX_LIMIT
from lightning_bpfree.methods.learnable_architecture.continuous.striding import FrequencyCrop, FrequencyRestore
from lightning_bpfree.methods.learnable_architecture.sizes.axes import Axis, FrequencyAxis
from lightning_bpfree.methods.learnable_architecture.sizes.cost import Cost, Factor, Kept, Share, Smallest, Term
from lightning_bpfree.methods.learnable_architecture.tracing.layers import Layer
from lightning_bpfree.methods.learnable_architecture.tracing.probe import ExampleCall, quiet_evaluation


@checked
def count_macs(network: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Return the multiply-accumulates of one forward pass, as counted by PyTorch's own counter.

    Matrix products, convolutions and attention are counted. FFTs, norms, activations and the computation of continuous
    kernels, which exported networks skip, are not.

    Args:
        network: any module.
        *args: positional arguments of its forward pass.
        **kwargs: keyword arguments of its forward pass.

    Examples:
        >>> count_macs(nn.Linear(4, 3), torch.zeros(2, 4))
        24
    """
    with quiet_evaluation(network), sampled_kernels(network):
        network(*args, **kwargs)
        with FlopCounterMode(display=False) as counter:
            network(*args, **kwargs)
    return int(counter.get_total_flops()) // 2


class _Run(NamedTuple):
    """Shapes of one evaluation.

    Args:
        outputs: outputs of each layer, all its calls.
        inputs: inputs of each layer, all its calls.
    """

    outputs: dict[str, list[torch.Size]]
    inputs: dict[str, list[torch.Size]]


def _run(architecture: Architecture) -> _Run:
    outputs: dict[str, list[torch.Size]] = {}
    inputs: dict[str, list[torch.Size]] = {}
    handles = []
    for name, layer in architecture.layers.items():

        def note(_: nn.Module, args: tuple[Any, ...], out: Any, name: str = name) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                inputs.setdefault(name, []).append(args[0].shape)
                outputs.setdefault(name, []).append(out.shape)

        handles.append(layer.module.register_forward_hook(note))
    try:
        with quiet_evaluation(architecture.network):
            architecture.call(architecture.network)
    finally:
        for handle in handles:
            handle.remove()
    return _Run(outputs, inputs)


def _sides(layer: Layer, shape: Sequence[int]) -> list[int]:
    """Return the axes of a layer's output other than samples and channels."""
    return list(shape[2:]) if layer.axis == 1 else list(shape[1:-1])


class CostBuilder:
    """Makes the costs of a network as functions of its sizes; before the layers are cropped.

    Args:
        architecture: the sizes.

    Raises:
        ValueError: if the network cannot be computed at a lower resolution.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.run = _run(architecture)
        self._upstream: dict[tuple[str, int], list[Axis]] = {}
        self._entering: dict[tuple[str, int], list[Axis]] = {}
        self._find_resolutions()

    def _find_resolutions(self) -> None:
        """Note, for each layer and each axis of its output and input, the resolutions on which its length depends."""
        for name, axis in self.architecture.named.items():
            if not isinstance(axis, FrequencyAxis):
                continue
            before = axis.kept
            axis.set_kept(max(1, before // 2))
            try:
                run = _run(self.architecture)
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"LearnableArchitecture: {name} cannot be lower, for a layer behind it needs all positions "
                    f"({str(error).splitlines()[0]}). Average over positions before that layer, or leave 'resolution' "
                    "out of dims."
                ) from error
            finally:
                axis.set_kept(before)
            for found, old, new in (
                (self._upstream, self.run.outputs, run.outputs),
                (self._entering, self.run.inputs, run.inputs),
            ):
                for layer_name, shapes in new.items():
                    layer = self.architecture.layers[layer_name]
                    pairs = zip(_sides(layer, old[layer_name][0]), _sides(layer, shapes[0]), strict=True)
                    for d, (a, b) in enumerate(pairs):
                        if a != b:
                            found.setdefault((layer_name, d), []).append(axis)

    # --- shares ---

    def _share(self, layer: Layer, side: str) -> list[Factor]:
        """Return the share of the channels that a layer reads or makes."""
        parts: list[tuple[Axis, float]] = []
        for group in self.architecture.groups:
            axis = self.architecture.named[f"width/{group.name}"]
            if side == "in" and layer.name in group.places:
                total = layer.reads or self.run.inputs[layer.name][0][layer.axis]
                parts.append((axis, len(group.places[layer.name].base) * group.count / total))
            elif side == "out" and layer.name in group.makers:
                parts.append((axis, 1.0))
        return [Share(1 - sum(weight for _, weight in parts), tuple(parts))] if parts else []

    def _blocks(self, name: str) -> list[Factor]:
        gates = self.architecture.gates
        return [Kept(gate.axis, gate.number) for block, gate in gates.items() if f"{name}.".startswith(f"{block}.")]

    def _samples(self, name: str) -> list[Factor]:
        layer = self.architecture.layers[name]
        sides = _sides(layer, self.run.outputs[name][0])
        return [Smallest(tuple(axes)) for d in range(len(sides)) if (axes := self._upstream.get((name, d)))]

    def _taps(self, layer: Layer) -> list[Factor]:
        module = layer.module
        if isinstance(module, ContinuousConv):
            return [Share(0.0, ((axis, 1.0),)) for axis in module.kernel_axes]
        tensors = self.architecture.tensors.get(layer.name, {}).values()
        return [Share(0.0, ((taps.axis, 1.0),)) for tensor in tensors for taps in tensor.taps]

    # --- multiply-accumulates ---

    def macs(self) -> Cost:
        """Return the multiply-accumulates of one sample."""
        terms: list[Term] = []
        for name, layer in self.architecture.layers.items():
            if name not in self.run.outputs:
                continue
            if isinstance(layer.module, FrequencyCrop):
                terms += self._of_frequency_crop(name, layer.module)
                continue
            if isinstance(layer.module, FrequencyRestore):
                terms += self._of_restore(name, layer.module)
                continue
            full = self._full(layer)
            if full:
                factors = [*self._share(layer, "in"), *self._taps(layer), *self._samples(name), *self._blocks(name)]
                factors += self._share(layer, "out") if layer.role == "mixes" else []
                terms.append(Term(full, tuple(factors)))
        cost = Cost(terms)
        return Cost([*terms, *self._elsewhere(cost)])

    def _full(self, layer: Layer) -> float:
        module: Any = layer.module
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            per = math.prod(module.kernel_size) * module.in_channels // module.groups
        elif isinstance(module, ContinuousConv):
            per = math.prod(axis.count for axis in module.kernel_axes)
        elif isinstance(module, nn.Linear):
            per = module.in_features
        else:
            return 0.0
        return float(per * sum(shape.numel() for shape in self.run.outputs[layer.name]))

    def _of_frequency_crop(self, name: str, module: FrequencyCrop) -> list[Term]:
        terms = []
        axes = module.frequency_axes
        shape = list(self.run.inputs[name][0])
        for d, axis in enumerate(axes):
            if axis.samples > MATRIX_LIMIT:
                continue
            factors: list[Factor] = [*self._share(self.architecture.layers[name], "in")]
            behind = self._upstream.get((name, d), [])
            before = [a for a in behind if a is not axis]
            factors += [Smallest(tuple(a)) for a in (behind, before) if a]
            for other in range(len(axes)):
                if other != d:
                    lengths = self._upstream.get((name, other), [])
                    left = lengths if other < d else [a for a in lengths if a is not axes[other]]
                    factors += [Smallest(tuple(left))] if left else []
            terms.append(Term(float(math.prod(shape) * axis.samples), tuple(factors)))
        return terms

    def _of_restore(self, name: str, module: FrequencyRestore) -> list[Term]:
        terms = []
        shape = list(self.run.outputs[name][0])
        for d, side in enumerate(module.sides):
            if side <= MATRIX_LIMIT:
                factors = self._share(self.architecture.layers[name], "in")
                for behind in range(d, len(module.sides)):
                    axes = self._entering.get((name, behind), [])
                    factors += [Smallest(tuple(axes))] if axes else []
                terms.append(Term(float(math.prod(shape) * side), tuple(factors)))
        return terms

    def _elsewhere(self, cost: Cost) -> list[Term]:
        """Return what is computed outside of layers, such as attention: by heads, by blocks, and what always is."""
        architecture = self.architecture
        rest = self._counted() - cost.number()
        terms: list[Term] = []
        if rest < 0.5:
            return terms
        architecture.install()
        try:
            for group in architecture.groups:
                axis = architecture.named[f"width/{group.name}"]
                if group.are_heads:
                    axis.set_kept(1)
                    fewer = self._counted() - cost.number()
                    axis.set_kept(axis.count)
                    of_heads = (rest - fewer) * axis.count / (axis.count - 1)
                    if of_heads > 0.5:
                        gates = self._blocks(group.makers[0]) if group.makers else []
                        terms.append(Term(of_heads, (Share(0.0, ((axis, 1.0),)), *gates)))
            for axis in architecture.of("depth"):
                for kept in range(axis.count - 1, axis.crops[0] - 1, -1):
                    before = self._counted() - Cost([*cost.terms, *terms]).number()
                    axis.set_kept(kept)
                    of_block = before - (self._counted() - Cost([*cost.terms, *terms]).number())
                    axis.set_kept(kept + 1)
                    if of_block > 0.5:
                        terms.append(Term(of_block, (Kept(axis, kept),)))
                    axis.set_kept(kept)
                axis.set_kept(axis.count)
        finally:
            architecture.remove()
            architecture.manage()
        left = rest - sum(term.full for term in terms)
        return [*terms, Term(left, ())] if left > 0.5 else terms

    def _counted(self) -> float:
        call: ExampleCall = self.architecture.call
        return float(count_macs(self.architecture.network, *call.args, **call.kwargs))

    # --- parameters ---

    def params(self) -> Cost:
        """Return the number of parameters that are left."""
        terms: list[Term] = []
        counted: set[int] = set()
        for name, layer in self.architecture.layers.items():
            if isinstance(layer.module, ContinuousConv):
                bias = layer.module.bias
                shares = [*self._share(layer, "in"), *self._blocks(name)]
                full = layer.makes * math.prod(axis.count for axis in layer.module.kernel_axes)
                terms.append(Term(float(full), (*shares, *self._taps(layer))))
                terms += [] if bias is None else [Term(float(layer.makes), tuple(shares))]
                counted |= {id(p) for p in layer.module.parameters()}
            elif isinstance(layer.module, FrequencyCrop):
                counted |= {id(p) for p in layer.module.parameters()}
        for layer_name, tensors in self.architecture.tensors.items():
            for tensor in tensors.values():
                if tensor.is_buffer or id(tensor.get()) in counted:
                    continue
                counted.add(id(tensor.get()))
                factors = self._of_tensor(tensor.cuts, tensor.get().shape)
                factors += [Share(0.0, ((taps.axis, 1.0),)) for taps in tensor.taps]
                terms.append(Term(float(tensor.get().numel()), (*factors, *self._blocks(layer_name))))
        for name, parameter in self.architecture.network.named_parameters():
            if id(parameter) not in counted and "learnable_architecture" not in name:
                terms.append(Term(float(parameter.numel()), tuple(self._blocks(name))))
        return Cost(terms)

    def _of_tensor(self, cuts: Sequence[Any], shape: Sequence[int]) -> list[Factor]:
        by_dim: Mapping[int, list[tuple[Axis, float]]] = {cut.dim: [] for cut in cuts}
        for cut in cuts:
            by_dim[cut.dim].append((cut.axis, len(cut.layout.base) * cut.axis.count / shape[cut.dim]))
        return [Share(1 - sum(w for _, w in parts), tuple(parts)) for parts in by_dim.values()]
