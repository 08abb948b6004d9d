"""Concepts that are computed from the input itself: labels for probes, and judges of changed inputs.

All are functions ``(inputs, targets) -> labels``, for :class:`lightning_bpfree.Concept`. Only those that say so use the
targets, which may be None for all others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bpfree.core.arguments import NonNegativeInt, checked

__all__ = ["closed_loop", "even_digit", "feature_above_mean", "ink", "inside_quotation", "long_sleeves", "slant"]

_TOPS = (0, 2, 3, 4, 6)  # T-shirt, pullover, dress, coat, shirt: what may have sleeves in Fashion-MNIST


def _inked(images: Tensor) -> Tensor:
    """The pixels above the middle between an image's darkest and brightest, booleans (B, H, W)."""
    pixels = images.float().mean(1)
    low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
    return pixels > (low + high) / 2


def closed_loop(inputs: Tensor, _targets: Tensor | None = None) -> Tensor:
    """Whether bright strokes enclose a dark region, booleans (B,), for images (B, C, H, W).

    Strokes join at corners, dark regions do not.

    Example:
        >>> ring = torch.ones(1, 1, 3, 3)
        >>> ring[0, 0, 1, 1] = 0
        >>> closed_loop(ring), closed_loop(torch.eye(3)[None, None])
        (tensor([True]), tensor([False]))
    """
    dark = F.pad((~_inked(inputs)).float(), (1, 1, 1, 1), value=1.0)[:, None]
    outside = torch.zeros_like(dark)
    outside[:, :, 0, 0] = 1.0
    cross = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]], device=dark.device)[None, None]
    while True:
        grown = (F.conv2d(outside, cross, padding=1) > 0).float() * dark
        if torch.equal(grown, outside):
            return ((dark - outside) > 0).flatten(1).any(1)
        outside = grown


def ink(inputs: Tensor, _targets: Tensor | None = None) -> Tensor:
    """The share of bright pixels, (B,), for images (B, C, H, W).

    Example:
        >>> ink(torch.eye(4)[None, None])
        tensor([0.2500])
    """
    return _inked(inputs).float().mean((1, 2))


def slant(inputs: Tensor, _targets: Tensor | None = None) -> Tensor:
    """Lean of the strokes to the right in pixels per pixel up, (B,), from the second moments of the ink.

    Example:
        >>> lean = torch.eye(8).flip(0)[None, None]  # from bottom left to top right
        >>> slant(lean), slant(lean.flip(3))
        (tensor([1.]), tensor([-1.]))
    """
    weight = inputs.float().mean(1)
    weight = weight - weight.amin((1, 2), keepdim=True)
    weight = weight / weight.sum((1, 2), keepdim=True).clamp_min(1e-9)
    down = torch.arange(weight.shape[1], device=weight.device, dtype=weight.dtype)[:, None].expand_as(weight)
    right = torch.arange(weight.shape[2], device=weight.device, dtype=weight.dtype).expand_as(weight)
    down = down - (weight * down).sum((1, 2), keepdim=True)
    right = right - (weight * right).sum((1, 2), keepdim=True)
    return -(weight * down * right).sum((1, 2)) / (weight * down * down).sum((1, 2)).clamp_min(1e-9)


def even_digit(_inputs: Tensor, targets: Tensor | None) -> Tensor:
    """Whether the label is even, booleans (B,): a concept of the targets.

    Raises:
        ValueError: There are no targets.
    """
    if targets is None:
        raise ValueError("targets=None: even_digit looks at the labels; give batches of pairs (inputs, labels).")
    return targets % 2 == 0


def long_sleeves(inputs: Tensor, targets: Tensor | None = None) -> Tensor:
    """Whether a garment has sleeves that hang down at its sides, (B,), for images of Fashion-MNIST (B, 1, 28, 28).

    1.0 if the outer quarters of the lower half are bright, else 0.0. With targets, images that are not tops give NaN.
    """
    bright = _inked(inputs)[:, 14:24]
    sides = torch.cat([bright[:, :, :7], bright[:, :, 21:]], 2).float().mean((1, 2))
    labels = (sides > 0.25).double()
    if targets is None:
        return labels
    tops = torch.isin(targets, torch.tensor(_TOPS, device=targets.device))
    return torch.where(tops, labels, torch.nan)


def inside_quotation(inputs: Tensor, _targets: Tensor | None = None) -> Tensor:
    """Whether the text so far has an odd number of double quotation marks, booleans (B,), for codes (B, T).

    Example:
        >>> inside_quotation(torch.tensor([list(b'say "hi'), list(b'"a" b c')]))
        tensor([ True, False])
    """
    return (inputs == ord('"')).sum(1) % 2 == 1


class feature_above_mean:  # noqa: N801  # used as a function of its arguments
    """Whether a standardized feature is above its mean of 0: a label function for tables (B, D).

    Args:
        feature: Its column, at least 0.

    Example:
        >>> feature_above_mean(1)(torch.tensor([[0.0, 2.0], [3.0, -1.0]]), None)
        tensor([ True, False])
    """

    @checked
    def __init__(self, feature: NonNegativeInt) -> None:
        self.feature = feature

    def __call__(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """Booleans, shape (B,).

        Raises:
            ValueError: The table has no such column.
        """
        if self.feature >= inputs.shape[1]:
            raise ValueError(f"feature={self.feature}: the table has {inputs.shape[1]} columns, numbered from 0.")
        return inputs[:, self.feature] > 0
