"""The backward pass of a reversible stack: inputs come back from outputs, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_bpfree.core.params import added
from lightning_bpfree.core.recompute import Autocast, Draws, Inventory
from lightning_bpfree.nn.coupling import Coupling, join, part
from lightning_bpfree.nn.side_stream import SideStream

Drift = Callable[[str, Sequence[Tensor], Sequence[Tensor]], None]


class Half(NamedTuple):
    """One branch evaluated again, with its graph.

    Args:
        leaf: where the graph begins: ``y1`` for ``g``, ``x2`` for ``f``.
        out: the branch's value.
        sources: leaves that stand for those tensors of the context that need gradients.
        back: what the branch was added to, recovered.
    """

    leaf: Tensor
    out: Tensor
    sources: list[Tensor]
    back: Tensor


class Pair(NamedTuple):
    """A block taken back: both branches with their graphs, the upper one first."""

    g: Half
    f: Half


class Block(NamedTuple):
    """What a forward pass leaves behind of one block; no activation.

    Args:
        coupling: the block.
        inventory: its parameters and buffers then.
        draws: the random streams before ``f`` and before ``g``; None where the branch drew nothing.
    """

    coupling: Coupling
    inventory: Inventory
    draws: list[Draws | None]


class Tape:
    """One forward pass of a reversible stack; any number of backward passes can be made from it.

    Args:
        context: keyword arguments of the branches.
        tensor: any tensor of the pass, for its device.
        parallel: whether the block below is taken back while the gradients of a block are computed.
        buffered: the blocks whose inputs are kept.
        drift: receives a block's label, and its inputs as they were recovered and as they are kept.
    """

    def __init__(
        self,
        context: Mapping[str, Any],
        tensor: Tensor,
        parallel: bool = False,
        buffered: frozenset[int] = frozenset(),
        drift: Drift | None = None,
    ) -> None:
        self.context, self.parallel, self.buffered, self.drift = context, parallel, buffered, drift
        self.sources = [key for key, value in context.items() if isinstance(value, Tensor) and value.requires_grad]
        self.autocast = Autocast.now(tensor.device.type)
        self.streams = SideStream(tensor.device if parallel else None)
        self.blocks: list[Block] = []
        self.above: tuple[Tensor, Tensor] | Pair | None = None  # what the block above leaves for the next
        self._versions = self._context_versions()
        self._draws: Draws | None = None

    def _context_versions(self) -> list[int]:
        tensors = [value for value in self.context.values() if isinstance(value, Tensor)]
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]

    # --- forward ---

    def forward(self, index: int, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Run a block, keep no graph of it, and remember what it draws."""
        coupling, _, draws = self.blocks[index]
        y1 = join(x1, self._recorded(draws, coupling.first, x2), coupling.scale[0])
        return y1, join(x2, self._recorded(draws, coupling.second, y1), coupling.scale[1])

    def _recorded(self, draws: list[Draws | None], branch: Callable[..., Tensor], x: Tensor) -> Tensor:
        before = Draws.now(x)
        # With a graph, for that decides between kernels, and another one than in the backward pass might draw other
        # numbers. It saves nothing, and is gone with the branch.
        with self.autocast.again(), torch.enable_grad(), saved_tensors_hooks(_nothing, _nothing):
            out = branch(x.detach().requires_grad_(), self.context).detach()
        draws.append(None if before.equals(Draws.now(x)) else before)
        return out

    # --- backward ---

    def open(self, y1: Tensor, y2: Tensor) -> None:
        """Begin a backward pass at the outputs.

        Raises:
            RuntimeError: if a tensor of the context was changed in place since the forward pass.
        """
        if self._context_versions() != self._versions:
            raise RuntimeError(
                "a keyword argument of a reversible stack (a mask?) was changed in place between forward and backward, "
                "so that inputs cannot be recomputed: pass a copy of it."
            )
        self.above = (y1, y2)
        self.streams.open()

    def take_back(self, index: int, y1: Tensor, y2: Tensor) -> Pair:
        """Recover a block's inputs from its outputs, keeping the graphs of both branches."""
        g = self.upper(index, y1, y2)
        return Pair(g, self.lower(index, g.back, y1))

    def upper(self, index: int, y1: Tensor, y2: Tensor) -> Half:
        """Evaluate ``g`` again and recover ``x2``."""
        coupling, inventory, _ = self.blocks[index]
        inventory.check()
        return self._half(index, 1, coupling.second, y1, y2)

    def lower(self, index: int, x2: Tensor, y1: Tensor) -> Half:
        """Evaluate ``f`` again and recover ``x1``."""
        return self._half(index, 0, self.blocks[index].coupling.first, x2, y1)

    def _half(self, index: int, which: int, branch: Callable[..., Tensor], x: Tensor, y: Tensor) -> Half:
        coupling, inventory, draws = self.blocks[index]
        leaf = x.detach().requires_grad_()
        sources = {key: self.context[key].detach().requires_grad_() for key in self.sources}
        before = draws[which]
        now = None if before is None else Draws.now(leaf)
        try:
            if before is not None:
                before.restore()
            with inventory.again(), self.autocast.again(), torch.enable_grad():
                out = branch(leaf, {**self.context, **sources})
        finally:
            if now is not None:
                now.restore()
        return Half(leaf, out, list(sources.values()), part(y, out.detach(), coupling.scale[which]))


