"""Depthwise convolution with a continuous kernel, whose size is learned."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bpfree.core.arguments import PositiveFloat, PositiveInt, checked
from lightning_bpfree.methods.learnable_architecture.continuous.magnet import MAGNet
from lightning_bpfree.methods.learnable_architecture.sizes.axes import KernelAxis

FFT_FROM = 50
"""Kernels whose sides are all above this go through the Fourier domain."""
_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d}


class ContinuousConv(nn.Module):
    """Depthwise convolution, stride 1, same size, whose kernels are functions of position under a Gaussian mask.

    A small network maps coordinates to kernel values, so that a kernel can have any size. The mask's standard deviation
    is learned on each axis. The kernel is cropped where the mask is below 0.1, before the small network is evaluated.

    The output layer of the small network is scaled by ``1 / sqrt(taps)`` at construction, with the taps that the
    initial mask keeps, so that no forward pass is needed before the weights are final.

    Args:
        channels: channels of input and output, at least 1.
        max_kernel: taps of the uncropped kernel on each axis, odd.
        dims: number of axes, 1 for sequences, 2 for images.
        hidden: width of the small network, at least 1.
        omega: frequency scale of the small network, above 0; a hyperparameter of the task.
        spread: initial standard deviation of the mask, on [-1, 1], in (0, 2.5].
        causal: for sequences: whether an output depends only on current and earlier inputs.
        bias: whether there is a bias for each channel.

    Raises:
        ValueError: for an even ``max_kernel``, or causal images.

    Examples:
        >>> conv = ContinuousConv(4, max_kernel=33)
        >>> conv(torch.zeros(1, 4, 16, 16)).shape, conv.kernel().shape
        (torch.Size([1, 4, 16, 16]), torch.Size([4, 1, 5, 5]))

    References:
        D. W. Romero et al., "FlexConv: Continuous Kernel Convolutions with Differentiable Kernel Sizes", 2021,
        arXiv 2110.08059. D. M. Knigge et al., "Modelling Long Range Dependencies in N-D: From Task-Specific to a
        General Purpose CNN", 2023, arXiv 2301.10540.
    """

    @checked
    def __init__(
        self,
        channels: PositiveInt,
        max_kernel: PositiveInt = 33,
        dims: Literal[1, 2] = 2,
        hidden: PositiveInt = 32,
        *,
        omega: PositiveFloat = 10.0,
        spread: PositiveFloat = 0.075,
        causal: bool = False,
        bias: bool = True,
    ) -> None:
        if max_kernel % 2 == 0:
            raise ValueError(f"ContinuousConv: max_kernel={max_kernel}: give an odd number.")
        if causal and dims == 2:
            raise ValueError("ContinuousConv: causal=True with dims=2: images have no order; give dims=1.")
        super().__init__()
        self.channels, self.max_kernel, self.dims, self.causal = channels, max_kernel, dims, causal
        self.axes = nn.ModuleList(KernelAxis(max_kernel, spread, causal) for _ in range(dims))
        self.generator = MAGNet(dims, channels, hidden, omega=omega, spread=spread, causal=causal)
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self._holds = False
        self._sampled: Tensor | None = None
        with torch.no_grad():
            self.generator.out.weight.mul_(1 / math.sqrt(math.prod(axis.crop for axis in self.kernel_axes)))

    @property
    def kernel_axes(self) -> list[KernelAxis]:
        """The learnable sizes, one per axis of the kernel."""
        return [axis for axis in self.axes if isinstance(axis, KernelAxis)]

    def kernel(self, scale: PositiveInt = 1) -> Tensor:
        """Return the masked, cropped kernel: shape (channels, 1, *taps).

        Args:
            scale: factor on the resolution of the inputs; the kernel has about as many times more taps per axis, with
                values divided by the same factor per axis.
        """
        axes = self.kernel_axes
        points, mask = [], None
        for d, axis in enumerate(axes):
            at = axis.positions[axis.window()]
            values = axis.values()
            if scale > 1:
                taps = (len(at) - 1) * scale + 1
                at = torch.linspace(float(at[0]), float(at[-1]), taps, dtype=at.dtype, device=at.device)
                values = torch.exp(-0.5 * (at - axis.mean) ** 2 / (axis.size**2 + 1e-8))
            points.append(at)
            shaped = values.view([-1 if i == d else 1 for i in range(self.dims)])
            mask = shaped if mask is None else mask * shaped
        assert mask is not None
        grid = torch.stack(torch.meshgrid(*points, indexing="ij"), -1)
        values = self.generator(grid.view(-1, self.dims)).transpose(0, 1)
        kernel: Tensor = values.reshape(-1, 1, *grid.shape[:-1]) * mask / scale**self.dims
        return kernel

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of inputs (B, channels, *sides), with the same sides."""
        kernel = self.kernel() if self._sampled is None else self._sampled
        if self._holds:
            self._sampled = kernel
        return convolved(x, kernel.to(x.dtype), self.bias, self.causal)

    def hold(self, holds: bool) -> None:
        """Keep the kernel of the next forward pass for later ones, as an exported layer does, or release it."""
        self._holds, self._sampled = holds, None


@contextlib.contextmanager
def sampled_kernels(network: nn.Module) -> Iterator[None]:
    """Let continuous convolutions make their kernels once in this context, in the first forward pass.

    Args:
        network: with such layers.
    """
    convolutions = [module for module in network.modules() if isinstance(module, ContinuousConv)]
    for module in convolutions:
        module.hold(holds=True)
    try:
        yield
    finally:
        for module in convolutions:
            module.hold(holds=False)


def convolved(x: Tensor, kernel: Tensor, bias: Tensor | None, causal: bool = False) -> Tensor:
    """Return a depthwise convolution of the same size; kernels with all sides above 50 go through the FFT.

    Args:
        x: shape (B, C, *sides).
        kernel: shape (C, 1, *taps).
        bias: shape (C,).
        causal: whether the kernel's last tap is the present, rather than the middle one.
    """
    taps = kernel.shape[2:]
    if min(taps) > FFT_FROM:
        return _by_fft(x, kernel, bias, causal)
    if causal:
        x, padding = F.pad(x, (taps[0] - 1, 0)), [0]
    else:
        padding = [k // 2 for k in taps]
    out: Tensor = _CONVOLUTIONS[len(taps)](x, kernel, bias, padding=padding, groups=kernel.shape[0])
    return out


def _by_fft(x: Tensor, kernel: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    sides, taps = x.shape[2:], kernel.shape[2:]
    axes = list(range(-len(sides), 0))
    full = [n + k - 1 for n, k in zip(sides, taps, strict=True)]
    # A convolution layer computes a correlation: the kernel is turned around.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    product = torch.fft.rfftn(x.to(wide), full, axes) * torch.fft.rfftn(kernel[:, 0].flip(axes).to(wide), full, axes)
    out: Tensor = torch.fft.irfftn(product, full, axes)
    for axis, n, k in zip(axes, sides, taps, strict=True):
        out = out.narrow(axis, 0 if causal else k // 2, n)
    out = out.to(x.dtype)
    return out if bias is None else out + bias.view(-1, *[1] * len(sides))
