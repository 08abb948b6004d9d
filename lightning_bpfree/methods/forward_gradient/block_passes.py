"""Evaluations of one step that look into the blocks of its network, or perturb what they compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_bpfree.core.block_hooks import Look, block_hooks
from lightning_bpfree.core.blocks import Block
from lightning_bpfree.core.forward_ad import NoForwardDerivativeError, directional_derivative, failing_layer
from lightning_bpfree.core.params import Params, Slot, widen
from lightning_bpfree.core.step import Step
from lightning_bpfree.methods.forward_gradient.block_hooks import leaving, nothing_lost

DUAL_COST = 3.0  # forward passes: W x, dW x and W dx
LOCAL_BACKWARD = 2.0  # two matrix products a layer, inside each block


class NetworkInBlocks(NamedTuple):
    """The network of a step in blocks, and what is trained where.

    Args:
        step: the step.
        network: the network that is cut.
        blocks: its blocks.
        slots: of each block, those that the rule trains.
        rest: all others that the rule trains; they get their exact gradient.
        inspect: whether to look for parameters that would lose their gradient, which takes a walk through the graph.
    """

    step: Step
    network: nn.Module
    blocks: list[Block]
    slots: list[list[Slot]]
    rest: list[Slot]
    inspect: bool

    @classmethod
    def of(cls, step: Step, network: nn.Module, blocks: list[Block], inspect: bool = True) -> NetworkInBlocks:
        """Sort the trained parameters of a step by blocks."""
        home = {id(parameter): j for j, block in enumerate(blocks) for parameter in block.parameters}
        slots: list[list[Slot]] = [[] for _ in blocks]
        rest: list[Slot] = []
        for slot in step.trained:
            where = home.get(id(slot.parameter))
            (rest if where is None else slots[where]).append(slot)
        return cls(step, network, blocks, slots, rest, inspect)

    @property
    def active(self) -> list[int]:
        """The blocks in which something is trained."""
        return [j for j, slots in enumerate(self.slots) if slots]

    @property
    def detached(self) -> Params:
        """The trained parameters of all blocks, detached."""
        return {slot.name: slot.parameter.detach() for slots in self.slots for slot in slots}


def _cut_off(_: int, x: Tensor) -> Tensor:
    return x.detach()  # which ends tangents too


class Outside(NamedTuple):
    """What the recorded evaluation gives beside what is seen in the blocks.

    Args:
        gradients: exact gradients of the parameters of no block.
        output: gradient of the loss for the network's output; None if it was not asked for.
    """

    gradients: Params
    output: Tensor | None


def recorded(parts: NetworkInBlocks, leave: Look, *, graph: bool, output: bool = False, cost: float = 1.0) -> Outside:
    """Run the recorded evaluation with every block cut from the others, and differentiate what lies behind them.

    Args:
        parts: the blocks.
        leave: called with what leaves block ``j``; gives what goes on, without a graph.
        graph: whether what leaves a block has a graph to the block's parameters.
        output: whether the gradient for the network's output is wanted.
        cost: in forward passes.

    Raises:
        MisconfigurationException: if a trained parameter of no block has an effect on a block, if a block does not run,
            or if the network's output is asked for and not seen.
        NoForwardDerivativeError: if the loss is cut from the network's output.
    """
    step, outputs = parts.step, []

    def keep(_: int, out: Tensor) -> Tensor:
        outputs.append(out if out.requires_grad or not output else out.detach().requires_grad_())
        return outputs[-1]

    with contextlib.ExitStack() as stack:
        if parts.inspect:
            trained = {id(slot.parameter): slot.name for slot in parts.rest}
            stack.enter_context(nothing_lost(parts.blocks, trained))
        ran = stack.enter_context(block_hooks(parts.blocks, enter=_cut_off, leave=leave))
        stack.enter_context(leaving({0: parts.network}, keep))
        loss = step.loss(None if graph else parts.detached, recorded=True, cost=cost)
    missing = [block.name for j, block in enumerate(parts.blocks) if j not in ran]
    if missing or (output and len(outputs) != 1):
        raise MisconfigurationException(
            f"ForwardGradient: the training step does not run {', '.join(missing)}; cut the network into parts that "
            "run once a step."
            if missing
            else f"ForwardGradient: the training step calls the network, {type(parts.network).__name__}, "
            f"{len(outputs)} times, and space='activations' needs the output of one call. Name the right module by "
            "network=..., or use space='weights'."
        )
    if any(out.requires_grad for out in outputs) and not loss.requires_grad:
        raise NoForwardDerivativeError(
            "No gradient comes from the loss to the network's output: the training step cuts it (argmax, accuracy, "
            "NumPy, .item(), detach or no_grad). ZerothOrder() needs no derivative."
        )
    sources: list[Tensor] = [*outputs[:output], *(slot.parameter for slot in parts.rest)]
    found: Sequence[Tensor | None] = [None] * len(sources)
    if loss.requires_grad and sources:
        found = torch.autograd.grad(loss, sources, allow_unused=True)
    if output and found[0] is None:
        raise _other_way(parts)
    made = [torch.zeros_like(source) if grad is None else grad for source, grad in zip(sources, found, strict=True)]
    rest = {slot.name: grad for slot, grad in zip(parts.rest, made[output:], strict=True)}
    return Outside(rest, made[0] if output else None)


def slopes(parts: NetworkInBlocks, direction: Params, groups: Sequence[Sequence[str]]) -> Tensor:
    """Return the derivatives of the loss along the parts of ``direction`` that ``groups`` name, shape ``(G,)``."""
    found = []
    for names in groups:
        along = {name: direction[name] for name in names if name in direction}
        found.append(_slope(parts, along, parts.step.loss) if along else torch.zeros(()))
    return _stacked(found)


def local_slopes(
    parts: NetworkInBlocks,
    direction: Params,
    groups: Sequence[Sequence[str]],
    losses: Callable[[int, Tensor], Tensor],
    alone: bool,
) -> Tensor:
    """Return the derivatives of every block's own loss along ``direction``, shape ``(G,)``.

    A dual pass whose tangents end where a block ends, so that one pass does for all blocks.

    Args:
        parts: the blocks.
        direction: a tensor a parameter.
        groups: names of the parameters that are perturbed together.
        losses: gives the loss of block ``j`` at its output, a scalar.
        alone: whether every group needs a pass of its own, since several lie in one block.
    """
    home = {slot.name: j for j, slots in enumerate(parts.slots) for slot in slots}

    def along(names: Sequence[str]) -> dict[int, Tensor]:
        moved = {name: direction[name] for name in names if name in direction}
        touched, total = {home[name] for name in moved}, list[Tensor]()
        found: dict[int, Tensor | None] = {}

        def leave(j: int, z: Tensor) -> Tensor:
            if j in touched:
                total.append(losses(j, z))
                found[j] = forward_ad.unpack_dual(total[-1]).tangent
            plain: Tensor = forward_ad.unpack_dual(z).primal
            return plain

        def summed(duals: Params, *, recorded: bool, cost: float) -> Tensor:
            total.clear()
            parts.step.loss(duals, recorded=recorded, cost=cost)
            return torch.stack(total).sum()

        with block_hooks(parts.blocks, enter=_cut_off, leave=leave):
            if moved:
                _slope(parts, moved, summed)
        return {j: torch.zeros(()) if tangent is None else tangent.detach() for j, tangent in found.items()}

    def of(names: Sequence[str], found: Mapping[int, Tensor]) -> Tensor:
        values = [found[j] for j in sorted({home[name] for name in names}) if j in found]
        return torch.stack(values).sum() if values else torch.zeros(())

    if alone:
        return _stacked([of(names, along(names)) for names in groups])
    found = along([name for names in groups for name in names])
    return _stacked([of(names, found) for names in groups])


def _stacked(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([widen(value).to(values[-1].device) for value in values]) if values else torch.zeros(0)


def _slope(parts: NetworkInBlocks, direction: Params, loss_fn: Callable[..., Tensor]) -> Tensor:
    at = {name: tensor for name, tensor in parts.detached.items() if name in direction}

    def evaluate() -> Tensor:
        return directional_derivative(partial(loss_fn, recorded=False, cost=DUAL_COST), at, direction)[1]

    return _explained(parts, evaluate)


def _explained(parts: NetworkInBlocks, evaluate: Callable[[], Tensor]) -> Tensor:
    try:
        return evaluate()
    except NotImplementedError as error:
        _, layer = failing_layer(parts.step.module, evaluate)
        raise MisconfigurationException(
            f"ForwardGradient: {layer or 'the loss'} has no forward-mode derivative in torch ({error}). Replace it, "
            "use target='local', which needs none, or ZerothOrder()."
        ) from error


def sample_slopes(
    parts: NetworkInBlocks, output_gradient: Tensor, injected: Sequence[int], direction: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Return every sample's derivative of the loss along a direction at the outputs of blocks, shape ``(B,)``.

    One dual pass: ``c_n = <dL/dy_n, tangent of y_n>`` with ``y`` the network's output. It equals ``<dL/dz_n, q_n>`` if
    no layer behind the block lets one sample see another. The loss may: ``dL/dy`` is that of the whole batch.

    Args:
        parts: the blocks.
        output_gradient: of the loss for the network's output, shape ``(B, ...)``.
        injected: the blocks that are perturbed, all at once.
        direction: of block ``j``, shaped as its output.

    Raises:
        MisconfigurationException: if the loss depends on the blocks by another way than the network's output.
    """
    outputs: list[Tensor] = []

    def inject(j: int, z: Tensor) -> Tensor:
        plain: Tensor
        plain, tangent = forward_ad.unpack_dual(z)
        if j == len(parts.blocks):
            outputs.append(z)
            return plain  # so that a tangent of the loss tells of another way to it
        added = direction(j, plain)
        dual: Tensor = forward_ad.make_dual(plain, added if tangent is None else tangent + added)
        return dual

    def each(_: Params) -> Tensor:
        outputs.clear()
        loss = parts.step.loss({}, recorded=False, cost=DUAL_COST)
        if forward_ad.unpack_dual(loss).tangent is not None:
            raise _other_way(parts)
        products: Tensor = (widen(output_gradient) * widen(outputs[0])).flatten(1)
        return products.sum(1)

    modules = {j: parts.blocks[j].modules[-1] for j in injected} | {len(parts.blocks): parts.network}
    with leaving(modules, inject):
        return _explained(parts, lambda: directional_derivative(each, {}, {})[1])


