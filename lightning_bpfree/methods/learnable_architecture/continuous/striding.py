"""Downsampling by learned strides, in the Fourier domain."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import PositiveFloat, PositiveInts, Range, checked
from lightning_bpfree.methods.learnable_architecture.continuous.fourier import check_even, resize_axis
from lightning_bpfree.methods.learnable_architecture.sizes.axes import FrequencyAxis
from lightning_bpfree.methods.learnable_architecture.sizes.masks import clamped

Stride = Annotated[float, Range(ge=1)]


class DiffStride(nn.Module):
    """Downsamples with learned strides: a ramp mask over frequencies, and a crop of the spectrum to its nonzero part.

    Use it instead of a pooling layer, or after a convolution instead of its stride. The output has about
    ``side / stride + 2 ramp`` samples along each axis, and never more than the input; amplitudes are preserved. Strides
    are at least ``side / (side - ramp)``, so that the ramp has a slope and the stride a gradient.

    Args:
        stride: initial stride, one for both axes or one for each, at least 1; any real number.
        ramp: frequencies over which the mask falls from 1 to 0, above 0.
        dims: number of axes, 1 for sequences (B, C, L), 2 for images (B, C, H, W).

    Raises:
        ValueError: for a stride below 1, and in the forward pass for odd sides.

    Examples:
        >>> DiffStride((2.0, 4.0))(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 3, 40, 24])

    References:
        R. Riad et al., "Learning Strides in Convolutional Neural Networks", 2022, arXiv 2202.01653.
    """

    @checked
    def __init__(
        self,
        stride: Stride | tuple[Stride, Stride] = 2.0,
        ramp: PositiveFloat = 4.0,
        dims: Literal[1, 2] = 2,
    ) -> None:
        super().__init__()
        given = list(stride) if isinstance(stride, list | tuple) else [stride] * dims
        if len(given) != dims:
            raise ValueError(f"DiffStride: stride={stride}: give one number, or {dims}, for dims={dims}.")
        self.stride = nn.Parameter(torch.tensor([float(s) for s in given]))
        self.ramp, self.dims = ramp, dims

    def forward(self, x: Tensor) -> Tensor:
        """Return the downsampled signal."""
        sides = x.shape[-self.dims :]
        lows = [n / (n - self.ramp) if n > self.ramp else 1.0 for n in sides]
        edges = []
        for d, n in enumerate(sides):
            check_even("DiffStride", n)
            stride = clamped(self.stride[d], lows[d], max(n / 2, lows[d]))
            edges.append(n / (2 * stride))
        for d, (n, edge, stop) in enumerate(zip(sides, edges, torch.stack(edges).tolist(), strict=True)):
            size = min(n, 2 * math.ceil(stop + self.ramp - 1e-4))
            at = torch.arange(n // 2 + 1, device=x.device, dtype=x.dtype)
            mask = ((self.ramp + edge.to(x.dtype) - at) / self.ramp).clamp(0, 1)
            x = resize_axis(x, d - self.dims, size, mask)
        return x

    def extra_repr(self) -> str:
        """Return the strides."""
        return f"stride={[round(s, 3) for s in self.stride.tolist()]}, ramp={self.ramp}"


class FrequencyCrop(nn.Module):
    """A learned resolution: a sigmoid low-pass over frequencies, and a crop of the spectrum where it is below 0.1.

    Initially nothing is cropped, and the highest frequency is multiplied by 0.9.

    Args:
        sides: sides of the input, even; one for sequences (B, C, L), two for images (B, C, H, W).

    Raises:
        ValueError: for odd sides.

    Examples:
        >>> crop = FrequencyCrop([8, 8])
        >>> crop(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 3, 8, 8])
    """

    @checked
    def __init__(self, sides: PositiveInts) -> None:
        super().__init__()
        for side in sides:
            check_even("FrequencyCrop", side)
        self.axes = nn.ModuleList(FrequencyAxis(side) for side in sides)

    @property
    def frequency_axes(self) -> list[FrequencyAxis]:
        """The learnable sizes, one for each axis of the signal."""
        return [axis for axis in self.axes if isinstance(axis, FrequencyAxis)]

    def forward(self, x: Tensor) -> Tensor:
        """Return the signal at the learned resolution; a smaller signal keeps its frequencies."""
        axes = self.frequency_axes
        for d, axis in enumerate(axes, -len(axes)):
            n = x.shape[d]
            check_even("FrequencyCrop", n)
            x = resize_axis(x, d, min(n, axis.crop), axis.values()[: n // 2 + 1].to(x.dtype))
        return x


class FrequencyRestore(nn.Module):
    """Brings a signal of a learned resolution back to given sides, by zeros in its spectrum.

    Args:
        sides: of the output, even.

    Examples:
        >>> FrequencyRestore([8])(torch.ones(1, 3, 4))[0, 0]
        tensor([1., 1., 1., 1., 1., 1., 1., 1.])
    """

    @checked
    def __init__(self, sides: PositiveInts) -> None:
        super().__init__()
        for side in sides:
            check_even("FrequencyRestore", side)
        self.sides = tuple(sides)

    def forward(self, x: Tensor) -> Tensor:
        """Return the signal with the given sides."""
        for d, side in enumerate(self.sides, -len(self.sides)):
            x = resize_axis(x, d, side, torch.ones(x.shape[d] // 2 + 1, dtype=x.dtype, device=x.device))
        return x
