"""The gradient of AdjointDPM: the augmented ODE, solved from data to noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_bpfree.methods.diffusion_adjoint.evaluations import (
    Context,
    Solve,
    Sums,
    evaluated,
    product,
    refuse_second_derivatives,
)
from lightning_bpfree.methods.diffusion_adjoint.plans import TABLEAUS, Evaluate, Tableau, between, combined, run
from lightning_bpfree.methods.diffusion_adjoint.schedules import Node


class ContinuousAdjoint(torch.autograd.Function):
    """The augmented ODE of AdjointDPM, solved from data to noise by the method that solved the ODE itself.

    ``da/drho = -a df/dy`` and, for every further tensor, ``dg/drho = -a df/dtensor``; at each node y is put back to
    the state of the forward solve, as torchdiffeq does, so that it does not drift. The result is the gradient of the
    ODE rather than of the solver: it differs from the exact one by a term of the solver's order.
    """

    @staticmethod
    def forward(ctx: Any, solve: Solve, start: Tensor, *tensors: Tensor) -> Tensor:
        """Return the solution."""
        states, context = list[Tensor](), Context(start)
        firsts = {operation.step: index for index, operation in reversed(list(enumerate(solve.plan.evaluations)))}
        number = iter(range(solve.plan.num_evaluations))

        def evaluate(at: Evaluate, y: Tensor) -> Tensor:
            if next(number) == firsts[at.step]:
                states.append(y)  # the first stage of a step is at its node
            context.note(y)
            return solve.field(at.node, y, tensors)

        out = run(solve.plan, evaluate, start)
        context.close(start)
        ctx.solve, ctx.context, ctx.num_tensors = solve, context, len(tensors)
        ctx.save_for_backward(*tensors, *states, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradients of the starting point and of the further tensors."""
        refuse_second_derivatives()
        solve: Solve = ctx.solve
        tableau, nodes, saved = TABLEAUS[solve.solver], solve.plan.nodes, ctx.saved_tensors
        states = saved[ctx.num_tensors :]
        sums = Sums(saved[: ctx.num_tensors], ctx.needs_input_grad[2:])
        adjoint = grad
        for step in reversed(range(solve.plan.num_steps)):
            path = (nodes[step + 1], nodes[step])
            adjoint = _step_back(ctx, tableau, path, step, states[step + 1], adjoint, sums)
        return (None, adjoint if ctx.needs_input_grad[1] else None, *sums.results())


def _step_back(
    ctx: Any, tableau: Tableau, path: tuple[Node, Node], step: int, y: Tensor, adjoint: Tensor, sums: Sums
) -> Tensor:
    """Return the adjoint at the earlier of two nodes; ``y`` and ``adjoint`` are those at the later."""
    solve, (start, end), stages = ctx.solve, path, len(tableau.b)
    h = end.rho - start.rho  # above 0: back towards noise
    values, adjoints = {0: y}, {0: adjoint}
    for stage, (row, fraction) in enumerate(zip(tableau.a, tableau.c, strict=True)):
        terms = [(index + 1, h * weight) for index, weight in enumerate(row) if weight]
        at_y = combined(values, [(0, 1.0), *terms])
        at_a = combined(adjoints, [(0, 1.0), *((value, -weight) for value, weight in terms)])
        node = between(solve.schedule, start, end, fraction)
        # The random numbers of the evaluation that was at this place on the way forwards.
        with ctx.context.again(step * stages + stages - 1 - stage, y):
            found = evaluated(solve.field, node, at_y, sums.leaves, through_y=True)
            into, rest = product(found, sums.wanted, at_a)
        values[stage + 1] = found.out.detach()
        del found
        adjoints[stage + 1] = torch.zeros_like(adjoint) if into is None else into
        if tableau.b[stage]:
            sums.add(rest, -h * tableau.b[stage])
    return combined(adjoints, [(0, 1.0), *((i + 1, -h * weight) for i, weight in enumerate(tableau.b) if weight)])
