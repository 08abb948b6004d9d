"""One evaluation of a step with its network cut into blocks: local gradients, and exact ones after the blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_bpfree.core.autograd_graph import reached
from lightning_bpfree.core.block_hooks import Look, block_hooks, scores_leaving
from lightning_bpfree.core.blocks import Block
from lightning_bpfree.core.params import Params, Slot
from lightning_bpfree.core.step import Step

LOCAL_BACKWARD = 2.0  # two matrix products a layer, inside each block


@contextlib.contextmanager
def nothing_lost(rule: str, blocks: Sequence[Block], trained: Mapping[int, str]) -> Iterator[None]:
    """Refuse a cut that ends the graph of a trained parameter outside of all blocks.

    Args:
        rule: name of the rule, for the error.
        blocks: blocks whose inputs and outputs are cut. Enter this context before the cut is made.
        trained: names of the trained parameters outside of all blocks, by their ids.

    Raises:
        MisconfigurationException: from within the forward pass; it names the parameters and a fix.
    """

    def look(block: Block, values: object) -> None:
        tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.requires_grad]
        lost = sorted({trained[id(leaf)] for tensor in tensors for leaf in reached(tensor) if id(leaf) in trained})
        if lost:
            raise MisconfigurationException(
                f"{rule}: {', '.join(lost)} runs before the end of block {block.name} but belongs to no "
                "block, and would get no gradient. Put it into a block, the first one if it runs before all of them "
                "(blocks=[['first', 'second'], 'third']: patterns of modules, or of single parameters), or leave it "
                "out by params=...."
            )

    def before(block: Block, module: nn.Module, args: object, kwargs: object) -> None:  # noqa: ARG001  # a hook's signature
        look(block, (args, kwargs))

    def after(block: Block, module: nn.Module, args: object, output: object) -> None:  # noqa: ARG001  # a hook's signature
        look(block, output)

    handles = []
    try:
        for block in blocks:
            handles.append(block.modules[0].register_forward_pre_hook(partial(before, block), with_kwargs=True))
            handles.append(block.modules[-1].register_forward_hook(partial(after, block)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class NetworkInBlocks(NamedTuple):
    """The network of a step in blocks, with the trained parameters of each.

    Args:
        rule: name of the rule, for errors.
        step: the step.
        network: the network that is cut.
        blocks: its blocks.
        slots: for each block, the slots that the rule trains.
        rest: all other slots that the rule trains; they get their exact gradient.
        inspect: whether to search the graph for parameters that would lose their gradient.
    """

    rule: str
    step: Step
    network: nn.Module
    blocks: list[Block]
    slots: list[list[Slot]]
    rest: list[Slot]
    inspect: bool

    @classmethod
    def of(
        cls, rule: str, step: Step, network: nn.Module, blocks: list[Block], inspect: bool = True
    ) -> NetworkInBlocks:
        """Assign the trained parameters of a step to blocks."""
        home = {id(parameter): j for j, block in enumerate(blocks) for parameter in block.parameters}
        slots: list[list[Slot]] = [[] for _ in blocks]
        rest: list[Slot] = []
        for slot in step.trained:
            where = home.get(id(slot.parameter))
            (rest if where is None else slots[where]).append(slot)
        return cls(rule, step, network, blocks, slots, rest, inspect)

    @property
    def active(self) -> list[int]:
        """The blocks that have trained parameters."""
        return [j for j, slots in enumerate(self.slots) if slots]

    @property
    def detached(self) -> Params:
        """The trained parameters of all blocks, detached."""
        return {slot.name: slot.parameter.detach() for slots in self.slots for slot in slots}


def cut_off(_: int, x: Tensor) -> Tensor:
    """Return ``x`` without its graph and its tangent; the index is not used."""
    return x.detach()


class Outside(NamedTuple):
    """Results of the recorded evaluation outside of the blocks.

    Args:
        gradients: exact gradients of the parameters outside of all blocks.
        output: gradient of the loss with respect to the network's output; None if not requested.
    """

    gradients: Params
    output: Tensor | None


def recorded(parts: NetworkInBlocks, leave: Look, *, graph: bool, output: bool = False, cost: float = 1.0) -> Outside:
    """Run the recorded evaluation with every block cut from the others, and differentiate the layers after them.

    Args:
        parts: the blocks.
        leave: called with the output of block ``j``; returns its replacement, without a graph.
        graph: whether a block's output has a graph to the block's parameters.
        output: whether to compute the gradient with respect to the network's output.
        cost: the cost in forward passes.

    Raises:
        MisconfigurationException: if a trained parameter outside of all blocks affects a block, if a block does not
            run, or if ``output`` is set and the network's output is not found or the loss does not depend on it.
    """
    step, outputs = parts.step, []
    if graph:
        leave = partial(_with_a_graph, parts, leave)

    def keep(out: Tensor) -> Tensor:
        outputs.append(out if out.requires_grad or not output else out.detach().requires_grad_())
        return outputs[-1]

    with contextlib.ExitStack() as stack:
        if parts.inspect:
            trained = {id(slot.parameter): slot.name for slot in parts.rest}
            stack.enter_context(nothing_lost(parts.rule, parts.blocks, trained))
        ran = stack.enter_context(block_hooks(parts.blocks, enter=cut_off, leave=leave))
        stack.enter_context(scores_leaving(parts.network, keep))
        loss = step.loss(None if graph else parts.detached, recorded=True, cost=cost)
    missing = [block.name for j, block in enumerate(parts.blocks) if j not in ran]
    if missing or (output and len(outputs) != 1):
        raise MisconfigurationException(
            f"{parts.rule}: the training step does not run {', '.join(missing)}; cut the network into parts that "
            "run once a step."
            if missing
            else f"{parts.rule}: the training step calls the network, {type(parts.network).__name__}, {len(outputs)} "
            "times, and the derivative of the loss is needed for the output of one call. Name the right module by "
            "network=...."
        )
    if any(out.requires_grad for out in outputs) and not loss.requires_grad:
        raise MisconfigurationException(
            f"{parts.rule}: no gradient comes from the loss to the network's output: the training step cuts it "
            "(argmax, accuracy, NumPy, .item(), detach or no_grad). ZerothOrder() needs no derivative."
        )
    sources: list[Tensor] = [*outputs[:output], *(slot.parameter for slot in parts.rest)]
    found: Sequence[Tensor | None] = [None] * len(sources)
    if loss.requires_grad and sources:
        found = torch.autograd.grad(loss, sources, allow_unused=True)
    if output and found[0] is None:
        raise other_way(parts)
    made = [torch.zeros_like(source) if grad is None else grad for source, grad in zip(sources, found, strict=True)]
    rest = {slot.name: grad for slot, grad in zip(parts.rest, made[output:], strict=True)}
    return Outside(rest, made[0] if output else None)


def _with_a_graph(parts: NetworkInBlocks, leave: Look, j: int, z: Tensor) -> Tensor:
    if parts.slots[j] and not z.requires_grad:
        raise MisconfigurationException(
            f"{parts.rule}: block {parts.blocks[j].name} ran without a graph, so that nothing in it would learn. Do "
            "not run it under torch.no_grad, nor in a checkpoint with use_reentrant=True; inside a block, checkpoints "
            "with use_reentrant=False work."
        )
    return leave(j, z)


def other_way(parts: NetworkInBlocks) -> MisconfigurationException:
    """Return the error for a loss that depends on the blocks not only through the network's output."""
    return MisconfigurationException(
        f"{parts.rule} takes the derivative of the loss at the output of the network, {type(parts.network).__name__}, "
        "but the loss depends on its blocks by another way too. Compute the loss from the network's output in "
        "training_step, not in the network (F.cross_entropy(self.net(...).logits, labels)), or name the module whose "
        "output is all that the loss sees by network=...."
    )


def backward_in_blocks(parts: NetworkInBlocks, signal: Callable[[int, Tensor], Tensor]) -> Params:
    """Return the gradients of the blocks' parameters, given the gradients ``signal(j, z)`` of block outputs."""
    made: Params = {}

    def leave(j: int, z: Tensor) -> Tensor:
        if parts.slots[j]:
            made.update(pulled_back(parts.slots[j], z, signal(j, z.detach())))
        return z.detach()

    with block_hooks(parts.blocks, enter=cut_off, leave=leave):
        parts.step.loss(recorded=False, cost=1 + LOCAL_BACKWARD)
    return made


def pulled_back(slots: Sequence[Slot], z: Tensor, signal: Tensor) -> Params:
    """Return the gradients of a block's parameters, given the gradient ``signal`` of its output ``z``."""
    sources = [slot.parameter for slot in slots]
    found: Sequence[Tensor | None] = [None] * len(sources)
    if z.requires_grad:
        found = torch.autograd.grad(z, sources, signal.to(z.dtype), allow_unused=True)
    return {
        slot.name: torch.zeros_like(slot.parameter) if grad is None else grad
        for slot, grad in zip(slots, found, strict=True)
    }
