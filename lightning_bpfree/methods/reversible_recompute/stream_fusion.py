"""Conversion of one stream into two, and back."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import PositiveInt, checked

Enter = Literal["duplicate", "split"]
Fusion = Literal["mean", "add", "max", "min", "second", "concat", "concat_linear"]
FUSIONS: tuple[Fusion, ...] = get_args(Fusion)
FusionOfOneWidth = Literal["mean", "add", "max", "min", "second", "concat_linear"]
"""Those that keep the width, which what follows an existing stack expects."""


def enter(x: Tensor, how: Enter, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Make two streams of one.

    Args:
        x: any tensor.
        how: ``"duplicate"``: both streams are ``x``; ``"split"``: each is one half of the channels.
        dim: the dimension of the channels.

    Raises:
        ValueError: if an odd number of channels is to be split.

    Examples:
        >>> [stream.shape[-1] for stream in enter(torch.zeros(2, 6), "split")]
        [3, 3]
    """
    if how == "duplicate":
        return x, x
    if x.shape[dim] % 2:
        raise ValueError(
            f"enter='split' halves dimension {dim} of shape {tuple(x.shape)}, which is odd: give an even number of "
            "channels, or enter='duplicate'."
        )
    first, second = x.chunk(2, dim)
    return first, second


class StreamFusion(nn.Module):
    """Fuses the two streams of a reversible stack into one tensor.

    Args:
        mode: ``"mean"``, ``"add"``, ``"max"``, ``"min"``: elementwise, C channels stay C; ``"second"``: only the second
            stream; ``"concat"``: 2C channels; ``"concat_linear"``: both streams, concatenated, through a feed-forward
            network (2C, 2C with GELU, C), which has parameters.
        channels: C, for ``"concat_linear"``.
        dim: the dimension of the channels; the last one for ``"concat_linear"``.

    Raises:
        ValueError: for an unknown mode, or ``"concat_linear"`` without channels or along another dimension.

    Shape:
        - Input: two tensors of one shape.
        - Output: that shape; twice the channels for ``"concat"``.

    Examples:
        >>> StreamFusion("concat")(torch.zeros(2, 3), torch.ones(2, 3)).shape
        torch.Size([2, 6])
        >>> StreamFusion("mean")(torch.zeros(2), torch.ones(2))
        tensor([0.5000, 0.5000])
    """

    @checked
    def __init__(self, mode: Fusion = "mean", channels: PositiveInt | None = None, dim: int = -1) -> None:
        super().__init__()
        self.mode, self.dim = mode, dim
        if mode == "concat_linear":
            if channels is None or dim != -1:
                raise ValueError(
                    f"StreamFusion: fusion='concat_linear' with channels={channels} and dim={dim}: give the "
                    "channels of one stream, which must be the last dimension."
                )
            self.mlp = nn.Sequential(
                nn.Linear(2 * channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
            )

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Return one tensor."""
        if self.mode == "mean":
            return (x1 + x2) / 2
        if self.mode == "second":
            return x2
        if self.mode == "add":
            return x1 + x2
        if self.mode in ("max", "min"):
            return torch.maximum(x1, x2) if self.mode == "max" else torch.minimum(x1, x2)
        both = torch.cat((x1, x2), self.dim)
        out: Tensor = self.mlp(both) if self.mode == "concat_linear" else both
        return out

    def extra_repr(self) -> str:
        """Return the mode."""
        return self.mode
