"""The CCNN: residual blocks of continuous depthwise convolutions, the same for sequences and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from lightning_bpfree.core.arguments import (
    FractionBelowOne,
    PositiveFloat,
    PositiveInt,
    PositiveInts,
    checked,
)
from lightning_bpfree.methods.learnable_architecture.continuous.convolution import ContinuousConv
from lightning_bpfree.methods.learnable_architecture.continuous.striding import FrequencyCrop, FrequencyRestore

_POINTWISE = {1: nn.Conv1d, 2: nn.Conv2d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


class CCNNBlock(nn.Module):
    """``x + GELU(pointwise(dropout(GELU(pointwise(conv(norm(x)))))))``: a block of the CCNN.

    Args:
        width: channels of input and output.
        hidden: channels between the pointwise layers.
        conv: the depthwise convolution.
        dims: 1 or 2.
        dropout: probability.
    """

    def __init__(self, width: int, hidden: int, conv: nn.Module, dims: int, dropout: float) -> None:
        super().__init__()
        self.norm = _NORMS[dims](width)
        self.conv = conv
        self.mix = _POINTWISE[dims](width, hidden, 1)
        self.act = nn.GELU()
        self.drop = nn.Dropout(dropout)
        self.project = _POINTWISE[dims](hidden, width, 1)
        self.last_act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, of the same shape."""
        hidden = self.act(self.mix(self.conv(self.norm(x))))
        out: Tensor = x + self.last_act(self.project(self.drop(hidden)))
        return out


class CCNN(nn.Module):
    """A network of continuous convolutions for sequences (B, C, L) or images (B, C, H, W).

    After the first layer and after each block, the resolution can be learned (a low-pass in the Fourier domain). It is
    meant for ``LearnableArchitecture``, which learns its sizes. As a plain network, it trains kernel sizes and
    resolutions with the weights.

    Args:
        in_shape: channels, then one or two sides, which must be even with ``crops``.
        outputs: number of classes; with ``dense``, channels of the output at every position.
        width: channels of the residual stream, at least 1.
        blocks: at least 1.
        max_kernel: taps of an uncropped kernel on each axis, odd; None for the largest odd side, at most 33.
        hidden: channels within blocks; None for ``width``.
        kernel_hidden: width of the small networks that compute the kernels.
        omega: their frequency scale, above 0; a hyperparameter of the task.
        spread: initial standard deviation of the kernels' masks, on [-1, 1].
        dropout: probability, in [0, 1).
        dense: whether to return an output at every position, at the input's resolution, instead of one per input.
        crops: whether resolutions can be learned.

    Raises:
        ValueError: for sizes out of range, odd sides with ``crops``, and inputs of another shape.

    Examples:
        >>> import torch
        >>> CCNN((1, 8, 8), 10, width=8, blocks=2)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
        >>> CCNN((1, 64), 2, width=8, blocks=1, dense=True)(torch.zeros(5, 1, 64)).shape
        torch.Size([5, 2, 64])

    References:
        D. M. Knigge et al., "Modelling Long Range Dependencies in N-D: From Task-Specific to a General Purpose CNN",
        2023, arXiv 2301.10540.
    """

    @checked
    def __init__(
        self,
        in_shape: PositiveInts,
        outputs: PositiveInt = 10,
        width: PositiveInt = 32,
        blocks: PositiveInt = 4,
        max_kernel: PositiveInt | None = None,
        *,
        hidden: PositiveInt | None = None,
        kernel_hidden: PositiveInt = 32,
        omega: PositiveFloat = 10.0,
        spread: PositiveFloat = 0.2,
        dropout: FractionBelowOne = 0.0,
        dense: bool = False,
        crops: bool = True,
    ) -> None:
        if len(in_shape) not in (2, 3):
            raise ValueError(f"CCNN: in_shape={tuple(in_shape)}: give channels and one or two sides.")
        super().__init__()
        channels, *sides = in_shape
        dims = len(sides)
        self.in_shape, self.dense = tuple(in_shape), dense
        kernel = max_kernel or min(33, max(sides) - 1 + max(sides) % 2)

        def conv(count: int) -> ContinuousConv:
            one_or_two: Literal[1, 2] = 1 if dims == 1 else 2
            return ContinuousConv(count, kernel, one_or_two, kernel_hidden, omega=omega, spread=spread)

        self.stem = nn.Sequential(conv(channels), _POINTWISE[dims](channels, width, 1), _NORMS[dims](width), nn.GELU())
        self.blocks = nn.ModuleList(
            CCNNBlock(width, hidden or width, conv(width), dims, dropout) for _ in range(blocks)
        )
        self.crops = nn.ModuleList(FrequencyCrop(sides) for _ in range(blocks + 1)) if crops else None
        self.restore = FrequencyRestore(sides) if dense and crops else nn.Identity()
        self.norm = _NORMS[dims](width)
        self.head = _POINTWISE[dims](width, outputs, 1) if dense else nn.Linear(width, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, outputs), or with ``dense`` (B, outputs, *sides)."""
        if tuple(x.shape[1:]) != self.in_shape:
            raise ValueError(
                f"CCNN was built for inputs of shape {('B', *self.in_shape)}, got {tuple(x.shape)}; build it with the "
                "data's shape, or feed it such inputs."
            )
        crops: Sequence[nn.Module] = (
            [nn.Identity()] * (len(self.blocks) + 1) if self.crops is None else list(self.crops)
        )
        x = crops[0](self.stem(x))
        for block, crop in zip(self.blocks, crops[1:], strict=True):
            x = crop(block(x))
        x = self.norm(x)
        if not self.dense:
            logits: Tensor = self.head(x.flatten(2).mean(-1))
            return logits
        out: Tensor = self.restore(self.head(x))
        return out
