"""The exported CCNN without masks, in plain torch: this file needs nothing else of the package, and can be copied.

>>> config = {"in_shape": [1, 8, 8], "outputs": 10, "dense": False, "width": 3, "stem_kernel": [3, 3], "crops": None,
...           "blocks": [{"kernel": [5, 3], "hidden": 2}, None]}
>>> PlainCCNN(config)(torch.zeros(2, 1, 8, 8)).shape
torch.Size([2, 10])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


class PlainConv(nn.Module):
    """A depthwise convolution of the same size with a plain kernel.

    Args:
        channels: of input and output.
        taps: on each axis.
        causal: whether the last tap is the present.
        bias: whether there is one for each channel.
    """

    def __init__(self, channels: int, taps: Sequence[int], causal: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.taps, self.causal, self.convolve = list(taps), causal, {1: F.conv1d, 2: F.conv2d}[len(taps)]
        self.weight = nn.Parameter(torch.zeros(channels, 1, *taps))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of inputs (B, channels, *sides)."""
        if self.causal:
            x = F.pad(x, (self.taps[0] - 1, 0))
        padding = [0 if self.causal else k // 2 for k in self.taps]
        return self.convolve(x, self.weight, self.bias, padding=padding, groups=self.weight.shape[0])

    @property
    def config(self) -> dict[str, Any]:
        """From what it is made again."""
        return {"conv": [self.weight.shape[0], self.taps, self.causal, self.bias is not None]}


class PlainResize(nn.Module):
    """Resizes the last axes of a signal by fixed matrices.

    Args:
        shapes: of the matrices: samples of the output and of the input, for each axis.
    """

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        for d, (new, old) in enumerate(shapes):
            self.register_buffer(f"matrix_{d}", torch.zeros(new, old))
        self.shapes = [list(shape) for shape in shapes]

    @property
    def config(self) -> dict[str, Any]:
        """From what it is made again."""
        return {"resize": self.shapes}

    def forward(self, x: Tensor) -> Tensor:
        """Return the resized signal."""
        for d in range(len(self.shapes)):
            axis = d - len(self.shapes)
            x = (x.transpose(axis, -1) @ self.get_buffer(f"matrix_{d}").transpose(0, 1)).transpose(axis, -1)
        return x


class PlainBlock(nn.Module):
    """A residual block: ``x + GELU(project(GELU(mix(conv(norm(x))))))``.

    Args:
        width: channels of input and output.
        hidden: channels between the pointwise layers.
        kernel: taps on each axis.
    """

    def __init__(self, width: int, hidden: int, kernel: Sequence[int]) -> None:
        super().__init__()
        dims = len(kernel)
        self.norm = NORMS[dims](width)
        self.conv = PlainConv(width, kernel)
        self.mix = CONVOLUTIONS[dims](width, hidden, 1)
        self.act, self.last_act = nn.GELU(), nn.GELU()
        self.project = CONVOLUTIONS[dims](hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out: Tensor = x + self.last_act(self.project(self.act(self.mix(self.conv(self.norm(x))))))
        return out


class PlainCCNN(nn.Module):
    """An exported CCNN, from its configuration; its state dict is that of the export.

    Args:
        config: as ``LearnableArchitecture.export`` gives it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        channels, *sides = config["in_shape"]
        dims, width, kernel = len(sides), config["width"], config["stem_kernel"]
        self.dense = bool(config["dense"])
        self.stem = nn.Sequential(
            PlainConv(channels, kernel),
            CONVOLUTIONS[dims](channels, width, 1),
            NORMS[dims](width),
            nn.GELU(),
        )
        self.blocks = nn.ModuleList(
            nn.Identity() if block is None else PlainBlock(width, block["hidden"], block["kernel"])
            for block in config["blocks"]
        )
        crops = config["crops"]
        self.crops = None if crops is None else nn.ModuleList(PlainResize(shapes) for shapes in crops["shapes"])
        self.restore = PlainResize(crops["restore"]) if crops and crops["restore"] else nn.Identity()
        self.norm = NORMS[dims](width)
        self.head = (
            CONVOLUTIONS[dims](width, config["outputs"], 1) if self.dense else nn.Linear(width, config["outputs"])
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, or with ``dense`` an output at every position."""
        x = self.stem(x)
        x = x if self.crops is None else self.crops[0](x)
        for index, block in enumerate(self.blocks):
            x = block(x)
            x = x if self.crops is None else self.crops[index + 1](x)
        x = self.norm(x)
        out: Tensor = self.restore(self.head(x)) if self.dense else self.head(x.flatten(2).mean(-1))
        return out


def resized(network: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Return a network of the user's own with the sizes of an export, into which its state dict can be loaded.

    Args:
        network: as it was before the search; it is changed in place.
        config: as ``LearnableArchitecture.export`` gives it.

    Examples:
        >>> config = {"layers": {"0": {"attributes": {"out_features": 1}, "shapes": {"weight": [1, 2], "bias": [1]}}},
        ...           "skipped": [], "removed": [], "replaced": {}}
        >>> resized(nn.Sequential(nn.Linear(2, 3)), config)[0].weight.shape
        torch.Size([1, 2])
    """
    for name in config["skipped"]:
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, nn.Identity())
    for name in reversed(config["removed"]):
        parent, _, last = name.rpartition(".")
        container: Any = network.get_submodule(parent)
        del container[int(last)]
    for name, made in config["replaced"].items():
        parent, _, last = name.rpartition(".")
        new = PlainConv(*made["conv"]) if "conv" in made else PlainResize(made["resize"])
        setattr(network.get_submodule(parent), last, new)
    for name, changed in config["layers"].items():
        layer = network.get_submodule(name)
        for attribute, value in changed["attributes"].items():
            setattr(layer, attribute, tuple(value) if isinstance(value, list) else value)
        for key, shape in changed["shapes"].items():
            *path, leaf = key.split(".")
            owner = layer.get_submodule(".".join(path))
            if leaf in owner._buffers:
                owner._buffers[leaf] = torch.zeros(shape)
            else:
                owner._parameters[leaf] = nn.Parameter(torch.zeros(shape))
    return network
