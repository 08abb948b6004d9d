"""Fixed feedback instead of transposed weights: from the network's output to every block, or from layer to layer."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input
from torch.utils._pytree import tree_leaves

from lightning_bpfree.core.block_hooks import leaving, scores_leaving
from lightning_bpfree.core.blocks import Block, Cut
from lightning_bpfree.core.seeds import mix

Matrices = Callable[[str, tuple[int, ...]], Tensor]
Linear = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

_INPUT_GRADIENTS = {
    nn.Conv1d: conv1d_input,
    nn.Conv2d: conv2d_input,
    nn.Conv3d: conv3d_input,
}


class FixedMatrices:
    """Feedback matrices that stay the same throughout a fit, made when their shapes are known.

    A matrix is a function of the seed, its name and its shape alone: ranks agree, and a resumed fit makes it again. It
    is drawn as torch initializes the weight that it replaces: uniform within ``scale / sqrt(fan_in)``.

    Args:
        scale: factor on the matrices, > 0.
        given: returns the matrix for a name and shape instead; a tensor that shares a weight's memory changes with it.

    Examples:
        >>> FixedMatrices().get("0", (3, 2), fan_in=3, seed=7, like=torch.zeros(1)).shape
        torch.Size([3, 2])
    """

    def __init__(self, scale: float = 1.0, given: Matrices | None = None) -> None:
        self.scale, self.given = scale, given
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], *, fan_in: int, seed: int, like: Tensor) -> Tensor:
        """Return the matrix called ``name``, on the device of ``like``, in float32 or the wider type of ``like``.

        Raises:
            ValueError: if what was given has another shape.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (name, shape, seed, like.device, dtype)
        if key not in self._made:
            made = self._drawn(name, shape, fan_in, seed) if self.given is None else self.given(name, shape)
            if tuple(made.shape) != shape:
                raise ValueError(f"matrices({name!r}, {shape}) returned a tensor of shape {tuple(made.shape)}.")
            self._made[key] = made.detach().to(like.device, dtype)
        return self._made[key]

    def _drawn(self, name: str, shape: tuple[int, ...], fan_in: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix(seed, zlib.crc32(name.encode()), *shape))
        bound = self.scale / fan_in**0.5
        return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)

    def clear(self) -> None:
        """Forget all matrices."""
        self._made.clear()


class _Sent(torch.autograd.Function):
    """``output``, whose gradient also goes through ``send`` to ``targets``."""

    @staticmethod
    def forward(ctx: Any, send: Callable[[Tensor], Sequence[Tensor]], output: Tensor, *targets: Tensor) -> Tensor:  # noqa: ARG004  # autograd needs the targets as inputs
        ctx.send = send
        return output.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor | None, ...]:
        return (None, error, *ctx.send(error))


class _End(NamedTuple):
    """What has left a block: with its graph, and without it."""

    block: int
    value: Tensor
    cut: Tensor


