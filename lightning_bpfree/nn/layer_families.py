"""Transformer layers of known structure, taken apart into the two branches of a reversible block."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Rewire = Literal["pre_norm", "scaled"]


class Family:
    """Layers made of an attention and a feed-forward branch, each with a skip and a normalisation.

    A family knows its layers by their structure rather than by their class, so that no library is imported for it. What
    it takes apart is compared with the layer's own output before it is used.
    """

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]  # attributes that all of its layers have
    returns_tuple: ClassVar[bool] = False
    checked: ClassVar[bool] = True  # whether the branches are to add up to the layer

    def matches(self, layer: nn.Module) -> bool:
        """Return whether the layer has this family's structure."""
        return all(getattr(layer, part, None) is not None for part in self.parts)

    def reversible(self, layer: nn.Module) -> bool:
        """Return whether the layer keeps the shape of its input."""
        return True

    def post_norm(self, layer: nn.Module) -> bool:
        """Return whether normalisations come after the skips."""
        return False

    def bind(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the input of the layer's forward, and all other arguments by name, as branches take them."""
        signature = inspect.signature(type(layer).forward)
        arguments = dict(signature.bind(layer, *args, **kwargs).arguments)
        names = list(signature.parameters)
        arguments.pop(names[0])
        x = arguments.pop(names[1])
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
        return x, arguments

    def attention(self, layer: Any, x: Tensor, **context: Any) -> Tensor:
        """Return the attention branch of a normalised input, without its skip."""
        raise NotImplementedError

    def feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        """Return the feed-forward branch of a normalised input, without its skip."""
        raise NotImplementedError

    def norms(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        """Return the normalisations of the attention and of the feed-forward branch."""
        raise NotImplementedError

    # --- what a reversible block is made of ---

    def branches(self, layer: nn.Module, rewire: Rewire | None) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """Return ``f`` and ``g``, functions of the layer, a tensor and the context."""
        return (self.whole_attention, self.whole_feed_forward) if rewire == "scaled" else (self.first, self.second)

    def first(self, layer: nn.Module, x: Tensor, **context: Any) -> Tensor:
        """Return the attention of the normalised input."""
        return self.attention(layer, self.norms(layer)[0](x), **context)

    def second(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the feed-forward branch of the normalised input."""
        return self.feed_forward(layer, self.norms(layer)[1](x))

    def whole_attention(self, layer: nn.Module, x: Tensor, **context: Any) -> Tensor:
        """Return the attention sublayer of a post-norm layer, with its skip and normalisation."""
        out: Tensor = self.norms(layer)[0](x + self.attention(layer, x, **context))
        return out

    def whole_feed_forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the feed-forward sublayer of a post-norm layer, with its skip and normalisation."""
        out: Tensor = self.norms(layer)[1](x + self.feed_forward(layer, x))
        return out

    def original(self, layer: nn.Module, x: Tensor, context: Mapping[str, Any]) -> Tensor:
        """Return the layer's own output, put together from the branches."""
        if self.post_norm(layer):
            return self.whole_feed_forward(layer, self.whole_attention(layer, x, **context))
        x = x + self.first(layer, x, **context)
        return x + self.second(layer, x)

    def channels(self, layer: nn.Module) -> int:
        """Return the width of the layer's input."""
        weight = self.norms(layer)[0].weight
        assert isinstance(weight, Tensor)
        return weight.numel()


class TorchEncoderLayer(Family):
    """``torch.nn.TransformerEncoderLayer``."""

    name = "torch.nn.TransformerEncoderLayer"
    parts = ("self_attn", "linear1", "linear2", "norm1", "norm2", "_sa_block", "_ff_block")

    def post_norm(self, layer: Any) -> bool:
        """Return whether the layer was made with ``norm_first=False``."""
        return not layer.norm_first

    def attention(self, layer: Any, x: Tensor, **context: Any) -> Tensor:
        """Return self-attention with dropout."""
        mask, padding = context.get("src_mask"), context.get("src_key_padding_mask")
        out: Tensor = layer._sa_block(x, mask, padding, is_causal=context.get("is_causal", False))
        return out

    def feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        """Return both linear layers with dropout."""
        out: Tensor = layer._ff_block(x)
        return out

    def norms(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        """Return ``norm1`` and ``norm2``."""
        return layer.norm1, layer.norm2


class TransformersViT(Family):
    """Layers of transformers' ViT, and others of its structure."""

    name = "transformers ViT layer"
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

    def norms(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        """Return ``layernorm_before`` and ``layernorm_after``."""
        return layer.layernorm_before, layer.layernorm_after


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

    def norms(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        """Return ``layernorm_before`` and ``layernorm_after``."""
        return layer.layernorm_before, layer.layernorm_after


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
        for key in ("cache", "past_key_values", "past_key_value"):
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


_BERT_OUTPUT = ("dense", "dropout", "LayerNorm")


class TimmBlock(Family):
    """Blocks of timm's ViT and Swin: scaled residual branches with stochastic depth."""

    name = "timm block"
    parts = ("norm1", "norm2", "mlp", "drop_path1", "drop_path2")

    def matches(self, layer: Any) -> bool:
        """Return whether the layer is a ViT block, or a Swin block with a ``_attn`` of its own."""
        return super().matches(layer) and (hasattr(layer, "attn") or hasattr(layer, "_attn"))

    def attention(self, layer: Any, x: Tensor, **context: Any) -> Tensor:
        """Return attention, within windows for Swin, scaled and with stochastic depth."""
        out = layer._attn(x) if hasattr(layer, "_attn") else layer.attn(x, **context)
        out = layer.drop_path1(_scaled(layer, "ls1", out))
        assert isinstance(out, Tensor)
        return out

    def feed_forward(self, layer: Any, x: Tensor) -> Tensor:
        """Return the feed-forward network, scaled and with stochastic depth."""
        out: Tensor = layer.drop_path2(_scaled(layer, "ls2", layer.mlp(x)))
        return out

    def norms(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        """Return ``norm1`` and ``norm2``."""
        return layer.norm1, layer.norm2


def _scaled(layer: Any, name: str, x: Tensor) -> Any:
    return getattr(layer, name)(x) if hasattr(layer, name) else x


class OwnBranches(Family):
    """Layers whose branches the caller gives.

    Args:
        f: function of a layer, a tensor and keyword arguments, with its normalisation inside and without its skip.
        g: likewise.
    """

    name = "branches given"
    parts = ()
    checked = False

    def __init__(self, f: Callable[..., Tensor], g: Callable[..., Tensor]) -> None:
        self.f, self.g = f, g

    def branches(self, layer: nn.Module, rewire: Rewire | None) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """Return both."""
        return self.f, self.g


FAMILIES: tuple[Family, ...] = (
    TorchEncoderLayer(),
    TransformersSwin(),
    TransformersViT(),
    TransformersHiera(),
    TransformersBert(),
    TimmBlock(),
)


def family_of(layer: nn.Module) -> Family | None:
    """Return the family that the layer's structure belongs to; None if it is not known.

    Examples:
        >>> family_of(nn.TransformerEncoderLayer(8, 2)).name
        'torch.nn.TransformerEncoderLayer'
        >>> family_of(nn.Linear(2, 2))
    """
    return next((family for family in FAMILIES if family.matches(layer)), None)
