"""A multiscale vision transformer whose stages are reversible."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import (
    FractionBelowOne,
    ImageShape,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveInts,
    checked,
)
from lightning_bpfree.methods.reversible_recompute.coupling import ReversibleBlock
from lightning_bpfree.methods.reversible_recompute.models.pooling_attention import DropPath, Grid, PoolingAttention
from lightning_bpfree.methods.reversible_recompute.recomputation import Schedule
from lightning_bpfree.methods.reversible_recompute.sequential import ReversibleSequential
from lightning_bpfree.methods.reversible_recompute.stream_fusion import Fusion, StreamFusion


class AttentionBranch(nn.Module):
    """Normalization, pooling attention and stochastic depth, without a skip; the grid stays."""

    def __init__(self, dim: int, heads: int, kv_stride: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = PoolingAttention(dim, heads, kv_stride=kv_stride, dropout=dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Return the branch of tokens (B, H * W, C) on a grid (H, W)."""
        out: Tensor = self.drop_path(self.attention(self.norm(x), grid)[0])
        return out


class FeedForwardBranch(nn.Sequential):
    """Normalization, two linear layers with GELU and dropout, and stochastic depth, without a skip."""

    def __init__(self, dim: int, mlp_ratio: float, dropout: float, drop_path: float = 0.0) -> None:
        hidden = max(1, round(dim * mlp_ratio))
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim),
            nn.Dropout(dropout),
            DropPath(drop_path),
        )


