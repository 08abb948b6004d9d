"""Hooks on the inputs and outputs of a network's blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_bpfree.core.blocks import Block
from lightning_bpfree.core.network.network_call import Call, RefusedError, scores_of, with_scores

Look = Callable[[int, Tensor], Tensor]

_WHOLE: ContextVar[bool] = ContextVar("whole_graph", default=False)


@contextlib.contextmanager
def whole_graph() -> Iterator[None]:
    """Let gradients cross block boundaries: for explaining a network by its input, not for training it."""
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def cut_off(tensor: Tensor) -> Tensor:
    """Return the tensor without its graph, so that no gradient crosses a block boundary.

    Examples:
        >>> import torch
        >>> x = torch.ones(1, requires_grad=True) * 2
        >>> cut_off(x).requires_grad
        False
        >>> with whole_graph():
        ...     cut_off(x).requires_grad
        True
    """
    return tensor if _WHOLE.get() else tensor.detach()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def on_first_tensor(
    change: Callable[[Tensor], Tensor], values: Any, what: str, *, others: Callable[[Tensor], Tensor] = _same
) -> Any:
    """Apply ``change`` to the first tensor in ``values`` (nested tuples, lists or dicts), ``others`` to the rest."""
    seen = 0

    def changed(tensor: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        return change(tensor) if seen == 1 else others(tensor)

    made = tree_map_only(Tensor, changed, values)
    if not seen:
        raise RefusedError(f"blocks: no tensor {what}.")
    return made


@contextlib.contextmanager
def block_hooks(blocks: Sequence[Block], *, enter: Look, leave: Look) -> Iterator[list[int]]:
    """Replace the input of block ``j`` by ``enter(j, x)`` and its output by ``leave(j, z)``.

    Only the first tensor of inputs and outputs is passed; all others (masks, skip connections, caches) are detached.

    Args:
        blocks: the blocks; each may run once.
        enter: called before the first module of a block.
        leave: called after its last module.

    Yields:
        the indices of the blocks that have run, in that order.

    Raises:
        RuntimeError: from within the forward pass, if a block runs twice.
    """
    ran: list[int] = []

    def before(index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:  # noqa: ARG001  # a hook's signature
        what = f"enters {blocks[index].name}"
        return on_first_tensor(partial(enter, index), (args, kwargs), what, others=cut_off)

    def after(index: int, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001  # a hook's signature
        if index in ran:
            raise RefusedError(
                f"Block {blocks[index].name} runs twice in one forward pass: blocks are cut for one pass. Make what "
                "runs several times a part of one block."
            )
        ran.append(index)
        what = f"leaves {blocks[index].name}"
        return on_first_tensor(partial(leave, index), output, what, others=cut_off)

    handles = []
    try:
        for index, block in enumerate(blocks):
            first, last = block.modules[0], block.modules[-1]
            handles.append(first.register_forward_pre_hook(partial(before, index), with_kwargs=True))
            handles.append(last.register_forward_hook(partial(after, index)))
        yield ran
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def scores_leaving(network: nn.Module, look: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the scores in the output of ``network``, a tensor or an object that holds one, by ``look(scores)``."""

    def after(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001  # a hook's signature
        scores = scores_of(network, output)
        changed = look(scores)
        return output if changed is scores else with_scores(network, output, changed)

    handle = network.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def calls_of(network: nn.Module) -> Iterator[list[Call]]:
    """Yield a list that records every keyword call of ``network``, with the labels passed to it."""
    calls: list[Call] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ARG001  # a hook's signature
        if kwargs:
            calls.append(Call(args, kwargs))

    handle = network.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextlib.contextmanager
def entering(modules: Sequence[nn.Module], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Apply ``change`` to the first input tensor of ``modules`` in every call."""

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return on_first_tensor(change, (args, kwargs), f"enters {type(module).__name__}")

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def leaving(
    modules: Mapping[int, nn.Module], look: Look, *, others: Callable[[Tensor], Tensor] = _same
) -> Iterator[None]:
    """Replace the first output tensor of ``modules[j]`` by ``look(j, z)`` in every call.

    Args:
        modules: numbered modules; for a block, its last module.
        look: called with the number and the first tensor; returns its replacement.
        others: applied to all other output tensors; ``torch.Tensor.detach`` ends their graphs.

    Examples:
        >>> import torch
        >>> half = nn.Linear(2, 2)
        >>> with leaving({0: half}, lambda j, z: torch.zeros_like(z)):
        ...     half(torch.ones(1, 2)).tolist()
        [[0.0, 0.0]]
    """

    def after(j: int, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001  # a hook's signature
        return on_first_tensor(partial(look, j), output, f"leaves {type(module).__name__}", others=others)

    handles = [module.register_forward_hook(partial(after, j)) for j, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
