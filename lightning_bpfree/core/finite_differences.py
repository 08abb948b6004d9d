"""Finite differences of a loss along directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import PositiveFloat, checked
from lightning_bpfree.core.combination import Combination
from lightning_bpfree.core.directions import Directions
from lightning_bpfree.core.params import Params, widen

LossFunction = Callable[[Params], Tensor]


@checked
def difference_quotients(
    loss_fn: LossFunction,
    params: Mapping[str, Tensor],
    directions: Directions,
    sigma: PositiveFloat,
    *,
    base_loss: Tensor | None = None,
    ks: Sequence[int] | None = None,
    combination: Combination | None = None,
) -> Tensor:
    """Return finite differences of the loss along directions, shape ``(len(ks),)``.

    Args:
        loss_fn: the loss as a function of named parameters; it need not be differentiable.
        params: the point, as detached tensors; they are not modified.
        directions: the directions.
        sigma: length of the step in units of one standard deviation of the directions, > 0.
        base_loss: the loss at ``params``; selects forward differences ``(L(p + sigma v) - L(p)) / sigma``, one
            evaluation per direction. None selects central differences
            ``(L(p + sigma v) - L(p - sigma v)) / (2 sigma)``, two evaluations.
        ks: indices of the directions; None for all.
        combination: adds up directions and slopes as they are computed, if it can.
    """
    slopes = []
    with torch.no_grad():
        for k in range(len(directions)) if ks is None else ks:
            moved, side = directions.moved(k, params, sigma), sigma
            ahead = loss_fn(moved)
            if base_loss is None:
                for name, param in params.items():  # p - sigma v = 2 p - (p + sigma v), in the same memory
                    moved[name].neg_().add_(param, alpha=2)
                slope, side = (ahead - loss_fn(moved)) / (2 * sigma), -sigma
            else:
                slope = (ahead - base_loss) / sigma
            slopes.append(slope)
            if combination is not None and combination.at_once:
                for name, param in params.items():
                    moved[name].sub_(param)  # side * v, as rounding has left it
                combination.add(slope / side, moved)
    return widen(torch.stack(slopes)) if slopes else torch.zeros(0)
