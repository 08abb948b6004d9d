"""Evaluations of a solver's vector field: their context, their graphs, and vector-Jacobian products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_bpfree.core.recompute_context import Autocast, Draws
from lightning_bpfree.methods.diffusion_adjoint.plans import Plan
from lightning_bpfree.methods.diffusion_adjoint.schedules import Node, Schedule

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
        keep_last: whether the discrete adjoint keeps the graph of the last evaluation, which a backward pass needs
            first, instead of evaluating it again.
    """

    plan: Plan
    schedule: Schedule
    field: Field
    solver: str
    last_steps: int | None = None
    keep_last: bool = False

    def counts(self, step: int) -> bool:
        """Return whether a step is differentiated."""
        return self.last_steps is None or step >= self.plan.num_steps - self.last_steps


class Context:
    """The context of every evaluation of a solve, apart from its inputs.

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


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return leaves for tensors with a graph behind them; parameters stay themselves, for the network holds them."""
    return [t if t.is_leaf else t.detach().requires_grad_(t.requires_grad) for t in tensors]


class Sums:
    """Gradients of the further tensors, summed over evaluations in single precision at least.

    Args:
        tensors: as saved.
        wanted: for each, whether its gradient is.
    """

    def __init__(self, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        self.leaves = leaves(tensors)
        self.wanted = [index for index, want in enumerate(wanted) if want]
        self.sums: list[Tensor | None] = [None] * len(tensors)

    def add(self, grads: Sequence[Tensor | None], factor: float) -> None:
        """Add ``factor`` times the gradients of one evaluation."""
        found = {
            index: grad if grad.dtype == torch.float64 else grad.float()
            for index, grad in zip(self.wanted, grads, strict=True)
            if grad is not None
        }
        further = [index for index in found if self.sums[index] is not None]
        if further:  # all weights in a few kernels
            totals = cast("list[Tensor]", [self.sums[index] for index in further])
            torch._foreach_add_(totals, [found[index] for index in further], alpha=factor)
        if len(further) < len(found):
            # Copies, for the engine may give one tensor for several gradients.
            first = [index for index in found if self.sums[index] is None]
            for index, total in zip(first, torch._foreach_mul([found[index] for index in first], factor), strict=True):
                self.sums[index] = total

    def results(self) -> list[Tensor | None]:
        """Return the sums, which autograd casts to the tensors' types; None where nothing arrived."""
        return self.sums


class Evaluated(NamedTuple):
    """An evaluation of the field with its graph.

    Attributes:
        y: a leaf, where the field was evaluated.
        leaves: the tensors, apart from y, whose gradients are needed, as they are in the graph.
        out: the field there.
    """

    y: Tensor
    leaves: list[Tensor]
    out: Tensor


def evaluated(field: Field, node: Node, y: Tensor, tensors: list[Tensor], through_y: bool) -> Evaluated:
    """Return the field at a node and a state, with its own graph.

    Args:
        field: the right-hand side.
        node: where.
        y: the state.
        tensors: leaves, the inputs of the field apart from y.
        through_y: whether a gradient by the state is wanted.
    """
    y = y.detach().requires_grad_(through_y)
    return Evaluated(y, tensors, field(node, y, tensors))


def product(of: Evaluated, wanted: Sequence[int], cotangent: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the products of a cotangent with the field's derivatives by y and by tensors; the graph goes.

    Args:
        of: the evaluation.
        wanted: numbers of its further tensors.
        cotangent: shaped as the field.
    """
    through_y = of.y.requires_grad
    targets = [*([of.y] if through_y else []), *(of.leaves[index] for index in wanted)]
    if not targets or not of.out.requires_grad:
        return None, [None] * len(wanted)
    grads = torch.autograd.grad(of.out, targets, cotangent.to(of.out.dtype), allow_unused=True)
    return (grads[0], list(grads[1:])) if through_y else (None, list(grads))


def refuse_second_derivatives() -> None:
    """Raise RuntimeError under ``create_graph=True``."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "an adjoint solve is differentiable once: its backward pass keeps no graph. For create_graph=True and "
            "second derivatives use gradient='direct'."
        )
