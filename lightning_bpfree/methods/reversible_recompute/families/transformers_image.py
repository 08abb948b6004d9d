"""Layers of image transformers, split into the two branches of a reversible block."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_bpfree.methods.reversible_recompute.families.base import Family


class TransformersViT(Family):
    """Layers of transformers' ViT, and others of its structure."""

    name = "transformers ViT layer"
    norm_names = ("layernorm_before", "layernorm_after")
    parts: ClassVar[tuple[str, ...]] = ("layernorm_before", "attention", "layernorm_after", "mlp", "dropout")

    def matches(self, layer: nn.Module) -> bool:
        """Return whether the layer has the structure, and no window."""
        return super().matches(layer) and not hasattr(layer, "window_size")

    def attention(self, layer: Any, x: Tensor, **context: Any) -> Tensor:
        """Return self-attention with dropout."""
        out: Tensor = layer.dropout(layer.attention(x, context.pop("attention_mask", None), **context)[0])
        return out

    def feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        """Return the feed-forward network with dropout."""
        out: Tensor = layer.dropout(layer.mlp(x))
        return out


class TransformersSwin(TransformersViT):
    """Layers of transformers' Swin: attention within shifted windows."""

    name = "transformers Swin layer"
    parts = (*TransformersViT.parts, "window_size", "drop_path", "cyclic_shift", "maybe_pad", "get_attn_mask")
    returns_tuple = True

    def matches(self, layer: nn.Module) -> bool:
        """Return whether the layer has the structure."""
        return Family.matches(self, layer)

    def attention(self, layer: Any, x: Tensor, **context: Any) -> Tensor:
        """Return attention within the windows of an image of ``input_dimensions``, with stochastic depth."""
        swin = sys.modules[type(layer).forward.__module__]
        height, width = context.pop("input_dimensions")
        if not context.pop("always_partition", False):
            layer.set_shift_and_window_size((height, width))
        size, channels = layer.window_size, x.shape[-1]
        image, (_, _, _, right, _, bottom) = layer.maybe_pad(x.view(len(x), height, width, channels), height, width)
        padded = image.shape[1:3]
        windows = swin.window_partition(layer.cyclic_shift(image), size).view(-1, size * size, channels)
        mask = layer.get_attn_mask(*padded, dtype=image.dtype, device=image.device)
        out = layer.dropout(layer.attention(windows, mask, **context)[0]).view(-1, size, size, channels)
        image = layer.cyclic_shift(swin.window_reverse(out, size, *padded), reverse=True)
        if right or bottom:
            image = image[:, :height, :width].contiguous()
        out = layer.drop_path(image.view(len(x), height * width, channels))
        assert isinstance(out, Tensor)
        return out


class TransformersHiera(Family):
    """Layers of transformers' Hiera; those that pool their queries or widen are stage transitions."""

    name = "transformers Hiera layer"
    norm_names = ("layernorm_before", "layernorm_after")
    parts = ("layernorm_before", "attn", "layernorm_after", "mlp", "drop_path", "query_stride")
    returns_tuple = True

    def reversible(self, layer: Any) -> bool:
        """Return whether the layer neither pools nor widens."""
        return bool(layer.query_stride == 1 and layer.hidden_size == layer.hidden_size_output)

    def attention(self, layer: Any, x: Tensor, **context: Any) -> Tensor:
        """Return mask-unit or global attention with stochastic depth."""
        out: Tensor = layer.drop_path(layer.attn(x, **context)[0])
        return out

    def feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        """Return the feed-forward network with stochastic depth."""
        out: Tensor = layer.drop_path(layer.mlp(x))
        return out
