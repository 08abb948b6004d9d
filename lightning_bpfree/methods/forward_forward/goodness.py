"""Goodness of activities, the loss on it, and the rescaling of activities between blocks (Forward-Forward)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bpfree.core.params import widen

Goodness = Literal["sum", "mean"]
Length = Literal["rms", "unit", "none"]


def goodness(activity: Tensor, kind: Goodness = "sum") -> Tensor:
    """Return the sum or the mean of squares of every sample's activities.

    Args:
        activity: shape ``(B, ...)``: units, channels and places, or tokens and features.
        kind: ``"sum"`` or ``"mean"``.

    Returns:
        Shape ``(B,)``, at least float32.

    Examples:
        >>> goodness(torch.tensor([[1.0, 2.0]])), goodness(torch.tensor([[1.0, 2.0]]), "mean")
        (tensor([5.]), tensor([2.5000]))
    """
    flat = widen(activity).flatten(1)
    total: Tensor = _SumOfSquares.apply(flat)
    if kind == "mean":
        total = total / flat.shape[1]
    return total


class _SumOfSquares(torch.autograd.Function):
    """Keeps no squares in memory and differentiates by one product: goodness is computed at every block's output."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor) -> Tensor:
        ctx.save_for_backward(flat)
        total: Tensor = torch.linalg.vector_norm(flat, dim=1).square()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (flat,) = ctx.saved_tensors
        made: Tensor = flat * (2 * grad).unsqueeze(1)
        return made


def rescaled(activity: Tensor, length: Length = "rms") -> Tensor:
    """Return every sample's activities at the same length, so that what follows cannot read the goodness.

    No mean is subtracted: that would be ``nn.LayerNorm``, which changes the direction too.

    Args:
        activity: shape ``(B, ...)``.
        length: ``"rms"`` for a mean square of 1, ``"unit"`` for a Euclidean length of 1, ``"none"`` for no change.

    Examples:
        >>> rescaled(torch.tensor([[3.0, 4.0]]), "unit")
        tensor([[0.6000, 0.8000]])
    """
    if length == "none" or not activity.is_floating_point():  # numbers of tokens have no length
        return activity
    flat = widen(activity).flatten(1)
    size = torch.linalg.vector_norm(flat, dim=1)
    if length == "rms":
        size = size / flat.shape[1] ** 0.5
    size = size.clamp_min(torch.finfo(size.dtype).tiny)  # silent units stay silent
    made: Tensor = (activity / size.view(-1, *[1] * (activity.dim() - 1))).to(activity.dtype)
    return made


def contrast(good: Tensor, threshold: float, temperature: float = 1.0) -> Tensor:
    """Return the loss that raises the first half of ``good`` above a threshold and lowers the second half below it.

    It is ``softplus((threshold - g) / temperature)`` for positive and ``softplus((g - threshold) / temperature)`` for
    negative samples, the mean over all: cross-entropy where ``sigmoid((g - threshold) / temperature)`` is the
    probability of being positive. Its derivative with respect to ``g`` of a positive sample is ``-(1 - p) / 2B``.

    Args:
        good: goodness of ``B`` positive, then of ``B`` negative samples, shape ``(2 B,)``.
        threshold: in units of the goodness.
        temperature: in units of the goodness, > 0.

    Examples:
        >>> contrast(torch.tensor([1.0, 1.0]), threshold=1.0)
        tensor(0.6931)
    """
    above = (good - threshold) / temperature
    positive, negative = above.chunk(2)
    return F.softplus(torch.cat([-positive, negative])).mean()
