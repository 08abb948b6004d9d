"""Gradients of a solve: the choice of the gradient mode, and the chain rule through its plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_bpfree.methods.diffusion_adjoint.continuous_adjoint import ContinuousAdjoint
from lightning_bpfree.methods.diffusion_adjoint.evaluations import (
    Context,
    Evaluated,
    Field,
    Solve,
    Sums,
    evaluated,
    leaves,
    product,
    refuse_second_derivatives,
)
from lightning_bpfree.methods.diffusion_adjoint.plans import Combine, Evaluate, run
from lightning_bpfree.methods.diffusion_adjoint.schedules import Node

Gradient = Literal["exact_adjoint", "adjoint", "checkpoint", "direct", "truncated"]


def solved(solve: Solve, gradient: Gradient, start: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return the solution, differentiable in ``start`` and ``tensors`` by the rule ``gradient``.

    Args:
        solve: the solve.
        gradient: ``"exact_adjoint"``, ``"adjoint"``, ``"checkpoint"``, ``"direct"`` or ``"truncated"``.
        start: y at the first node.
        tensors: what else needs a gradient, conditioning and parameters.
    """
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (start, *tensors)):
        return run(solve.plan, lambda at, y: solve.field(at.node, y, tensors), start)
    if gradient == "direct":
        return run(solve.plan, lambda at, y: solve.field(at.node, y, tensors), start)
    if gradient == "checkpoint":
        return run(solve.plan, lambda at, y: _checkpointed(solve.field, at.node, y, tensors), start)
    if gradient == "adjoint":
        out: Tensor = ContinuousAdjoint.apply(solve, start, *tensors)
    else:
        out = DiscreteAdjoint.apply(solve, start, *tensors)
    return out


def _checkpointed(field: Field, node: Node, y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    out: Tensor = checkpoint(lambda y: field(node, y, tensors), y, use_reentrant=False)
    return out


class DiscreteAdjoint(torch.autograd.Function):
    """The chain rule through a plan, one evaluation at a time: the gradient of the solver that ran, exactly.

    Kept are the inputs of the evaluations, each as large as y. An evaluation is repeated once, with its graph, which
    goes before the next one comes; the graph of the last evaluation may be kept instead. Starting point, conditioning
    and parameters are inputs of the node, so that everything which listens to gradients (DDP, hooks) hears of them.
    """

    @staticmethod
    def forward(ctx: Any, solve: Solve, start: Tensor, *tensors: Tensor) -> Tensor:
        """Return the solution."""
        states, context, last = list[Tensor](), Context(start), solve.plan.evaluations[-1]
        to_start = bool(ctx.needs_input_grad[1]) and solve.last_steps is None
        kept: dict[int, Evaluated] = {}

        def evaluate(at: Evaluate, y: Tensor) -> Tensor:
            if solve.counts(at.step):
                states.append(y)
                context.note(y)
            if at is not last or not solve.keep_last:
                return solve.field(at.node, y, tensors)
            with context.autocast.again(), torch.enable_grad():
                kept[at.out] = evaluated(solve.field, at.node, y, leaves(tensors), at.source != 0 or to_start)
            return kept[at.out].out.detach()

        out = run(solve.plan, evaluate, start)
        context.close(start)
        ctx.solve, ctx.context, ctx.num_tensors = solve, context, len(tensors)
        ctx.to_start, ctx.kept = to_start, kept
        ctx.save_for_backward(*tensors, *states)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradients of the starting point and of the further tensors."""
        refuse_second_derivatives()
        solve: Solve = ctx.solve
        saved = ctx.saved_tensors
        states = list(saved[ctx.num_tensors :])
        sums = Sums(saved[: ctx.num_tensors], ctx.needs_input_grad[2:])
        cotangents = {solve.plan.out: grad}
        for operation in reversed(solve.plan.operations):
            if not solve.counts(operation.step):
                break
            state = states.pop() if isinstance(operation, Evaluate) else None
            above = cotangents.pop(operation.out, None)
            if above is None:
                continue
            if isinstance(operation, Combine):
                for value, factor in operation.terms:
                    _add(cotangents, value, above if factor == 1.0 else above * factor)
                continue
            assert state is not None
            _add(cotangents, operation.source, _through(ctx, operation, len(states), state, sums, above))
        return (None, cotangents.get(0) if ctx.to_start else None, *sums.results())


def _through(ctx: Any, at: Evaluate, index: int, state: Tensor, sums: Sums, cotangent: Tensor) -> Tensor | None:
    """Return the product of a cotangent with the field's derivative by y; those by the tensors go into the sums."""
    of: Evaluated | None = ctx.kept.pop(at.out, None)  # a second backward pass evaluates everything again
    with ctx.context.again(index, state):
        if of is None:
            of = evaluated(ctx.solve.field, at.node, state, sums.leaves, at.source != 0 or ctx.to_start)
        into, rest = product(of, sums.wanted, cotangent)
    sums.add(rest, 1.0)
    return into


def _add(cotangents: dict[int, Tensor], value: int, more: Tensor | None) -> None:
    # Never in place: one tensor may stand for several values.
    if more is not None:
        cotangents[value] = cotangents[value] + more if value in cotangents else more
