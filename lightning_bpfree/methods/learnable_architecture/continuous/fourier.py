"""Resizing of signals in the Fourier domain: a low-pass mask, an exact crop of the spectrum, preserved amplitudes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import PositiveInt, PositiveInts, checked

MATRIX_LIMIT = 128
"""Sides up to which a matrix product is used in place of an FFT."""


def check_even(owner: str, side: int) -> None:
    """Raise ValueError for an odd side: the spectrum of an even one has its highest frequency once.

    Args:
        owner: for the message.
        side: length of the axis.
    """
    if side % 2:
        raise ValueError(
            f"{owner}: a side of {side}: the Fourier crop takes even sides. Pad the input to {side + 1}, or leave "
            "'resolution' out of dims."
        )


def _resized_by_fft(x: Tensor, size: int, mask: Tensor | None) -> Tensor:
    """Resize the last axis of ``x``; ``mask`` has a value for each of the ``n // 2 + 1`` frequencies."""
    n = x.shape[-1]
    spectrum = torch.fft.rfft(x)
    if mask is not None:
        spectrum = spectrum * mask
    if size < n:  # the new highest frequency is folded: a real signal cannot hold its phase, so that it is left out
        spectrum = torch.nn.functional.pad(spectrum[..., : size // 2], (0, 1))
    elif size > n:  # the old highest frequency becomes a pair
        weights = torch.ones(n // 2 + 1, dtype=x.dtype, device=x.device)
        weights[-1] = 0.5
        spectrum = torch.nn.functional.pad(spectrum * weights, (0, (size - n) // 2))
    resized: Tensor = torch.fft.irfft(spectrum, n=size) * (size / n)
    return resized


def resize_matrix(n: int, size: int, mask: Tensor | None = None, like: Tensor | None = None) -> Tensor:
    """Return the matrix of shape (size, n) that resizes a signal of ``n`` samples; differentiable in the mask.

    Args:
        n: samples, even.
        size: samples of the result, even.
        mask: a value for each of the ``n // 2 + 1`` frequencies.
        like: tensor whose type and device the matrix has.
    """
    like = torch.zeros(()) if like is None else like
    eye = torch.eye(n, dtype=like.dtype, device=like.device)
    return _resized_by_fft(eye, size, mask).transpose(0, 1)


def resize_axis(x: Tensor, dim: int, size: int, mask: Tensor | None = None) -> Tensor:
    """Return ``x`` resized along one axis: mask, crop or zero-padding of its spectrum.

    Args:
        x: the signal.
        dim: axis.
        size: its new length, even.
        mask: a value for each of the ``n // 2 + 1`` frequencies; None: all 1.
    """
    n = x.shape[dim]
    if size == n and mask is None:
        return x
    moved = x.movedim(dim, -1)
    if n > MATRIX_LIMIT or x.dtype in (torch.float16, torch.bfloat16):
        out = _resized_by_fft(moved.float() if x.dtype != torch.float64 else moved, size, mask).to(x.dtype)
    else:
        out = moved @ resize_matrix(n, size, mask, x).transpose(0, 1)
    return out.movedim(-1, dim)


@checked
def fourier_resize(x: Tensor, size: PositiveInts) -> Tensor:
    """Return signals resized to ``size`` along their last axes, by cropping or zero-padding the spectrum.

    Amplitudes are preserved: a constant signal stays the same constant. Frequencies that the new size cannot represent
    are dropped, and so is the highest one of a smaller result, whose phase a real signal cannot represent.

    Args:
        x: shape (..., *sides), with even sides.
        size: new lengths of the last axes, even.

    Raises:
        ValueError: for an odd side or size.

    Examples:
        >>> t = torch.arange(16) / 16
        >>> small = fourier_resize(torch.cos(2 * torch.pi * t), [8])
        >>> torch.allclose(small, torch.cos(2 * torch.pi * t[::2]), atol=1e-6)
        True

    References:
        R. Riad et al., "Learning Strides in Convolutional Neural Networks", 2022, arXiv 2202.01653.
    """
    for dim, new in zip(range(-len(size), 0), size, strict=True):
        check_even("fourier_resize", x.shape[dim])
        check_even("fourier_resize", new)
        x = resize_axis(x, dim, new)
    return x


@checked
def frequency_positions(n: PositiveInt) -> Tensor:
    """Return the ``n // 2 + 1`` frequencies of a real signal of ``n`` samples, relative to the highest one.

    Args:
        n: samples, even.

    Examples:
        >>> frequency_positions(8)
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000])
    """
    check_even("frequency_positions", n)
    return torch.arange(n // 2 + 1) / (n // 2)
