"""Attention over an image's tokens with pooled queries, keys and values."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

Grid = tuple[int, int]


class TokenPool(nn.Module):
    """Pools tokens over their grid by a depthwise strided convolution, and normalizes each.

    The same weights serve all heads. A stride of 1 keeps the grid and still convolves.

    Args:
        channels: d, of one head.
        stride: at least 1; a side of n tokens becomes one of ``ceil(n / stride)``.
        kernel: side of the kernel, odd and at least 1. Below the stride, it leaves tokens out.

    Raises:
        ValueError: for numbers out of range.

    Shape:
        - Input: (B, heads, H * W, d), and the grid (H, W).
        - Output: (B, heads, H' * W', d), and the grid (H', W').

    Examples:
        >>> import torch
        >>> tokens, grid = TokenPool(4, stride=2)(torch.zeros(1, 2, 5 * 6, 4), (5, 6))
        >>> tokens.shape, grid
        (torch.Size([1, 2, 9, 4]), (3, 3))
    """

    def __init__(self, channels: int, stride: int = 1, kernel: int = 3) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel={kernel}: give an odd number of at least 1, so that kernels have a center.")
        if stride < 1:
            raise ValueError(f"stride={stride}: give a number of tokens of at least 1.")
        self.conv = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Return the pooled tokens and their grid."""
        batch, heads, _, channels = x.shape
        maps: Tensor = self.conv(x.transpose(2, 3).reshape(batch * heads, channels, *grid))
        tokens = maps.flatten(2).transpose(1, 2).reshape(batch, heads, -1, channels)
        return self.norm(tokens), (maps.shape[2], maps.shape[3])


class PoolingAttention(nn.Module):
    """Multi-head attention with queries, keys and values pooled over the grid of tokens.

    Pooled keys and values make attention cheaper by the square of their stride; pooled queries make the output's grid
    smaller. There is no class token.

    Args:
        dim: channels of the input.
        heads: number of heads, at least 1, which divides ``dim_out``.
        dim_out: channels of the output; None for ``dim``.
        q_stride: stride of the queries, at least 1.
        kv_stride: stride of keys and values, at least 1.
        kernel: side of the pooling kernels, odd.
        residual: whether the pooled queries are added to what they attend to (MViTv2).
        dropout: dropped share of the output, in [0, 1).

    Raises:
        ValueError: for numbers out of range, or tokens that do not fill the grid.

    Shape:
        - Input: (B, H * W, dim), row by row, and the grid (H, W).
        - Output: (B, H' * W', dim_out) and (H', W'), where ``H' = ceil(H / q_stride)``, and W' likewise.

    Examples:
        >>> import torch
        >>> attention = PoolingAttention(8, heads=2, dim_out=16, q_stride=2, kv_stride=4)
        >>> tokens, grid = attention(torch.randn(3, 7 * 5, 8), (7, 5))
        >>> tokens.shape, grid
        (torch.Size([3, 12, 16]), (4, 3))

    References:
        H. Fan et al., "Multiscale Vision Transformers", 2021, arXiv 2104.11227.
        Y. Li et al., "MViTv2: Improved Multiscale Vision Transformers for Classification and Detection", 2021, arXiv
        2112.01526: the residual pooling connection. Its relative positions are not here.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        dim_out: int | None = None,
        q_stride: int = 1,
        kv_stride: int = 1,
        kernel: int = 3,
        residual: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        if dim < 1 or dim_out < 1:
            raise ValueError(f"dim={dim} and dim_out={dim_out}: give numbers of channels of at least 1.")
        if heads < 1 or dim_out % heads:
            raise ValueError(f"heads={heads}: give a number that divides the {dim_out} channels of the output.")
        for name, stride in (("q_stride", q_stride), ("kv_stride", kv_stride)):
            if stride < 1:
                raise ValueError(f"{name}={stride}: give a number of tokens of at least 1.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout}: give a share in [0, 1).")
        self.heads, self.residual = heads, residual
        self.qkv = nn.Linear(dim, 3 * dim_out)
        channels = dim_out // heads
        self.pool_q = TokenPool(channels, q_stride, kernel)
        self.pool_k = TokenPool(channels, kv_stride, kernel)
        self.pool_v = TokenPool(channels, kv_stride, kernel)
        self.proj = nn.Linear(dim_out, dim_out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Return the output tokens and their grid."""
        if x.dim() != 3 or x.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"x is {tuple(x.shape)} and grid={tuple(grid)}: give tokens (B, H * W, C) and their grid (H, W); a "
                "class token is not supported."
            )
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, grid_out = self.pool_q(q, grid)
        k, v = self.pool_k(k, grid)[0], self.pool_v(v, grid)[0]
        out = scaled_dot_product_attention(q, k, v)
        out = out + q if self.residual else out
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2))), grid_out

    def extra_repr(self) -> str:
        """Return the number of heads and whether queries are added."""
        return f"heads={self.heads}, residual={self.residual}"


class DropPath(nn.Module):
    """Stochastic depth: in training, sets whole samples to 0, and scales the others so that the mean stays.

    Args:
        rate: chance of a sample to be dropped, in [0, 1).

    Raises:
        ValueError: for a rate out of range.

    Shape:
        - Input: (B, ...).
        - Output: the same.

    Examples:
        >>> import torch
        >>> drop = DropPath(0.5)
        >>> sorted(set(drop(torch.ones(64, 3)).flatten().tolist()))
        [0.0, 2.0]
        >>> drop.eval()(torch.ones(1, 3))
        tensor([[1., 1., 1.]])

    References:
        G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger, "Deep Networks with Stochastic Depth", 2016, arXiv
        1603.09382.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"rate={rate}: give a chance in [0, 1).")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return the samples, some of them dropped."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """Return the rate."""
        return f"{self.rate:g}"
