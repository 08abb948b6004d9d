"""Solvers of the sampling ODE, written down as plans: linear combinations, and evaluations of the field between them.

Every explicit Runge-Kutta method and every explicit multistep method is such a plan. So one pass forwards runs them
all, and one pass backwards is the exact adjoint of them all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from lightning_bpfree.methods.diffusion_adjoint.schedules import Node, Schedule

Solver = Literal["euler", "midpoint", "heun", "rk4", "dpmpp_2m"]


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method: stage i is at ``c[i]`` of the step, from the slopes before it by ``a[i]``."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]


TABLEAUS: dict[str, Tableau] = {
    "euler": Tableau(((),), (1.0,), (0.0,)),
    "midpoint": Tableau(((), (0.5,)), (0.0, 1.0), (0.0, 0.5)),
    "heun": Tableau(((), (1.0,)), (0.5, 0.5), (0.0, 1.0)),
    "rk4": Tableau(((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.5, 0.5, 1.0)),
}
SOLVERS: tuple[str, ...] = (*TABLEAUS, "dpmpp_2m")


class Combine(NamedTuple):
    """Value ``out`` is a sum of values, each times a number."""

    out: int
    terms: tuple[tuple[int, float], ...]
    step: int


class Evaluate(NamedTuple):
    """Value ``out`` is the field at ``node`` and at the value ``source``."""

    out: int
    source: int
    node: Node
    step: int


Operation = Combine | Evaluate
Evaluation = Callable[[Evaluate, Tensor], Tensor]


class Plan(NamedTuple):
    """A solve in single assignments: value 0 is the start, ``out`` the end; each operation makes one value.

    Attributes:
        operations: in the order of the solve.
        out: the value that is the solution.
        nodes: between the steps.
        unused_after: for each operation, the values that nothing needs after it.
    """

    operations: tuple[Operation, ...]
    out: int
    nodes: tuple[Node, ...]
    unused_after: tuple[tuple[int, ...], ...]

    @property
    def num_steps(self) -> int:
        """Steps of the solve; the grid may have merged two that coincide."""
        return len(self.nodes) - 1

    @property
    def evaluations(self) -> list[Evaluate]:
        """Evaluations of the field, in their order."""
        return [operation for operation in self.operations if isinstance(operation, Evaluate)]

    @property
    def num_evaluations(self) -> int:
        """How many evaluations of the field there are."""
        return len(self.evaluations)


def plan(solver: str, schedule: Schedule, num_steps: int) -> Plan:
    """Return the plan of a solve from noise to data.

    Args:
        solver: ``"euler"`` (DDIM, in the variables of a variance-preserving schedule), ``"midpoint"``, ``"heun"``,
            ``"rk4"``, or ``"dpmpp_2m"`` (DPM-Solver++(2M)), of orders 1, 2, 2, 4 and 2.
        schedule: where the nodes come from.
        num_steps: at least 1.

    Raises:
        ValueError: for an unknown solver, or no steps.

    Examples:
        >>> from lightning_bpfree.methods.diffusion_adjoint.schedules import FlowMatching
        >>> plan("rk4", FlowMatching(), 5).num_evaluations
        20
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r}: choose one of {', '.join(SOLVERS)}.")
    nodes = schedule.grid(num_steps)
    if solver == "dpmpp_2m":
        operations, out = _two_step(nodes)
    else:
        operations, out = _runge_kutta(TABLEAUS[solver], schedule, nodes)
    return Plan(tuple(operations), out, tuple(nodes), _unused_after(operations, out))


def between(schedule: Schedule, start: Node, end: Node, fraction: float) -> Node:
    """Return the node at a fraction of the way; at its ends the nodes themselves, not interpolated ones."""
    if fraction in (0.0, 1.0):
        return start if fraction == 0.0 else end
    return schedule.node(start.rho + fraction * (end.rho - start.rho))


