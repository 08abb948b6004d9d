"""Linear mode connectivity: whether the loss increases on the straight line between two sets of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import Fraction, Range, checked
from lightning_bpfree.core.params import ParameterSlots, Params
from lightning_bpfree.core.replay.tensor_copies import Buffers


class Barrier(NamedTuple):
    """The loss between two ends, and by how much it exceeds them.

    Args:
        alphas: weights of the first end, from 0 to 1.
        values: the loss at ``alpha a + (1 - alpha) b``.
        barrier: the largest excess over the straight line between the losses of the ends; 0 if there is none.
        barrier_from_mean: the largest loss minus the mean loss of the ends (Frankle et al. 2020).
    """

    alphas: list[float]
    values: list[float]
    barrier: float
    barrier_from_mean: float


@checked
def interpolate(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: Fraction) -> Params:
    """Return ``alpha a + (1 - alpha) b``; exactly ``b`` at 0 and exactly ``a`` at 1.

    Args:
        a: named tensors.
        b: tensors of the same names and shapes.
        alpha: the share of ``a``.

    Raises:
        ValueError: for different names.

    Examples:
        >>> interpolate({"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}, 0.25)["w"]
        tensor([2.5000])
    """
    if a.keys() != b.keys():
        raise ValueError(f"The ends have different names: {', '.join(sorted(a.keys() ^ b.keys()))}.")
    return {name: torch.lerp(b[name], tensor, alpha) for name, tensor in a.items()}


@checked
def loss_barrier(
    evaluate: Callable[[Params], float | Tensor],
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    num_points: Annotated[int, Range(ge=3)] = 11,
) -> Barrier:
    """Return the loss along the straight line from ``b`` to ``a``.

    For networks with running statistics, use ``batch_statistics=True`` in :func:`module_loss`: the statistics of either
    end are wrong for points in between.

    Args:
        evaluate: the loss (or an error; smaller must be better) as a function of named tensors.
        a: the parameters of one end; for evolution strategies, the mean.
        b: the parameters of the other end.
        num_points: number of points to measure, ends included, at least 3.

    Raises:
        ValueError: for fewer points, or different names.

    Examples:
        >>> one, two = {"w": torch.tensor(-1.0)}, {"w": torch.tensor(1.0)}
        >>> loss_barrier(lambda p: (p["w"] ** 2 - 1) ** 2, one, two, num_points=3).barrier
        1.0

    References:
        J. Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020, arXiv 1912.05671.
    """
    alphas = [i / (num_points - 1) for i in range(num_points)]
    values = [float(evaluate(interpolate(a, b, alpha))) for alpha in alphas]
    at_b, at_a = values[0], values[-1]
    excess = [value - (alpha * at_a + (1 - alpha) * at_b) for alpha, value in zip(alphas, values, strict=True)]
    return Barrier(alphas, values, max(excess), max(values) - (at_a + at_b) / 2)


@checked
def module_loss(
    module: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    batch_statistics: bool = False,
) -> Callable[[Params], float]:
    """Return the mean of ``loss(module, batch)`` over batches, as a function of the module's parameters.

    The module keeps its own parameters, buffers and mode. In evaluation mode, BatchNorm uses the module's running
    statistics for all parameters.

    Args:
        module: the module; it computes with the parameters passed to the returned function.
        batches: iterated at each call, with equal weight per batch: a list, or a loader without shuffling.
        loss: returns a scalar for one batch.
        batch_statistics: evaluate in training mode, so that BatchNorm uses the statistics of the batch; for modules
            without dropout.

    Examples:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> evaluate = module_loss(net, [torch.ones(4, 1)], lambda net, x: net(x).mean())
        >>> evaluate({"weight": torch.full((1, 1), 3.0)})
        3.0
    """
    slots = ParameterSlots(module)

    def evaluate(params: Params) -> float:
        modes = [(part, part.training) for part in module.modules()]
        buffers = Buffers(module)
        buffers.remember()
        try:
            module.train(batch_statistics)
            with torch.no_grad(), slots.replaced(params), buffers.copies():
                losses = [float(loss(module, batch)) for batch in batches]
        finally:
            for part, mode in modes:
                part.training = mode
        if not losses:
            raise ValueError("batches is empty: give a list or a loader, not an iterator that is used up.")
        return sum(losses) / len(losses)

    return evaluate
