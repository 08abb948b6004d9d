"""The transformer layers that can be split into the two branches of a reversible block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_bpfree.methods.reversible_recompute.families.base import Family
from lightning_bpfree.methods.reversible_recompute.families.transformers_image import (
    TransformersHiera,
    TransformersSwin,
    TransformersViT,
)
from lightning_bpfree.methods.reversible_recompute.families.transformers_text import (
    TransformersBert,
    TransformersGPT2,
    TransformersLlama,
    TransformersPreNormBert,
)


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


class TimmBlock(Family):
    """Blocks of timm's ViT and Swin: scaled residual branches with stochastic depth."""

    name = "timm block"
    parts = ("norm1", "norm2", "mlp", "drop_path1", "drop_path2")

    def matches(self, layer: Any) -> bool:
        """Return whether the layer is a ViT block, or a Swin block with its own ``_attn``."""
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


def _scaled(layer: Any, name: str, x: Tensor) -> Any:
    return getattr(layer, name)(x) if hasattr(layer, name) else x


FAMILIES: tuple[Family, ...] = (
    TorchEncoderLayer(),
    TransformersSwin(),
    TransformersViT(),
    TransformersHiera(),
    TransformersBert(),
    TransformersPreNormBert(),
    TransformersGPT2(),
    TransformersLlama(),
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
