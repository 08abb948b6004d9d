"""Small classifiers that read a block's output, for local losses.

No layer here couples the samples of a batch: a local gradient belongs to one sample. Normalization is therefore
LayerNorm or GroupNorm, never BatchNorm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bpfree.core.network.network_call import RefusedError

Shape = tuple[int, ...]
MakeHead = Callable[[Shape, int], nn.Module]
HeadKind = Literal["linear", "mlp", "cnn"]

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class Summary(nn.Module):
    """Summarizes a block's output in one vector per sample, for any size of map and any number of tokens.

    - vectors ``(B, D)`` do not change;
    - tokens ``(B, T, D)`` give their mean, ``(B, D)``;
    - maps ``(B, C, ...)`` with one to three places are averaged over a grid of 2 cells a side (1 where a side has one
      place), ``(B, C * cells)``; with one place only if ``channels_first``, for their shape is that of tokens.

    Args:
        shape: shape of one sample, without the batch.
        channels_first: whether ``(B, X, Y)`` is a map of ``X`` channels.

    Raises:
        ValueError: for other shapes.

    Examples:
        >>> import torch
        >>> Summary((8, 5, 7))(torch.zeros(3, 8, 5, 7)).shape, Summary((5, 8))(torch.zeros(3, 5, 8)).shape
        (torch.Size([3, 32]), torch.Size([3, 8]))
    """

    def __init__(self, shape: Shape, channels_first: bool = False) -> None:
        super().__init__()
        if not 1 <= len(shape) <= 4:
            raise RefusedError(
                f"heads: a block gives samples of shape {tuple(shape)}; there are heads for vectors (D,), tokens "
                "(T, D) and maps (C, H, W). Pass a function (output_shape, num_classes) -> nn.Module as heads."
            )
        self.is_map = len(shape) > 2 or (len(shape) == 2 and channels_first)
        self.is_tokens = len(shape) == 2 and not channels_first
        self.features = shape[0] * math.prod(min(side, 2) for side in shape[1:]) if self.is_map else shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        """One vector a sample, shape ``(B, features)``."""
        if self.is_tokens:
            return x.mean(1)
        if not self.is_map:
            return x
        # Adaptive pooling has no deterministic backward pass on CUDA; a fixed window of half a side has.
        sides = x.shape[2:]
        windows = tuple(math.ceil(side / 2) for side in sides)
        pooled: Tensor = _POOLS[len(sides)](x, windows, windows, ceil_mode=True)
        return pooled.flatten(1)


def linear_head(shape: Shape, num_classes: int, *, channels_first: bool = False) -> nn.Module:
    """Return a linear classifier on the summary of a block's output.

    Args:
        shape: shape of one sample of the block's output, without the batch; see :class:`Summary`.
        num_classes: width of its output.
        channels_first: see :class:`Summary`.

    Examples:
        >>> sum(p.numel() for p in linear_head((16, 8, 8), 10).parameters())
        650
    """
    summary = Summary(shape, channels_first)
    return nn.Sequential(summary, nn.Linear(summary.features, num_classes))


def mlp_head(
    shape: Shape, num_classes: int, *, width: int = 128, depth: int = 1, channels_first: bool = False
) -> nn.Module:
    """Return a perceptron with hidden layers of ``width`` units on the summary of a block's output.

    Args:
        shape: shape of one sample, without the batch; see :class:`Summary`.
        num_classes: width of its output.
        width: units of a hidden layer, at least 1.
        depth: number of hidden layers (linear, LayerNorm, ReLU), at least 1.
        channels_first: see :class:`Summary`.

    Raises:
        ValueError: for sizes below 1.

    Examples:
        >>> import torch
        >>> mlp_head((5, 8), 10)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 10])
    """
    if width < 1 or depth < 1:
        raise ValueError(f"width={width}, depth={depth}: a head has at least one hidden layer of one unit.")
    summary = Summary(shape, channels_first)
    layers: list[nn.Module] = [summary]
    features = summary.features
    for _ in range(depth):
        layers += [nn.Linear(features, width, bias=False), nn.LayerNorm(width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, num_classes))


def cnn_head(shape: Shape, num_classes: int, *, width: int | None = None, channels_first: bool = False) -> nn.Module:
    """Return a small convolutional classifier on a map: 1 x 1, then up to three times 3 x 3 with stride 2, then linear.

    Args:
        shape: ``(C, H, W)`` of one sample (or one or three places).
        num_classes: width of its output.
        width: channels inside, at least 1; None takes a quarter of ``C``, at least 4: below a tenth of the
            multiplications of two 3 x 3 convolutions over ``C`` channels.
        channels_first: see :class:`Summary`.

    Raises:
        ValueError: if the shape is not that of a map, or ``width`` is below 1.

    Examples:
        >>> import torch
        >>> cnn_head((16, 8, 8), 10)(torch.zeros(3, 16, 8, 8)).shape
        torch.Size([3, 10])
    """
    if not Summary(shape, channels_first).is_map:
        raise RefusedError(
            f"heads='cnn': a block gives samples of shape {tuple(shape)}, which are not maps (C, H, W). Use "
            "'linear' or 'mlp'."
        )
    width = max(4, shape[0] // 4) if width is None else width
    if width < 1:
        raise ValueError(f"width={width}: a head has at least one channel.")
    convolution, sides = _CONVOLUTIONS[len(shape) - 1], list(shape[1:])
    layers: list[nn.Module] = [convolution(shape[0], width, 1)]
    for _ in range(3):
        if max(sides) <= 2:  # nothing left to shrink
            break
        layers += [convolution(width, width, 3, stride=2, padding=1, bias=False), nn.GroupNorm(1, width), nn.ReLU()]
        sides = [math.ceil(side / 2) for side in sides]
    return nn.Sequential(*layers, linear_head((width, *sides), num_classes, channels_first=True))


HEADS: dict[str, Callable[..., nn.Module]] = {"linear": linear_head, "mlp": mlp_head, "cnn": cnn_head}
