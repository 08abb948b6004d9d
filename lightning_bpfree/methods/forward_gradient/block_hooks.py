"""Hooks on blocks that change what leaves them, or look for parameters that a cut would rob of their gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_bpfree.core.autograd_graph import reached
from lightning_bpfree.core.block_hooks import Look
from lightning_bpfree.core.blocks import Block


@contextlib.contextmanager
def leaving(modules: Mapping[int, nn.Module], look: Look) -> Iterator[None]:
    """Let ``look(j, z)`` change the first tensor that leaves ``modules[j]``, without cutting the graph."""

    def after(j: int, module: nn.Module, args: object, output: Any) -> Any:  # noqa: ARG001  # a hook's signature
        leaves, shape = tree_flatten(output)
        first = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
        if first is None:
            raise ValueError(f"blocks: no tensor leaves {type(module).__name__}.")
        leaves[first] = look(j, leaves[first])
        return tree_unflatten(leaves, shape)

    handles = [module.register_forward_hook(partial(after, j)) for j, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def nothing_lost(blocks: Sequence[Block], trained: Mapping[int, str]) -> Iterator[None]:
    """Refuse a cut at which a graph ends that reaches a trained parameter of no block.

    Args:
        blocks: what enters them, and what leaves them, is cut. Enter this context before the cut is made.
        trained: names of the trained parameters of no block, by their ids.

    Raises:
        MisconfigurationException: from within the forward pass; it names the parameters and the cure.
    """

    def look(block: Block, values: object) -> None:
        tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.requires_grad]
        lost = sorted({trained[id(leaf)] for tensor in tensors for leaf in reached(tensor) if id(leaf) in trained})
        if lost:
            raise MisconfigurationException(
                f"ForwardGradient: {', '.join(lost)} runs before the end of block {block.name} but belongs to no "
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
