"""Layers of text transformers, split into the two branches of a reversible block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bpfree.methods.reversible_recompute.families.base import CACHES, Family
from lightning_bpfree.methods.reversible_recompute.refused import RefusedStackError


class TextFamily(Family):
    """Layers that may support cross-attention, or accept a cache of keys and values."""

    def bind(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the input and the arguments of self-attention.

        Raises:
            RefusedStackError: for cross-attention, or a cache while gradients are computed.
        """
        x, context = super().bind(layer, args, kwargs)
        encoder, _ = context.pop("encoder_hidden_states", None), context.pop("encoder_attention_mask", None)
        if encoder is not None:
            raise RefusedStackError(
                "encoder_hidden_states is given, but layers with cross-attention have three branches and make no "
                "reversible block: convert the encoder only."
            )
        for key in CACHES:
            cache = context.pop(key, None)
            if cache is not None and torch.is_grad_enabled():
                raise RefusedStackError(
                    f"{key} is given while gradients are computed, and recomputing would fill it twice: set "
                    "config.use_cache = False for training."
                )
            if cache is not None:
                context[key] = cache
        return x, context


_BERT_OUTPUT = ("dense", "dropout", "LayerNorm")


class TransformersBert(TextFamily):
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
    """Layers of transformers' RoBERTa-PreLayerNorm: those of RoBERTa, with normalizations before the branches."""

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


class TransformersGPT2(TextFamily):
    """Layers of transformers' GPT-2, and others of its structure."""

    name = "transformers GPT-2 layer"
    parts = ("ln_1", "attn", "ln_2", "mlp")
    norm_names = ("ln_1", "ln_2")

    def attention(self, layer: Any, x: Tensor, **context: Any) -> Tensor:
        """Return causal self-attention, with the layer's dropout if it has any."""
        out: Tensor = getattr(layer, self.parts[1])(x, **context)[0]
        return out

    def feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        """Return the feed-forward network, with the layer's dropout if it has any."""
        out: Tensor = layer.mlp(x)
        return out


class TransformersLlama(TransformersGPT2):
    """Layers of transformers' Llama, Mistral, Qwen and others of their structure; not those with experts."""

    name = "transformers Llama layer"
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    norm_names = ("input_layernorm", "post_attention_layernorm")

    def matches(self, layer: Any) -> bool:
        """Return whether the layer has the structure, two normalizations, and no experts."""
        return super().matches(layer) and not any(
            hasattr(layer, name) or hasattr(layer.mlp, name)
            for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm", "experts", "gate")
        )

    def attention_kind(self, layer: Any) -> str | None:
        """Return the configuration's name of it, such as ``"sliding_attention"``; masks and rotations differ by it."""
        kinds = getattr(getattr(layer.self_attn, "config", None), "layer_types", None)
        return kinds[layer.self_attn.layer_idx] if kinds else None
