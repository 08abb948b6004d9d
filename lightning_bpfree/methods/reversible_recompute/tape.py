"""The backward pass of a reversible stack: inputs are recovered from outputs, block by block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from lightning_bpfree.core.recompute_context import Autocast, Draws
from lightning_bpfree.methods.reversible_recompute.coupling import Coupling, join, part
from lightning_bpfree.methods.reversible_recompute.module_snapshot import Inventory, uncached, version
from lightning_bpfree.methods.reversible_recompute.refused import RefusedStackError
from lightning_bpfree.methods.reversible_recompute.side_stream import SideStream

Drift = Callable[[str, Sequence[Tensor], Sequence[Tensor]], None]


class BranchReplay(NamedTuple):
    """One branch evaluated again, with its graph.

    Args:
        leaf: where the graph begins: ``y1`` for ``g``, ``x2`` for ``f``.
        out: the branch's value.
        others: leaves that stand for tensors of the context that need gradients, and for trainable parameters.
        back: what the branch was added to, recovered.
    """

    leaf: Tensor
    out: Tensor
    others: list[Tensor]
    back: Tensor


class Pair(NamedTuple):
    """A block taken back: both branches with their graphs, the upper one first."""

    g: BranchReplay
    f: BranchReplay


class Evaluation(NamedTuple):
    """The data kept from one evaluation of a branch, without activations.

    Args:
        draws: the random streams before it; None if it drew nothing.
        buffers: copies of the buffers before it, None for one that it did not move; empty if it moved none.
    """

    draws: Draws | None
    buffers: list[Tensor | None]


class Block(NamedTuple):
    """The data kept from one block's forward pass.

    Args:
        coupling: the block.
        inventory: its parameters and buffers then.
        evaluations: of ``f`` and of ``g``.
    """

    coupling: Coupling
    inventory: Inventory
    evaluations: list[Evaluation]


class Pass:
    """One backward pass: the data that a block passes to the one below it."""

    def __init__(self, y1: Tensor, y2: Tensor, parallel: bool) -> None:
        self.above: tuple[Tensor, ...] | Pair | None = (y1, y2)
        self.streams = SideStream(y1.device if parallel else None)
        self.streams.open()


class Tape:
    """One forward pass of a reversible stack; any number of backward passes can be made from it.

    Args:
        context: keyword arguments of the branches.
        tensor: any tensor of the pass, for its device.
        parallel: whether the block below is taken back while the gradients of a block are computed.
        buffered: the blocks whose inputs are kept.
        drift: receives a block's label, and its inputs as they were recovered and as they are kept.
        suspicious: whether to look for tensors whose gradients would be lost.
    """

    def __init__(
        self,
        context: Mapping[str, Any],
        tensor: Tensor,
        parallel: bool = False,
        buffered: frozenset[int] = frozenset(),
        drift: Drift | None = None,
        suspicious: bool = False,
    ) -> None:
        self.context, self.parallel, self.buffered, self.drift = context, parallel, buffered, drift
        self.suspicious = suspicious
        self.sources = [key for key, value in context.items() if isinstance(value, Tensor) and value.requires_grad]
        self.autocast = Autocast.now(tensor.device.type)
        self.blocks: list[Block] = []
        self.passes: dict[int, Pass] = {}
        self._tensors = [leaf for leaf in tree_leaves(dict(context)) if isinstance(leaf, Tensor)]
        self._versions = list(map(version, self._tensors))

    def inputs(self, index: int) -> list[Tensor]:
        """Return what gets gradients from a block besides the streams: sources of the context, and its parameters."""
        return [*(self.context[key] for key in self.sources), *self.blocks[index].inventory.trainable]

    # --- forward ---

    def forward(self, index: int, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Run a block, keep no graph of it, and remember what it draws and moves."""
        coupling = self.blocks[index].coupling
        y1 = join(x1, self._recorded(index, coupling.first, x2), coupling.scale[0])
        return y1, join(x2, self._recorded(index, coupling.second, y1), coupling.scale[1])

    def _recorded(self, index: int, branch: Callable[..., Tensor], x: Tensor) -> Tensor:
        _, inventory, evaluations = self.blocks[index]
        leaf = x.detach().requires_grad_()
        before, buffers = Draws.now(x), inventory.copies()
        # With a graph, for that decides between kernels, and another one than in the backward pass might draw other
        # numbers. What it saves is gone with the branch.
        with self.autocast.again(), torch.enable_grad(), _Passing() as passing, uncached():
            out = branch(leaf, self.context)
        passing.saved = None
        self._refuse_foreign(index, out, [leaf, *self.inputs(index)])
        drawn, moved = not before.equals(Draws.now(x)), inventory.moved(buffers)
        kept = [copy if moves else None for copy, moves in zip(buffers, moved, strict=True)] if any(moved) else []
        evaluations.append(Evaluation(before if drawn else None, kept))
        return out.detach()

    def _refuse_foreign(self, index: int, out: Tensor, known: list[Tensor]) -> None:
        inventory = self.blocks[index].inventory
        found = inventory.foreign(out, known) if self.suspicious else None
        if found is not None:
            raise RefusedStackError(
                f"{inventory.label} uses a tensor of shape {tuple(found.shape)} that needs a gradient and does not "
                "come from its parameters, so that its gradient would be lost: make it a parameter of the block, pass "
                "it as a keyword argument of the stack, or use schedule='autograd'."
            )

    # --- backward ---

    def begin(self, y1: Tensor, y2: Tensor) -> None:
        """Begin a backward pass at the outputs.

        Raises:
            RefusedStackError: if a tensor of the context was changed in place since the forward pass.
        """
        if list(map(version, self._tensors)) != self._versions:
            raise RefusedStackError(
                "a keyword argument of a reversible stack (a mask?) was changed in place between forward and backward, "
                "so that inputs cannot be recomputed: pass a copy of it."
            )
        number = graph_task()
        self.passes[number] = Pass(y1, y2, self.parallel)
        # A pass that asks for gradients of upper blocks only ends there.
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._end, number))

    def _end(self, number: int) -> None:
        self.passes.pop(number, None)

    def take_back(self, index: int, y1: Tensor, y2: Tensor) -> Pair:
        """Recover a block's inputs from its outputs, keeping the graphs of both branches."""
        g = self.upper(index, y1, y2)
        return Pair(g, self.lower(index, g.back, y1))

    def upper(self, index: int, y1: Tensor, y2: Tensor) -> BranchReplay:
        """Evaluate ``g`` again and recover ``x2``."""
        coupling, inventory, _ = self.blocks[index]
        inventory.check()
        return self._half(index, 1, coupling.second, y1, y2)

    def lower(self, index: int, x2: Tensor, y1: Tensor) -> BranchReplay:
        """Evaluate ``f`` again and recover ``x1``."""
        return self._half(index, 0, self.blocks[index].coupling.first, x2, y1)

    def _half(self, index: int, which: int, branch: Callable[..., Tensor], x: Tensor, y: Tensor) -> BranchReplay:
        coupling, inventory, evaluations = self.blocks[index]
        leaf = x.detach().requires_grad_()
        sources = {key: self.context[key].detach().requires_grad_() for key in self.sources}
        before, buffers = evaluations[which]
        now = None if before is None else Draws.now(leaf)
        try:
            if before is not None:
                before.restore()
            with inventory.again(buffers) as parameters, self.autocast.again(), torch.enable_grad():
                out = branch(leaf, {**self.context, **sources})
        finally:
            if now is not None:
                now.restore()
        others = [*sources.values(), *parameters]
        self._refuse_foreign(index, out, [leaf, *others])  # such as a parameter that a branch knows by another way
        return BranchReplay(leaf, out, others, part(y, out.detach(), coupling.scale[which]))


def graph_task() -> int:
    """Return the number of the backward pass that this code is part of; a pass may begin within another."""
    return int(torch._C._current_graph_task_id())


class _Passing(saved_tensors_hooks):
    """Keeps what a graph saves for as long as the branch runs, which may differentiate it."""

    def __init__(self) -> None:
        self.saved: list[Tensor] | None = []
        super().__init__(self._pack, self._unpack)

    def __enter__(self) -> _Passing:  # type: ignore[override]
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Any:
        if self.saved is None:
            return None
        self.saved.append(tensor)
        return len(self.saved) - 1

    def _unpack(self, number: Any) -> Tensor:
        if self.saved is None:
            raise RefusedStackError(
                "something that was computed within a branch of a reversible stack is differentiated outside of it "
                "(kept as an attribute, or in a cache?), where it has no graph: return it from the stack, or use "
                "schedule='autograd'."
            )
        saved: Tensor = self.saved[number]
        return saved
