"""Layers of the library transformers, taken apart into the two branches of a reversible block."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_bpfree.nn.layer_family import CACHES, Family


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


_BERT_OUTPUT = ("dense", "dropout", "LayerNorm")


class TransformersBert(Family):
    """Layers of transformers' RoBERTa, BERT and others of their structure; post-norm."""

    name = "transformers RoBERTa/BERT layer"
    parts = ("attention", "intermediate", "output")

    def matches(self, layer: Any) -> bool:
        """Return whether the layer has the structure."""
        inner = super().matches(layer) and hasattr(layer.attention, "self") and hasattr(layer.attention, "output")
        return bool(
            inner
            and all(hasattr(out, part) for out in (layer.attention.output, layer.output) for part in _BERT_OUTPUT)
            and not hasattr(layer, "layernorm_before")
        )

    def post_norm(self, layer: Any) -> bool:
        """Return True."""
        return True

    def bind(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the input and the arguments of self-attention.

        Raises:
            ValueError: for cross-attention, or a cache while gradients are computed.
        """
        x, context = super().bind(layer, args, kwargs)
        encoder, _ = context.pop("encoder_hidden_states", None), context.pop("encoder_attention_mask", None)
        if encoder is not None:
            raise ValueError(
                "encoder_hidden_states is given, but layers with cross-attention have three branches and make no "
                "reversible block: convert the encoder only."
            )
        for key in CACHES:
            cache = context.pop(key, None)
            if cache is not None and torch.is_grad_enabled():
                raise ValueError(
                    f"{key} is given while gradients are computed, and recomputing would fill it twice: set "
                    "config.use_cache = False for training."
                )
            if cache is not None:
                context[key] = cache
        return x, context

    def attention(self, layer: Any, x: Tensor, **context: Any) -> Tensor:
        """Return self-attention and its output projection with dropout."""
        output = layer.attention.output
        out: Tensor = output.dropout(output.dense(layer.attention.self(x, **context)[0]))
        return out

    def feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        """Return both linear layers with dropout."""
        out: Tensor = layer.output.dropout(layer.output.dense(layer.intermediate(x)))
        return out

    def norms(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        """Return both ``LayerNorm``."""
        return layer.attention.output.LayerNorm, layer.output.LayerNorm


class TransformersPreNormBert(TransformersBert):
    """Layers of transformers' RoBERTa-PreLayerNorm: those of RoBERTa, with normalisations before the branches."""

    name = "transformers RoBERTa-PreLayerNorm layer"

    def matches(self, layer: Any) -> bool:
        """Return whether the layer has the structure."""
        attention = getattr(layer, "attention", None)
        norms = (attention, getattr(layer, "intermediate", None))
        return bool(Family.matches(self, layer) and all(hasattr(owner, "LayerNorm") for owner in norms)) and all(
            hasattr(attention, part) for part in ("self", "output")
        )

    def post_norm(self, layer: Any) -> bool:
        """Return False."""
        return False

    def feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        """Return both linear layers with dropout."""
        inner = layer.intermediate
        out: Tensor = layer.output.dropout(layer.output.dense(inner.intermediate_act_fn(inner.dense(x))))
        return out

    def norms(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        """Return both ``LayerNorm``."""
        return layer.attention.LayerNorm, layer.intermediate.LayerNorm