def _other_way(parts: NetworkInBlocks) -> MisconfigurationException:
    return MisconfigurationException(
        "ForwardGradient: space='activations' measures every sample's slope at the output of the network, "
        f"{type(parts.network).__name__}, but the loss depends on its blocks by another way too. Use space='weights', "
        "or name the module whose output is all that the loss sees by network=...."
    )


def backward_in_blocks(parts: NetworkInBlocks, signal: Callable[[int, Tensor], Tensor]) -> Params:
    """Return the gradients that ``signal(j, z)``, put in at block outputs, gives the blocks' parameters."""
    made: Params = {}

    def leave(j: int, z: Tensor) -> Tensor:
        if parts.slots[j]:
            made.update(pulled_back(parts.slots[j], z, signal(j, z.detach())))
        return z.detach()

    with block_hooks(parts.blocks, enter=_cut_off, leave=leave):
        parts.step.loss(recorded=False, cost=1 + LOCAL_BACKWARD)
    return made


def pulled_back(slots: Sequence[Slot], z: Tensor, signal: Tensor) -> Params:
    """Return what ``signal``, a gradient for a block's output ``z``, is for the block's parameters."""
    sources = [slot.parameter for slot in slots]
    found: Sequence[Tensor | None] = [None] * len(sources)
    if z.requires_grad:
        found = torch.autograd.grad(z, sources, signal.to(z.dtype), allow_unused=True)
    return {
        slot.name: torch.zeros_like(slot.parameter) if grad is None else grad
        for slot, grad in zip(slots, found, strict=True)
    }
