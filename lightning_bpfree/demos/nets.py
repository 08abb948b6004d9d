"""Three small networks: dense, convolutional, transformer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import FractionBelowOne, ImageShape, PositiveInt, PositiveInts, checked

Activation = Literal["relu", "gelu", "tanh", "hardswish"]
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "hardswish": nn.Hardswish,
}
_POOL = 4  # SmallCNN pools each side to this many cells at most


def _check_input(net: nn.Module, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape[1:] != shape:
        raise ValueError(
            f"{type(net).__name__} was built for inputs of shape {('B', *shape)}, got {tuple(x.shape)}; "
            "build it with the data's shape, or feed it such inputs."
        )


class MLP(nn.Module):
    """Fully connected network; flattens its input to (B, in_features).

    Args:
        in_features: Numbers in one sample.
        hidden: Widths of the hidden layers; empty: a linear model.
        num_classes: Width of the output.
        activation: Nonlinearity after each hidden layer.
        norm: Normalization between a hidden layer and its nonlinearity.

    Raises:
        ValueError: A size is below 1, a name unknown, or an input does not have `in_features` numbers a sample.

    Example:
        >>> MLP(64, [32, 16], 10)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    @checked
    def __init__(
        self,
        in_features: PositiveInt = 64,
        hidden: Sequence[PositiveInt] = (128,),
        num_classes: PositiveInt = 10,
        activation: Activation = "relu",
        norm: Literal["none", "layer", "batch"] = "none",
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_features
        for next_width in hidden:
            layers.append(nn.Linear(width, next_width))
            if norm != "none":
                layers.append(nn.LayerNorm(next_width) if norm == "layer" else nn.BatchNorm1d(next_width))
            layers.append(_ACTIVATIONS[activation]())
            width = next_width
        self.in_features = in_features
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, num_classes), of inputs of shape (B, ...)."""
        x = x.flatten(1)
        _check_input(self, x, (self.in_features,))
        logits: Tensor = self.layers(x)
        return logits


class SmallCNN(nn.Module):
    """3 x 3 convolutions (the first at full size, each later one halves it), average pooling, one linear layer.

    Args:
        in_shape: Shape (C, H, W) of one image, any size from 1 x 1 up.
        channels: Output channels of each convolution, at least one.
        num_classes: Width of the output.
        norm: Normalization after each convolution; ``group`` has up to 8 groups.
        activation: Nonlinearity after it.

    Raises:
        ValueError: A size is below 1, a name unknown, or an input does not have `in_shape`.

    Example:
        >>> SmallCNN((1, 28, 28), [8, 16])(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    @checked
    def __init__(
        self,
        in_shape: ImageShape = (1, 8, 8),
        channels: PositiveInts = (16, 32),
        num_classes: PositiveInt = 10,
        norm: Literal["none", "group", "batch"] = "none",
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        c, *sides = in_shape
        layers: list[nn.Module] = []
        for i, width in enumerate(channels):
            layers.append(nn.Conv2d(c, width, 3, stride=1 if i == 0 else 2, padding=1))
            if norm != "none":
                layers.append(nn.GroupNorm(math.gcd(8, width), width) if norm == "group" else nn.BatchNorm2d(width))
            layers.append(_ACTIVATIONS[activation]())
            c = width
            sides = [math.ceil(side / (1 if i == 0 else 2)) for side in sides]
        # AdaptiveAvgPool2d has no deterministic backward on CUDA, so the windows that give _POOL cells a side at most
        # are worked out here, and Trainer(deterministic=True) works.
        windows = [math.ceil(side / _POOL) for side in sides]
        cells = math.prod(math.ceil(side / window) for side, window in zip(sides, windows, strict=True))
        layers.append(nn.AvgPool2d((windows[0], windows[1]), ceil_mode=True))
        self.in_shape = tuple(in_shape)
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(c * cells, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, num_classes), of images of shape (B, C, H, W)."""
        _check_input(self, x, self.in_shape)
        logits: Tensor = self.head(self.features(x).flatten(1))
        return logits


class LeNet(nn.Module):
    """Two 5 x 5 convolutions with pooling between them, the mean over all positions, one linear layer.

    From H. Feng et al., "Does Federated Learning Really Need Backpropagation?", 2023, arXiv 2301.12195: 26,730
    parameters for one channel of input.

    Args:
        in_channels: Channels of one image, of any size from 2 x 2 up.
        channels: Output channels of the two convolutions.
        num_classes: Width of the output.
        activation: Nonlinearity after each convolution.

    Raises:
        ValueError: A size is below 1, or a name unknown.

    Example:
        >>> sum(parameter.numel() for parameter in LeNet().parameters())
        26730
    """

    @checked
    def __init__(
        self,
        in_channels: PositiveInt = 1,
        channels: tuple[PositiveInt, PositiveInt] = (16, 64),
        num_classes: PositiveInt = 10,
        activation: Activation = "hardswish",
    ) -> None:
        super().__init__()
        first, second = channels
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, first, 5, padding=2),
            _ACTIVATIONS[activation](),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5, padding=2),
            _ACTIVATIONS[activation](),
        )
        self.head = nn.Linear(second, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, num_classes), of images of shape (B, C, H, W)."""
        logits: Tensor = self.head(self.features(x).mean((2, 3)))
        return logits


class SmallTransformer(nn.Module):
    """Transformer encoder over rows or patches of an image: pre-norm, learned positions, mean over tokens.

    Args:
        in_shape: Shape (C, H, W) of one image.
        num_classes: Width of the output.
        dim: Width of a token, a multiple of `heads`.
        depth: Encoder layers.
        heads: Attention heads.
        patch: Height and width of a patch, which divide H and W; None: each row is a token.
        mlp_ratio: Width of a layer's feed-forward part over `dim`.
        dropout: Dropout probability in the layers, in [0, 1).

    Raises:
        ValueError: A size is below 1 or does not divide another as it must, or an input does not have `in_shape`.

    Example:
        >>> SmallTransformer((1, 28, 28), patch=(7, 7))(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    @checked
    def __init__(
        self,
        in_shape: ImageShape = (1, 8, 8),
        num_classes: PositiveInt = 10,
        dim: PositiveInt = 64,
        depth: PositiveInt = 2,
        heads: PositiveInt = 4,
        patch: tuple[PositiveInt, PositiveInt] | None = None,
        mlp_ratio: PositiveInt = 2,
        dropout: FractionBelowOne = 0.0,
    ) -> None:
        super().__init__()
        c, h, w = in_shape
        p, q = (1, w) if patch is None else patch
        if h % p or w % q:
            raise ValueError(
                f"SmallTransformer: patch is {p} x {q}, which does not divide the image of {h} x {w}; choose "
                "one that does."
            )
        if dim % heads:
            raise ValueError(f"SmallTransformer: dim is {dim} and heads {heads}; make dim a multiple of heads.")
        self.in_shape, self.patch = (c, h, w), (p, q)
        self.embed = nn.Linear(c * p * q, dim)
        self.position = nn.Parameter(0.02 * torch.randn(h // p * (w // q), dim))
        layer = nn.TransformerEncoderLayer(
            dim, heads, mlp_ratio * dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        for parameter in self.encoder.parameters():
            if parameter.dim() > 1:  # TransformerEncoder copies one layer: without this all layers start out the same
                nn.init.xavier_uniform_(parameter)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, num_classes), of images of shape (B, C, H, W)."""
        _check_input(self, x, self.in_shape)
        (c, h, w), (p, q) = self.in_shape, self.patch
        grid = x.reshape(-1, c, h // p, p, w // q, q).permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, p, q)
        tokens = grid.flatten(3).flatten(1, 2)
        logits: Tensor = self.head(self.encoder(self.embed(tokens) + self.position).mean(1))
        return logits
