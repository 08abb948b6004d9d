"""Evaluations of one step that perturb the outputs of its network's blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.autograd import forward_ad

from lightning_bpfree.core.block_hooks import block_hooks, leaving, scores_leaving
from lightning_bpfree.core.forward_ad import directional_derivative, failing_layer
from lightning_bpfree.core.params import Params, widen
from lightning_bpfree.training.network_in_blocks import NetworkInBlocks, cut_off, other_way

DUAL_COST = 3.0  # forward passes: W x, dW x and W dx


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

    A dual pass whose tangents end where a block ends, so that one pass serves all blocks.

    Args:
        parts: the blocks.
        direction: a tensor a parameter.
        groups: names of the parameters that are perturbed together.
        losses: gives the loss of block ``j`` at its output, a scalar.
        alone: whether every group needs its own pass, since several are in one block.
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

        with block_hooks(parts.blocks, enter=cut_off, leave=leave):
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
        MisconfigurationException: if the loss depends on the blocks other than through the network's output.
    """
    outputs: list[Tensor] = []

    def inject(j: int, z: Tensor) -> Tensor:
        plain: Tensor
        plain, tangent = forward_ad.unpack_dual(z)
        added = direction(j, plain)
        dual: Tensor = forward_ad.make_dual(plain, added if tangent is None else tangent + added)
        return dual

    def each(_: Params) -> Tensor:
        outputs.clear()
        loss = parts.step.loss({}, recorded=False, cost=DUAL_COST)
        if forward_ad.unpack_dual(loss).tangent is not None:
            raise other_way(parts)
        products: Tensor = (widen(output_gradient) * widen(outputs[0])).flatten(1)
        return products.sum(1)

    def end(y: Tensor) -> Tensor:
        outputs.append(y)
        plain: Tensor = forward_ad.unpack_dual(y).primal
        return plain  # so that a tangent of the loss shows a dependence that bypasses the output

    with leaving({j: parts.blocks[j].modules[-1] for j in injected}, inject), scores_leaving(parts.network, end):
        return _explained(parts, lambda: directional_derivative(each, {}, {})[1])
