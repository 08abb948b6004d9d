"""Backward passes of a solve: what each rule stores, and what it evaluates again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_bpfree.core.recompute_context import Autocast, Draws
from lightning_bpfree.methods.diffusion_adjoint.plans import (
    TABLEAUS,
    Combine,
    Evaluate,
    Plan,
    Tableau,
    between,
    combined,
    run,
)
from lightning_bpfree.methods.diffusion_adjoint.schedules import Node, Schedule

Gradient = Literal["exact_adjoint", "adjoint", "checkpoint", "direct", "truncated"]

Field = Callable[[Node, Tensor, Sequence[Tensor]], Tensor]
"""The right-hand side of ``dy/drho``: from a node, y, and the tensors whose gradients are wanted beside y's."""


class Solve(NamedTuple):
    """A solve and how it is differentiated.

    Attributes:
        plan: the operations.
        schedule: where times between nodes come from.
        field: the right-hand side.
        solver: name of the method.
        last_steps: so many steps at the end are differentiated; None for all.
    """

    plan: Plan
    schedule: Schedule
    field: Field
    solver: str
    last_steps: int | None = None

    def counts(self, step: int) -> bool:
        """Return whether a step is differentiated."""
        return self.last_steps is None or step >= self.plan.num_steps - self.last_steps


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


class _Context:
    """What an evaluation depends on beside its inputs, for every evaluation of a solve.

    Args:
        tensor: on the device of the solve.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.autocast = Autocast.now(tensor.device.type)
        self._before = Draws.now(tensor)
        self._draws: list[Draws] | None = []

    def note(self, tensor: Tensor) -> None:
        """Remember the random streams in front of the next evaluation."""
        if self._draws is not None:
            self._draws.append(Draws.now(tensor))

    def close(self, tensor: Tensor) -> None:
        """Forget the streams of a field that draws nothing, as nearly all do not."""
        if Draws.now(tensor).equals(self._before):
            self._draws = None

    @contextlib.contextmanager
    def again(self, index: int, tensor: Tensor) -> Iterator[None]:
        """Evaluate as in the evaluation with this number."""
        with self.autocast.again(), torch.enable_grad():
            if self._draws is None:
                yield
                return
            with Draws.now(tensor).kept():
                self._draws[index].restore()
                yield


class _Sums:
    """Gradients of the further tensors, summed over evaluations in single precision at least.

    Args:
        tensors: as saved.
        wanted: for each, whether its gradient is.
    """

    def __init__(self, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        # Leaves of their own for what has a graph behind it; parameters stay themselves, for the network holds them.
        self.leaves = [t if t.is_leaf else t.detach().requires_grad_(t.requires_grad) for t in tensors]
        self.wanted = [index for index, want in enumerate(wanted) if want]
        self.sums: list[Tensor | None] = [None] * len(tensors)

    def add(self, grads: Sequence[Tensor | None], factor: float) -> None:
        """Add ``factor`` times the gradients of one evaluation."""
        totals, further = list[Tensor](), list[Tensor]()
        for index, grad in zip(self.wanted, grads, strict=True):
            if grad is None:
                continue
            total = self.sums[index]
            grad = grad if grad.dtype == torch.float64 else grad.float()
            if total is None:
                self.sums[index] = grad * factor
            else:
                totals.append(total)
                further.append(grad)
        if totals:
            torch._foreach_add_(totals, further, alpha=factor)  # all weights in a few kernels

    def results(self) -> list[Tensor | None]:
        """Return the sums in the tensors' types; None where nothing arrived."""
        pairs = zip(self.sums, self.leaves, strict=True)
        return [None if total is None else total.to(leaf.dtype) for total, leaf in pairs]