class StageTransition(nn.Module):
    """The block between two stages: an ordinary one, which halves both sides of the grid and may widen.

    Stochastic depth drops a sample's branches and never its skip, so that its image still passes through the network.

    Args:
        dim: channels of the input.
        dim_out: channels of the output.
        heads: heads of the output.
        kv_stride: stride of keys and values.
        mlp_ratio: hidden units of the feed-forward branch for every channel.
        dropout: dropped share, in [0, 1).
        drop_path: chance of a sample to be dropped from a branch, in [0, 1).

    Shape:
        - Input: (B, H * W, dim) and the grid (H, W).
        - Output: (B, H' * W', dim_out) and (H', W'), where ``H' = ceil(H / 2)``, and W' likewise.

    Examples:
        >>> tokens, grid = StageTransition(8, 16, heads=2)(torch.randn(3, 7 * 4, 8), (7, 4))
        >>> tokens.shape, grid
        (torch.Size([3, 8, 16]), (4, 2))
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        heads: int,
        kv_stride: int = 1,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = PoolingAttention(dim, heads, dim_out=dim_out, q_stride=2, kv_stride=kv_stride, dropout=dropout)
        # The kernel and padding of the pooled queries, so that both grids agree for odd sides too.
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.project = nn.Identity() if dim == dim_out else nn.Linear(dim, dim_out)
        self.feed_forward = FeedForwardBranch(dim_out, mlp_ratio, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Return the tokens of the next stage and their grid."""
        out, smaller = self.attention(self.norm(x), grid)
        skip = self.pool(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        out = self.drop_path(out) + self.project(skip)
        return out + self.drop_path(self.feed_forward(out)), smaller


class ReversibleMViT(nn.Module):
    """A multiscale vision transformer for images, whose stages are runs of reversible blocks.

    A stage doubles its input into two streams and fuses them at its end. Between stages, an ordinary block pools the
    queries with stride 2 and doubles channels and heads; its activations are stored, so memory grows with the number
    of stages but not with their depths. The stride of keys and values is halved from stage to stage, down to 1. There
    is no class token: the head sees the mean over tokens.

    Args:
        in_shape: (C, H, W) of an image; H and W are multiples of ``patch``.
        num_classes: at least 1.
        dim: channels of the first stage.
        depths: reversible blocks of every stage, each at least 1; transitions are not counted. The default, with its
            three transitions, has the 16 blocks of Rev-MViT-B.
        heads: heads of the first stage, a divisor of ``dim``.
        patch: side of a patch in pixels.
        mlp_ratio: hidden units of feed-forward branches for every channel, above 0.
        kv_stride: stride of keys and values in the first stage, at least 1.
        dropout: dropout rate after embedding, attention and feed-forward layers, in [0, 1).
        drop_path: probability that the last block's branches are dropped for a sample, in [0, 1); increases linearly
            from 0 at the first block.
        fusion: how two streams become one between stages, a mode of :class:`StreamFusion`. After ``"concat"``, the
            transition has 2C input channels and keeps them.
        last_fusion: the same after the last stage; after ``"concat"``, the final normalization and the head have 2C.
        schedule: ``"autograd"``, ``"checkpoint"``, ``"sequential"`` or ``"parallel"``.
        buffer_every: keep the inputs of every n-th block of a stage, at least 1; None for none.
        store_last: number of blocks at the top of every stage that keep their activations, at least 0.

    Raises:
        ValueError: for arguments out of range, or images of another shape.

    Shape:
        - Input: images (B, C, H, W).
        - Output: logits (B, num_classes).

    Examples:
        >>> model = ReversibleMViT((3, 16, 16), 10, dim=8, depths=(1, 2), heads=2, patch=4)
        >>> model(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 10])
        >>> model.schedule = "parallel"

    References:
        K. Mangalam et al., "Reversible Vision Transformers", 2022, arXiv 2302.04869.
        T. Zhu, K. Mangalam, "PaReprop: Fast Parallelized Reversible Backpropagation", 2023, arXiv 2306.09342.
        Patches do not overlap here.
    """

    @checked
    def __init__(
        self,
        in_shape: ImageShape,
        num_classes: PositiveInt,
        dim: PositiveInt = 96,
        depths: PositiveInts = (1, 1, 10, 1),
        heads: PositiveInt = 1,
        patch: PositiveInt = 4,
        *,
        mlp_ratio: PositiveFloat = 4.0,
        kv_stride: PositiveInt = 4,
        dropout: FractionBelowOne = 0.0,
        drop_path: FractionBelowOne = 0.0,
        fusion: Fusion = "concat_linear",
        last_fusion: Fusion = "concat",
        schedule: Schedule = "sequential",
        buffer_every: PositiveInt | None = None,
        store_last: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        _check_shapes(in_shape, depths, patch)
        if dim % heads:
            raise ValueError(f"ReversibleMViT: dim={dim} and heads={heads}: give heads that divide dim.")
        self.in_shape, self.grid = tuple(in_shape), (in_shape[1] // patch, in_shape[2] // patch)
        self.patches = nn.Conv2d(in_shape[0], dim, patch, patch)
        self.positions = nn.Parameter(torch.zeros(1, math.prod(self.grid), dim))
        self.dropout = nn.Dropout(dropout)
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList()
        rates = iter(torch.linspace(0, drop_path, sum(depths) + len(depths) - 1, dtype=torch.double).tolist())
        for number, depth in enumerate(depths):
            if number:
                inner = 2 * dim if fusion == "concat" else dim
                dim, heads, kv_stride = 2 * dim, 2 * heads, max(1, kv_stride // 2)
                step = StageTransition(inner, dim, heads, kv_stride, mlp_ratio, dropout, next(rates))
                self.transitions.append(step)
            blocks = [
                ReversibleBlock(
                    AttentionBranch(dim, heads, kv_stride, dropout, rate),
                    FeedForwardBranch(dim, mlp_ratio, dropout, rate),
                )
                for rate in itertools.islice(rates, depth)
            ]
            fuse = StreamFusion(last_fusion if number == len(depths) - 1 else fusion, dim)
            self.stages.append(
                ReversibleSequential(blocks, schedule, fusion=fuse, buffer_every=buffer_every, store_last=store_last)
            )
        dim = 2 * dim if last_fusion == "concat" else dim
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)
        self.apply(_begin)
        nn.init.trunc_normal_(self.positions, std=0.02)

    @property
    def schedule(self) -> Schedule:
        """How the activations of all stages are recovered; can be set at any time."""
        return self._reversible()[0].schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        for stage in self._reversible():
            stage.schedule = schedule

    def _reversible(self) -> list[ReversibleSequential]:
        return [stage for stage in self.stages if isinstance(stage, ReversibleSequential)]

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of every class."""
        if images.dim() != 4 or tuple(images.shape[1:]) != self.in_shape:
            raise ValueError(
                f"images are {tuple(images.shape)}, but in_shape={self.in_shape}: positions are learned for one size, "
                "so give images of (B, *in_shape)."
            )
        x, grid = self.patches(images).flatten(2).transpose(1, 2) + self.positions, self.grid
        x = self.stages[0](self.dropout(x), grid=grid)
        for transition, stage in zip(self.transitions, self._reversible()[1:], strict=True):
            x, grid = transition(x, grid)
            x = stage(x, grid=grid)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def _begin(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _check_shapes(in_shape: Sequence[int], depths: Sequence[int], patch: int) -> None:
    if in_shape[1] % patch or in_shape[2] % patch:
        raise ValueError(
            f"ReversibleMViT: patch={patch}: give a number that divides both sides of in_shape={in_shape!r}."
        )
    side = max(in_shape[1], in_shape[2]) // patch
    most = 1 + (side - 1).bit_length()  # halving beyond one token changes nothing
    if len(depths) > most:
        raise ValueError(
            f"ReversibleMViT: depths={depths!r} asks for {len(depths)} stages, but patch={patch} leaves {side} "
            f"tokens on the longer side, which can be halved {most - 1} times: give at most "
            f"{most} stages, or smaller patches."
        )
