"""The generator of continuous kernels: a multiplicative network with anisotropic Gabor filters (MAGNet)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import PositiveFloat, PositiveInt, checked


class GaborFilter(nn.Module):
    """``exp(-0.5 Σ_d (γ_d (x_d - μ_d))²) sin(V x + c)`` for each hidden channel, with its own γ on each axis."""

    def __init__(self, dims: int, hidden: int, layer: int, omega: float, spread: float, causal: bool) -> None:
        super().__init__()
        gamma = torch.distributions.Gamma(6.0 / (layer + 1), 1.0).sample((hidden, dims))
        self.gamma = nn.Parameter(gamma)
        reach = 1.667 * spread
        offsets = torch.rand(hidden, dims)
        self.mu = nn.Parameter(1 - reach * offsets if causal else reach * (2 * offsets - 1))
        self.wave = nn.Linear(dims, hidden)
        with torch.no_grad():
            self.wave.weight.mul_(2 * math.pi * omega * gamma)
            self.wave.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return the filters of points (N, dims): shape (N, hidden)."""
        distance = self.gamma * (x.unsqueeze(1) - self.mu)
        waves: Tensor = torch.sin(self.wave(x))
        return torch.exp(-0.5 * distance.square().sum(-1)) * waves


class MAGNet(nn.Module):
    """Map coordinates to the values of kernels: a multiplicative network with anisotropic Gabor filters.

    Args:
        dims: axes of the kernel, at least 1.
        channels: kernels, at least 1.
        hidden: width, at least 1.
        layers: linear layers between filters, at least 1.
        omega: frequency scale of the filters, above 0; a hyperparameter of the task.
        spread: standard deviation of the kernel's mask, above 0: filters begin inside of it.
        causal: whether the mask is around 1.

    Examples:
        >>> MAGNet(2, channels=4)(torch.zeros(9, 2)).shape
        torch.Size([9, 4])

    References:
        D. W. Romero et al., "FlexConv: Continuous Kernel Convolutions with Differentiable Kernel Sizes", 2021,
        arXiv 2110.08059.
    """

    @checked
    def __init__(
        self,
        dims: PositiveInt,
        channels: PositiveInt,
        hidden: PositiveInt = 32,
        layers: PositiveInt = 3,
        *,
        omega: PositiveFloat = 10.0,
        spread: PositiveFloat = 0.075,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.filters = nn.ModuleList(
            GaborFilter(dims, hidden, layer, omega, spread, causal) for layer in range(layers + 1)
        )
        self.linears = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.out = nn.Linear(hidden, channels)
        for linear in [*self.linears, self.out]:
            assert isinstance(linear, nn.Linear)
            nn.init.kaiming_uniform_(linear.weight, nonlinearity="linear")
            nn.init.constant_(linear.bias, 0.0 if linear is self.out else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return values of all kernels at points (N, dims): shape (N, channels)."""
        hidden = self.filters[0](x)
        for linear, gabor in zip(self.linears, self.filters[1:], strict=True):
            hidden = gabor(x) * linear(hidden)
        values: Tensor = self.out(hidden)
        return values
