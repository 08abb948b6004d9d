"""Differentiable masks over positions: values, threshold crossings, and numbers of kept positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import OpenFraction, PositiveFloat, PositiveInt, checked

THRESHOLD = 0.1
_FLOOR = 1e-8  # keeps the Gaussian defined where its spread crosses zero


@checked
def gaussian_mask(positions: Tensor, spread: Tensor, mean: float = 0.0) -> Tensor:
    """Return ``exp(-0.5 (x - mean)² / spread²)`` at each position, in (0, 1].

    Args:
        positions: any shape.
        spread: standard deviation, a scalar tensor.
        mean: position of the maximum.

    Examples:
        >>> gaussian_mask(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor(1.0))
        tensor([0.6065, 1.0000, 0.6065])

    References:
        D. W. Romero et al., "FlexConv: Continuous Kernel Convolutions with Differentiable Kernel Sizes", 2021,
        arXiv 2110.08059.
    """
    return torch.exp(-0.5 * (positions - mean) ** 2 / (spread**2 + _FLOOR))


@checked
def gaussian_root(spread: Tensor, threshold: OpenFraction = THRESHOLD) -> Tensor:
    """Return the distance from the mean at which :func:`gaussian_mask` falls to the threshold; differentiable.

    Args:
        spread: standard deviation.
        threshold: in (0, 1).

    Examples:
        >>> gaussian_root(torch.tensor(0.5), 0.1)
        tensor(1.0730)
    """
    return torch.sqrt((spread**2 + _FLOOR) * (-2 * math.log(threshold)))


@checked
def sigmoid_mask(positions: Tensor, edge: Tensor, sharpness: PositiveFloat = 25.0) -> Tensor:
    """Return ``sigmoid(sharpness (edge - x))`` at each position: near 1 below the edge, near 0 above it.

    Args:
        positions: any shape, usually in [0, 1].
        edge: position where the mask is 0.5, a scalar tensor.
        sharpness: slope, above 0.

    Examples:
        >>> sigmoid_mask(torch.tensor([0.0, 0.5, 1.0]), torch.tensor(0.5), 10.0)
        tensor([0.9933, 0.5000, 0.0067])
    """
    return torch.sigmoid(sharpness * (edge - positions))


@checked
def sigmoid_root(edge: Tensor, sharpness: PositiveFloat = 25.0, threshold: OpenFraction = THRESHOLD) -> Tensor:
    """Return the position at which :func:`sigmoid_mask` falls to the threshold; differentiable.

    Args:
        edge: position where the mask is 0.5.
        sharpness: slope, above 0.
        threshold: in (0, 1).

    Examples:
        >>> sigmoid_root(torch.tensor(0.5), 25.0, 0.1)
        tensor(0.5879)
    """
    return edge + math.log(1 / threshold - 1) / sharpness


@checked
def thresholded(mask: Tensor, threshold: OpenFraction = THRESHOLD) -> Tensor:
    """Return a mask with exact zeros below the threshold.

    Args:
        mask: values in [0, 1].
        threshold: in (0, 1).

    Examples:
        >>> thresholded(torch.tensor([0.05, 0.2, 1.0]))
        tensor([0.0000, 0.2000, 1.0000])
    """
    return mask * (mask >= threshold)


@checked
def unit_positions(count: PositiveInt) -> Tensor:
    """Return the positions of ``count`` units on [0, 1]: the centers of as many equal cells.

    With cells, a mask with root ``r`` keeps ``round(r * count)`` units, so that ``r * count`` is their differentiable
    number, at most 0.5 off.

    Args:
        count: how many, at least 1.

    Examples:
        >>> unit_positions(4)
        tensor([0.1250, 0.3750, 0.6250, 0.8750])
    """
    return (torch.arange(count) + 0.5) / count


@checked
def tap_positions(count: PositiveInt) -> Tensor:
    """Return the positions of the taps of a kernel on [-1, 1].

    Args:
        count: how many, odd; one tap is at 0.

    Raises:
        ValueError: for an even number: a centered kernel has a middle tap.

    Examples:
        >>> tap_positions(5)
        tensor([-1.0000, -0.5000,  0.0000,  0.5000,  1.0000])
    """
    if count % 2 == 0:
        raise ValueError(f"tap_positions: count={count}: give an odd number, so that the kernel has a middle tap.")
    return torch.linspace(-1, 1, count) if count > 1 else torch.zeros(1)


def clamped(x: Tensor, low: float, high: float) -> Tensor:
    """Return ``x`` clamped to [low, high], with the derivative 1 outside as well.

    A size beyond its range still gets the budget's gradient, which leads it back.

    Examples:
        >>> x = torch.tensor(1.2, requires_grad=True)
        >>> y = clamped(x, 0.0, 1.0)
        >>> y.backward()
        >>> y.item(), x.grad.item()
        (1.0, 1.0)
    """
    return x + (x.clamp(low, high) - x).detach()
