"""Penalized linear models in float64: logistic and least squares, with an L2 or L1 penalty, several targets at once.

Targets are columns, and share the inputs. Every solver minimizes a mean over the samples plus a penalty, so that its
strength does not depend on their number. scikit-learn's ``LogisticRegression(C=1 / (N * strength))`` is the same model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ITERATIONS = 500
_TOLERANCE = 1e-7  # largest entry of the gradient, or of a proximal step; scores have three digits


class Linear(NamedTuple):
    """Weights ``(D, M)`` and biases ``(M,)`` of M linear models."""

    weight: Tensor
    bias: Tensor


def logistic(x: Tensor, targets: Tensor, strength: float, weights: Tensor, l1: bool = False) -> Linear:
    """Return logistic regressions of targets in {0, 1}, ``(N, M)``.

    Args:
        x: ``(N, D)``, float64.
        targets: ``(N, M)``, float64.
        strength: strength of the penalty ``|w|_1`` or ``|w|^2 / 2``; the bias is free.
        weights: of the samples, ``(N, M)``, mean 1.
        l1: which penalty.
    """
    signs = 2 * targets - 1
    count = len(x)

    def slope(model: Linear) -> Linear:
        pull = -signs * torch.sigmoid(-signs * (x @ model.weight + model.bias)) * weights / count
        return Linear(x.T @ pull, pull.sum(0))

    if l1:
        return _proximal(x, targets.shape[1], slope, strength, curvature=float(weights.max()) / 4)

    def value(model: Linear) -> Tensor:
        losses = F.softplus(-signs * (x @ model.weight + model.bias)) * weights
        return losses.sum() / count + strength / 2 * model.weight.square().sum()

    return _lbfgs(x.shape[1], targets, value)


def least_squares(x: Tensor, targets: Tensor, strength: float, l1: bool = False) -> Linear:
    """Return least squares fits of ``(N, M)`` targets, of half the squared error; ridge or lasso."""
    means, offsets = x.mean(0), targets.mean(0)
    centered, wanted = x - means, targets - offsets
    count, width = x.shape
    if l1:

        def slope(model: Linear) -> Linear:
            error = (centered @ model.weight - wanted) / count
            return Linear(centered.T @ error, torch.zeros_like(model.bias))

        weight = _proximal(centered, targets.shape[1], slope, strength, curvature=1.0).weight
    elif width <= count:
        eye = torch.eye(width, dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(centered.T @ centered / count + strength * eye, centered.T @ wanted / count)
    else:  # fewer samples than features: the same solution, in the space of samples
        eye = torch.eye(count, dtype=x.dtype, device=x.device)
        weight = centered.T @ torch.linalg.solve(centered @ centered.T / count + strength * eye, wanted) / count
    return Linear(weight, offsets - means @ weight)


def _lbfgs(width: int, targets: Tensor, value: Callable[[Linear], Tensor]) -> Linear:
    weight = targets.new_zeros(width, targets.shape[1], requires_grad=True)
    bias = targets.new_zeros(targets.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        tolerance_grad=_TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss = value(Linear(weight, bias))
        # Gradients go to these two tensors alone, whatever else would ask for one.
        weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
        return loss

    solver.step(closure)
    return Linear(weight.detach(), bias.detach())


def _proximal(x: Tensor, columns: int, slope: Callable[[Linear], Linear], strength: float, curvature: float) -> Linear:
    """FISTA with restarts (Beck & Teboulle 2009; O'Donoghue & Candes 2015), every column by itself."""
    extended = torch.cat([x, x.new_ones(len(x), 1)], 1)
    rate = len(x) / (curvature * float(torch.linalg.matrix_norm(extended, 2)) ** 2)
    weight, bias = x.new_zeros(x.shape[1], columns), x.new_zeros(columns)
    ahead, momentum = Linear(weight, bias), x.new_ones(columns)
    for _ in range(4 * _ITERATIONS):
        down = slope(ahead)
        step = ahead.weight - rate * down.weight
        new = Linear(step.sign() * (step.abs() - rate * strength).clamp_min(0), ahead.bias - rate * down.bias)
        moved = Linear(new.weight - weight, new.bias - bias)
        uphill = ((ahead.weight - new.weight) * moved.weight).sum(0) + (ahead.bias - new.bias) * moved.bias > 0
        momentum = torch.where(uphill, 1.0, momentum)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        factor = torch.where(uphill, 0.0, (momentum - 1) / following)
        ahead = Linear(new.weight + factor * moved.weight, new.bias + factor * moved.bias)
        weight, bias, momentum = new.weight, new.bias, following
        if max(float(moved.weight.abs().max()), float(moved.bias.abs().max())) < _TOLERANCE:
            break
    return Linear(weight, bias)