class DirectFeedback:
    """Sends the error at the network's output to the end of every block, by one matrix each.

    Args:
        rule: name of the rule, for errors.
        network: the network.
        parts: its blocks; the graph is cut at the end of each.
        matrices: the feedback.
        seed: seed of the fit.
    """

    def __init__(self, rule: str, network: nn.Module, parts: Cut, matrices: FixedMatrices, seed: int) -> None:
        self.rule, self.network, self.blocks = rule, network, parts.blocks
        self.matrices, self.seed = matrices, seed
        self.calls = 0
        self._ends: list[_End] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Return the context in which the network's calls are wired for feedback."""
        ends = {j: block.modules[-1] for j, block in enumerate(self.blocks)}
        handles: list[Any] = [
            self.network.register_forward_pre_hook(self._refuse_others),
            self.network.register_forward_hook(lambda _module, _args, output: self._check(output)),
        ]
        try:
            with leaving(ends, self._end, others=torch.Tensor.detach), scores_leaving(self.network, self._output):
                yield
            if self.calls:
                self._refuse_others()
        finally:
            for handle in handles:
                handle.remove()

    def _refuse_others(self, *_: Any) -> None:
        if self._ends:
            raise MisconfigurationException(
                f"{self.rule}: block {self.blocks[self._ends[0].block].name} ran outside of a call of the network, and "
                "no error would reach it. Name the module whose call runs all blocks, network=...."
            )

    def _check(self, output: Any) -> None:
        found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if any(tensor.dim() == 0 and tensor.requires_grad for tensor in found) and len(found) > 1:
            raise MisconfigurationException(
                f"{self.rule}: the network, {type(self.network).__name__}, computes a loss itself, and feedback starts "
                "at what it returns. Leave the labels out of its call, and compute the loss in training_step: "
                "F.cross_entropy(self.net(...).logits, labels)."
            )
        if torch.is_grad_enabled() and (len(found) != 1 or found[0].dim() < 2):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in found)
            raise MisconfigurationException(
                f"{self.rule}: the network, {type(self.network).__name__}, returns {len(found)} tensors of numbers "
                f"({shapes or 'none'}); feedback needs the error at one tensor, of shape (B, ...). Name the submodule "
                "that returns it, network=...."
            )

    def _end(self, j: int, z: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return z
        if not z.requires_grad:
            if any(parameter.requires_grad for parameter in self.blocks[j].parameters):
                raise MisconfigurationException(
                    f"{self.rule}: block {self.blocks[j].name} ran without a graph, so nothing in it would learn. "
                    "Do not run it under torch.no_grad or in a checkpoint with use_reentrant=True; inside a block, "
                    "checkpoints with use_reentrant=False work."
                )
            return z
        self._ends.append(_End(j, z, z.detach()))
        return self._ends[-1].cut

    def _output(self, y: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return y
        self.calls += 1
        ends, self._ends = self._ends, []
        exact = [end.cut is y for end in ends]  # a block that makes the output itself
        signals = [self._signal(end, y, known) for end, known in zip(ends, exact, strict=True)]
        send = lambda error: [signal(error) for signal in signals]  # noqa: E731
        made: Tensor = _Sent.apply(send, y, *(end.value for end in ends))
        return made

    def _signal(self, end: _End, y: Tensor, exact: bool) -> Callable[[Tensor], Tensor]:
        z, block = end.value, self.blocks[end.block]
        if exact:
            return lambda error: error
        if z.shape[:1] != y.shape[:1]:
            raise MisconfigurationException(
                f"{self.rule}: block {block.name} gives {tuple(z.shape)} and the network {tuple(y.shape)}; the number "
                "of samples must come first in both (batch_first=True)."
            )
        positions = z.dim() == y.dim() == 3 and z.shape[1] == y.shape[1]  # one error for each position of a sequence
        start = 2 if positions else 1
        shape = (z.shape[start:].numel(), y.shape[start:].numel())
        matrix = self.matrices.get(block.name, shape, fan_in=shape[0], seed=self.seed, like=y)
        return partial(_projected, matrix, start, z.shape, z.dtype)


def _projected(matrix: Tensor, start: int, shape: torch.Size, dtype: torch.dtype, error: Tensor) -> Tensor:
    return (error.flatten(start).to(matrix.dtype) @ matrix.T).view(shape).to(dtype)


class LayerwiseFeedback:
    """Sends errors back through fixed matrices in place of the weights of each block's first layer.

    Args:
        rule: name of the rule, for errors.
        network: the network.
        parts: its blocks; outside of them, errors pass through fixed matrices layer by layer.
        matrices: the feedback.
        seed: seed of the fit.
    """

    def __init__(self, rule: str, network: nn.Module, parts: Cut, matrices: FixedMatrices, seed: int) -> None:
        self.rule, self.network, self.matrices, self.seed = rule, network, matrices, seed
        self.layers = crossings(rule, network, parts.blocks)
        self.calls = 0
        self._inputs: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Return the context in which the network's calls are wired for feedback."""
        handles: list[Any] = [self.network.register_forward_hook(self._count)]
        for name, layer in self.layers.items():
            handles.append(layer.register_forward_pre_hook(partial(self._enter, name)))
            handles.append(layer.register_forward_hook(partial(self._leave, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def _enter(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (torch.is_grad_enabled() and args and args[0].requires_grad):
            return None
        self._inputs[name] = args[0]
        return (args[0].detach(), *args[1:])

    def _leave(self, name: str, layer: Linear, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = self._inputs.pop(name, None)
        if x is None:
            return output
        weight = layer.weight
        matrix = self.matrices.get(
            name, tuple(weight.shape), fan_in=weight[0].numel(), seed=self.seed, like=output.detach()
        )
        send = partial(_input_gradient, layer, matrix, x.shape, x.dtype)
        made: Tensor = _Sent.apply(lambda error: [send(error)], output, x)
        return made


def _input_gradient(layer: Linear, weight: Tensor, shape: torch.Size, dtype: torch.dtype, error: Tensor) -> Tensor:
    """Return the error at the layer's input for an error at its output, through ``weight``."""
    error = error.to(weight.dtype)
    if isinstance(layer, nn.Linear):
        return (error @ weight).to(dtype)
    kind = next(kind for kind in _INPUT_GRADIENTS if isinstance(layer, kind))
    found: Tensor = _INPUT_GRADIENTS[kind](
        shape, weight, error, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    return found.to(dtype)


def crossings(rule: str, network: nn.Module, blocks: Sequence[Block]) -> Mapping[str, Linear]:
    """Return, by name, the layers through which errors pass to a block before: each block's first, and those of none.

    Raises:
        MisconfigurationException: if one of them is neither linear nor a convolution padded with zeros.
    """
    names = {id(module): name for name, module in network.named_modules()}
    in_blocks = {id(part) for block in blocks for top in block.modules for part in top.modules()}
    found = [layer for block in blocks if (layer := _first_layer(block)) is not None]
    found += [part for part in network.modules() if id(part) not in in_blocks and _is_layer(part)]
    for layer in found:
        zeros = not isinstance(layer, nn.modules.conv._ConvNd) or (
            layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        )
        if not (isinstance(layer, Linear) and zeros):
            raise MisconfigurationException(
                f"{rule}(feedback='layerwise'): errors would go back through {names[id(layer)]} "
                f"({type(layer).__name__}), which is possible for nn.Linear and for convolutions that pad with a "
                "number of zeros only. Begin another block with it (blocks=...), or use feedback='direct'."
            )
    return {names[id(layer)]: layer for layer in found}  # type: ignore[misc]  # checked above


def _is_layer(module: nn.Module) -> bool:
    weighted = any(p is not None and p.dim() > 1 for p in module._parameters.values())
    return weighted and not isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _first_layer(block: Block) -> nn.Module | None:
    return next((part for top in block.modules for part in top.modules() if _is_layer(part)), None)