def _product(
    solve: Solve, node: Node, y: Tensor, sums: _Sums, cotangent: Tensor, through_y: bool
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Return the field at a node, and the products of a cotangent with its derivatives by y and by the tensors."""
    y = y.detach().requires_grad_(through_y)
    out = solve.field(node, y, sums.leaves)
    targets = [*([y] if through_y else []), *(sums.leaves[index] for index in sums.wanted)]
    if not targets or not out.requires_grad:
        return out.detach(), None, [None] * len(sums.wanted)
    grads = torch.autograd.grad(out, targets, cotangent.to(out.dtype), allow_unused=True)
    return (out.detach(), grads[0], list(grads[1:])) if through_y else (out.detach(), None, list(grads))


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "an adjoint solve is differentiable once: its backward pass keeps no graph. For create_graph=True and "
            "second derivatives use gradient='direct'."
        )


class DiscreteAdjoint(torch.autograd.Function):
    """The chain rule through a plan, one evaluation at a time: the gradient of the solver that ran, exactly.

    Kept are the inputs of the evaluations, each as large as y. An evaluation is repeated once, with its graph, which
    goes before the next one comes. Starting point, conditioning and parameters are inputs of the node, so that
    everything which listens to gradients (DDP, hooks) hears of all of them.
    """

    @staticmethod
    def forward(ctx: Any, solve: Solve, start: Tensor, *tensors: Tensor) -> Tensor:
        """Return the solution."""
        states, context = list[Tensor](), _Context(start)

        def evaluate(at: Evaluate, y: Tensor) -> Tensor:
            if solve.counts(at.step):
                states.append(y)
                context.note(y)
            return solve.field(at.node, y, tensors)

        out = run(solve.plan, evaluate, start)
        context.close(start)
        ctx.solve, ctx.context, ctx.num_tensors = solve, context, len(tensors)
        ctx.save_for_backward(*tensors, *states)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradients of the starting point and of the further tensors."""
        _refuse_second_derivatives()
        solve: Solve = ctx.solve
        saved = ctx.saved_tensors
        states = list(saved[ctx.num_tensors :])
        sums = _Sums(saved[: ctx.num_tensors], ctx.needs_input_grad[2:])
        to_start = bool(ctx.needs_input_grad[1]) and solve.last_steps is None
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
            with ctx.context.again(len(states), state):
                through_y = operation.source != 0 or to_start
                _, into, rest = _product(solve, operation.node, state, sums, above, through_y)
            sums.add(rest, 1.0)
            del rest  # as large as all weights: not beside the next evaluation
            if into is not None:
                _add(cotangents, operation.source, into)
        return (None, cotangents.get(0) if to_start else None, *sums.results())


def _add(cotangents: dict[int, Tensor], value: int, more: Tensor | None) -> None:
    # Never in place: one tensor may stand for several values.
    if more is not None:
        cotangents[value] = cotangents[value] + more if value in cotangents else more


class ContinuousAdjoint(torch.autograd.Function):
    """The augmented ODE of AdjointDPM, solved from data to noise by the method that solved the ODE itself.

    ``da/drho = -a df/dy`` and, for every further tensor, ``dg/drho = -a df/dtensor``; at each node y is put back to
    the state of the forward solve, as torchdiffeq does, so that it does not drift. The result is the gradient of the
    ODE rather than of the solver: it differs from the exact one by a term of the solver's order.
    """

    @staticmethod
    def forward(ctx: Any, solve: Solve, start: Tensor, *tensors: Tensor) -> Tensor:
        """Return the solution."""
        states, context = list[Tensor](), _Context(start)
        firsts = {operation.step: index for index, operation in reversed(list(enumerate(_evaluations(solve.plan))))}
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
        _refuse_second_derivatives()
        solve: Solve = ctx.solve
        tableau, nodes, saved = TABLEAUS[solve.solver], solve.plan.nodes, ctx.saved_tensors
        states = saved[ctx.num_tensors :]
        sums = _Sums(saved[: ctx.num_tensors], ctx.needs_input_grad[2:])
        adjoint = grad
        for step in reversed(range(solve.plan.num_steps)):
            path = (nodes[step + 1], nodes[step])
            adjoint = _step_back(ctx, tableau, path, step, states[step + 1], adjoint, sums)
        return (None, adjoint if ctx.needs_input_grad[1] else None, *sums.results())


def _evaluations(solve: Plan) -> list[Evaluate]:
    return [operation for operation in solve.operations if isinstance(operation, Evaluate)]


def _step_back(
    ctx: Any, tableau: Tableau, path: tuple[Node, Node], step: int, y: Tensor, adjoint: Tensor, sums: _Sums
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
            slope, into, rest = _product(solve, node, at_y, sums, at_a, through_y=True)
        values[stage + 1] = slope
        adjoints[stage + 1] = torch.zeros_like(adjoint) if into is None else into
        if tableau.b[stage]:
            sums.add(rest, -h * tableau.b[stage])
    return combined(adjoints, [(0, 1.0), *((i + 1, -h * weight) for i, weight in enumerate(tableau.b) if weight)])
