"""A reversible block as an autograd node, inverted before or in parallel to the gradients of the block above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_bpfree.core.params import added
from lightning_bpfree.methods.reversible_recompute.refused import RefusedStackError
from lightning_bpfree.methods.reversible_recompute.tape import BranchReplay, Pair, Pass, Tape, graph_task

Grads = list[Tensor | None]


def differentiate(
    half: BranchReplay, d: Tensor, leaf: bool, others: Sequence[Tensor | None]
) -> tuple[Tensor | None, Grads]:
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
            raise RefusedStackError(
                "a reversible stack is differentiable once: its backward pass recomputes and keeps no graph. For "
                "create_graph=True, gradient penalties and second derivatives, use schedule='autograd'."
            )
        saved = _saved(ctx)
        if ctx.top:
            ctx.tape.begin(*saved[:2])
        return (None, None, None, *_Step(ctx, saved[2:] if ctx.top else saved).gradients(d1, d2))


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise RefusedStackError(
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
        self.streams_wanted, self.wanted = ctx.needs_input_grad[3:5], ctx.needs_input_grad[5:]
        self.block = self.tape.blocks[self.index]

    def gradients(self, d1: Tensor, d2: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of both streams and of all other inputs."""
        now = self.tape.passes[graph_task()]
        above, now.above = now.above, None
        d1, d2, rest = (self._in_parallel if self.tape.parallel else self._in_sequence)(now, above, d1, d2)
        s1, s2 = self.streams_wanted
        return (d1 if s1 else None, d2 if s2 else None, *rest)

    def _in_sequence(self, now: Pass, above: Any, d1: Tensor, d2: Tensor) -> tuple[Tensor, Tensor, Grads]:
        y1, y2 = above
        g = self.tape.upper(self.index, y1, y2)
        x2 = g.back
        d1, rest = self._through_g(g, d1, d2)
        del g  # one branch's tensors at a time
        f = self.tape.lower(self.index, x2, y1)
        below = self._inputs(f.back, x2)
        now.above = below if self.index > 0 else None
        return self._through_f(f, d1, d2, rest)

    def _in_parallel(self, now: Pass, above: Any, d1: Tensor, d2: Tensor) -> tuple[Tensor, Tensor, Grads]:
        tape, index, streams = self.tape, self.index, now.streams
        streams.mark("gradients", 0)
        if not isinstance(above, Pair):
            with streams.use(index, "gradients", above):
                above = tape.take_back(index, *above)
            streams.mark("recovered", index)
        with streams.use(index, None, self.kept):
            x1, x2 = self._inputs(above.f.back, above.g.back)
        if index > 0:
            with streams.use(index - 1, "recovered", (x1, x2)):
                now.above = tape.take_back(index - 1, x1, x2)
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

    def _through_g(self, g: BranchReplay, d1: Tensor, d2: Tensor) -> tuple[Tensor, Grads]:
        into, rest = differentiate(g, d2, True, self._others(g))
        return (d1 if into is None else d1 + into), rest

    def _through_f(self, f: BranchReplay, d1: Tensor, d2: Tensor, rest: Grads) -> tuple[Tensor, Tensor, Grads]:
        s1, s2 = self.block.coupling.scale
        into, more = differentiate(f, d1, self.streams_wanted[1], self._others(f))
        d2 = d2 if s2 == 1.0 else d2 * s2
        rest = [added(a, b) for a, b in zip(rest, more, strict=True)]
        return (d1 if s1 == 1.0 else d1 * s1), (d2 if into is None else d2 + into), rest

    def _others(self, half: BranchReplay) -> list[Tensor | None]:
        return [tensor if wanted else None for tensor, wanted in zip(half.others, self.wanted, strict=True)]