def _nothing(_: Tensor) -> Any:
    """Save nothing of a tensor."""


Grads = list[Tensor | None]


def differentiate(half: Half, d: Tensor, leaf: bool, others: Sequence[Tensor | None]) -> tuple[Tensor | None, Grads]:
    """Differentiate a branch's output, weighted by ``d``.

    Args:
        half: the branch, whose graph is used up.
        d: gradient of its output.
        leaf: whether the gradient of its input is wanted.
        others: further inputs; None for those whose gradient is not.
    """
    inputs = [half.leaf if leaf else None, *others]
    wanted = [tensor for tensor in inputs if tensor is not None]
    if not wanted or not half.out.requires_grad:
        return None, [None] * len(others)
    # A branch may compute in half precision between streams that do not.
    grads = iter(torch.autograd.grad(half.out, wanted, d.to(half.out.dtype), allow_unused=True))
    first, *rest = [None if tensor is None else next(grads) for tensor in inputs]
    return first, rest


class ReversibleFunction(torch.autograd.Function):
    """One block of a reversible stack as one node of the graph, so that its gradients leave it when they are there.

    Hooks of parameters then fire block by block from the top, as distributed training wants them.
    """

    @staticmethod
    def forward(ctx: Any, tape: Tape, index: int, top: bool, x1: Tensor, x2: Tensor, *others: Tensor) -> Any:  # noqa: ARG004  # inputs of the node
        """Return the block's outputs; ``others`` are the sources of the context and the trainable parameters."""
        y1, y2 = tape.forward(index, x1, x2)
        ctx.tape, ctx.index, ctx.top = tape, index, top
        # Outputs are saved as such, not as copies, so that autograd sees whether they were changed in place.
        ctx.save_for_backward(*((y1, y2) if top else ()), *((x1, x2) if index in tape.buffered else ()))
        return y1, y2

    @staticmethod
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> Any:
        """Take the block back and return the gradients of all inputs."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a reversible stack is differentiable once: its backward pass recomputes and keeps no graph. For "
                "create_graph=True, gradient penalties and second derivatives, use schedule='autograd'."
            )
        tape: Tape = ctx.tape
        saved = _saved(ctx)
        if ctx.top:
            tape.open(*saved[:2])
        return (None, None, None, *_Step(ctx, saved[2:] if ctx.top else saved).gradients(d1, d2))


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "the output (or a buffered input) of a reversible stack was changed in place, so that its inputs cannot be "
            "recomputed: use an out-of-place operation (y = y + 1 rather than y += 1), or clone it first."
        ) from error
    return saved


class _Step:
    """The backward pass of one block.

    Args:
        ctx: the block's node.
        kept: exact inputs, if the block is buffered.
    """

    def __init__(self, ctx: Any, kept: tuple[Tensor, ...]) -> None:
        self.tape, self.index, self.kept = ctx.tape, ctx.index, kept
        _, _, _, *self.streams_wanted = ctx.needs_input_grad[:5]
        self.block = self.tape.blocks[self.index]
        self.wanted = ctx.needs_input_grad[5:]
        # Whether a block below will ask for its outputs.
        self.deeper = self.index > 0 and any(self.streams_wanted)

    def gradients(self, d1: Tensor, d2: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of both streams and of all other inputs."""
        above, self.tape.above = self.tape.above, None
        if self.tape.parallel:
            d1, d2, rest = self._in_parallel(above, d1, d2)
        else:
            d1, d2, rest = self._in_sequence(above, d1, d2)
        s1, s2 = self.streams_wanted
        return (d1 if s1 else None, d2 if s2 else None, *rest)

    def _in_sequence(self, above: Any, d1: Tensor, d2: Tensor) -> tuple[Tensor, Tensor, Grads]:
        y1, y2 = above
        g = self.tape.upper(self.index, y1, y2)
        x2 = g.back
        d1, rest = self._through_g(g, d1, d2)
        del g  # its graph is used up: at most one branch's is alive
        f = self.tape.lower(self.index, x2, y1)
        if self.deeper or self.kept:
            self.tape.above = self._inputs(f.back, x2)
        return self._through_f(f, d1, d2, rest)

    def _in_parallel(self, above: Any, d1: Tensor, d2: Tensor) -> tuple[Tensor, Tensor, Grads]:
        tape, index, streams = self.tape, self.index, self.tape.streams
        streams.mark("gradients", 0)
        if not isinstance(above, Pair):
            with streams.use(index, "gradients", above):
                above = tape.take_back(index, *above)
            streams.mark("recovered", index)
        x1, x2 = self._inputs(above.f.back, above.g.back)
        if self.deeper:
            with streams.use(index - 1, "recovered", (x1, x2)):
                tape.above = tape.take_back(index - 1, x1, x2)
            streams.mark("recovered", index - 1)
        with streams.use(index, "gradients", (d1, d2)):
            d1, rest = self._through_g(above.g, d1, d2)
            d1, d2, rest = self._through_f(above.f, d1, d2, rest)
        streams.give(index, (d1, d2, *rest))
        return d1, d2, rest

    def _inputs(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        """Return the exact inputs where they are kept, otherwise the recovered ones."""
        if self.kept and self.tape.drift is not None:
            self.tape.drift(self.block.coupling.label, (x1, x2), self.kept)
        return self.kept or (x1, x2)

    def _through_g(self, g: Half, d1: Tensor, d2: Tensor) -> tuple[Tensor, Grads]:
        into, rest = differentiate(g, d2, True, self._others(g))
        return (d1 if into is None else d1 + into), rest

    def _through_f(self, f: Half, d1: Tensor, d2: Tensor, rest: Grads) -> tuple[Tensor, Tensor, Grads]:
        s1, s2 = self.block.coupling.scale
        into, more = differentiate(f, d1, self.streams_wanted[1], self._others(f))
        d2 = d2 if s2 == 1.0 else d2 * s2
        rest = [added(a, b) for a, b in zip(rest, more, strict=True)]
        return (d1 if s1 == 1.0 else d1 * s1), (d2 if into is None else d2 + into), rest

    def _others(self, half: Half) -> list[Tensor | None]:
        inputs = [*half.sources, *self.block.inventory.trainable]
        return [tensor if wanted else None for tensor, wanted in zip(inputs, self.wanted, strict=True)]