def _runge_kutta(tableau: Tableau, schedule: Schedule, nodes: list[Node]) -> tuple[list[Operation], int]:
    operations: list[Operation] = []
    names, state = itertools.count(1), 0
    for step, (start, end) in enumerate(itertools.pairwise(nodes)):
        h, slopes = end.rho - start.rho, list[int]()
        for row, fraction in zip(tableau.a, tableau.c, strict=True):
            source = state
            if any(row):
                source = next(names)
                terms = [(slope, h * weight) for slope, weight in zip(slopes, row, strict=True) if weight]
                operations.append(Combine(source, ((state, 1.0), *terms), step))
            slopes.append(next(names))
            operations.append(Evaluate(slopes[-1], source, between(schedule, start, end, fraction), step))
        terms = [(slope, h * weight) for slope, weight in zip(slopes, tableau.b, strict=True) if weight]
        before, state = state, next(names)
        operations.append(Combine(state, ((before, 1.0), *terms), step))
    return operations, state


def _two_step(nodes: list[Node]) -> tuple[list[Operation], int]:
    """DPM-Solver++(2M): steps in log(alpha / sigma), with data predictions extrapolated from the last two nodes."""
    operations: list[Operation] = []
    names, state, data, last = itertools.count(1), 0, 0, math.inf
    for step, (start, end) in enumerate(itertools.pairwise(nodes)):
        slope, before, data = next(names), data, next(names)
        operations.append(Evaluate(slope, state, start, step))
        # Both kinds of schedule have x0 = scale-free y - rho * dy/drho, and y' = decay * y + (1 - decay) * x0.
        operations.append(Combine(data, ((state, 1.0), (slope, -start.rho)), step))
        decay, h = end.rho / start.rho, _half_log_snr(end) - _half_log_snr(start)
        # The first step, and one to data without noise (infinitely long), are of the first order.
        older = 0.0 if step == 0 or math.isinf(h) or math.isinf(last) else -0.5 * h / last
        terms = [(state, decay), (data, (1 - decay) * (1 - older)), (before, (1 - decay) * older)]
        state, last = next(names), h
        operations.append(Combine(state, tuple(term for term in terms if term[1]), step))
    return operations, state


def _half_log_snr(node: Node) -> float:
    if node.alpha == 0 or node.sigma == 0:
        return math.inf if node.sigma == 0 else -math.inf
    return math.log(node.alpha / node.sigma)


def _sources(operation: Operation) -> tuple[int, ...]:
    if isinstance(operation, Evaluate):
        return (operation.source,)
    return tuple(value for value, _ in operation.terms)


def _unused_after(operations: Sequence[Operation], out: int) -> tuple[tuple[int, ...], ...]:
    seen, unused = {out}, list[tuple[int, ...]]()
    for operation in reversed(operations):
        own = (operation.out, *_sources(operation))
        unused.append(tuple(value for value in dict.fromkeys(own) if value not in seen))
        seen.update(own)
    return tuple(reversed(unused))


def combined(values: dict[int, Tensor], terms: Sequence[tuple[int, float]]) -> Tensor:
    """Return a sum of values, each times a number."""
    (first, weight), *rest = terms
    total = values[first] if weight == 1.0 else values[first] * weight
    for value, factor in rest:
        total = total.add(values[value], alpha=factor)
    return total


def run(solve: Plan, evaluate: Evaluation, start: Tensor) -> Tensor:
    """Return the solution of a plan.

    Args:
        solve: the plan.
        evaluate: from an evaluation of the plan and its source to the field there.
        start: value 0, of any shape.
    """
    values = {0: start}
    for operation, unused in zip(solve.operations, solve.unused_after, strict=True):
        if isinstance(operation, Combine):
            values[operation.out] = combined(values, operation.terms)
        else:
            values[operation.out] = evaluate(operation, values[operation.source])
        for value in unused:
            del values[value]
    return values[solve.out]
