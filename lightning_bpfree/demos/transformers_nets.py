"""Small networks of Hugging Face's transformers, built from their configurations: no weights are downloaded.

They are ordinary modules, with layers that :func:`~lightning_bpfree.convert_to_reversible` supports. Weights are drawn
with a standard deviation of ``1 / sqrt(width)``: the configurations' 0.02 suits widths near 1,000, but narrow networks
learn slowly with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import AtLeastTwo, FractionBelowOne, ImageShape, PositiveInt, PositiveInts, checked

__all__ = ["RobertaEncoderLM", "SwinTransformer", "VisionTransformer"]


def _library(net: nn.Module) -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{type(net).__name__} needs transformers: pip install "lightning-bpfree[vision]"'
        ) from error
    return transformers


def _check_heads(dim: int, heads: int) -> None:
    if dim % heads:
        raise ValueError(f"dim is {dim} and heads {heads}; make dim a multiple of heads.")


class _ImageClassifier(nn.Module):
    """What both networks for images share: checks, and logits of ``self.model``."""

    model: nn.Module

    def __init__(self, in_shape: ImageShape, patch: PositiveInt) -> None:
        super().__init__()
        _, h, w = in_shape
        if h % patch or w % patch:
            raise ValueError(f"patch is {patch}, which does not divide the image of {h} x {w}; choose one that does.")
        self.in_shape = tuple(in_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, num_classes), of images of shape (B, C, H, W)."""
        if x.shape[1:] != self.in_shape:
            raise ValueError(
                f"{type(self).__name__} was built for inputs of shape {('B', *self.in_shape)}, got {tuple(x.shape)}; "
                "build it with the data's shape, or feed it such inputs."
            )
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


class VisionTransformer(_ImageClassifier):
    """transformers' ``ViTForImageClassification`` with random weights: pre-norm, learned positions, a class token.

    Its layers are ``model.vit.layers``.

    Args:
        in_shape: Shape (C, H, W) of one image.
        num_classes: Width of the output, at least 1.
        dim: Width of a token, a multiple of `heads`.
        depth: Layers, at least 1.
        heads: Attention heads, at least 1.
        patch: Side of a square patch, which divides H and W; each is a token.
        mlp_ratio: Width of a layer's feed-forward part over `dim`.
        dropout: Dropout probability of embeddings, attention and branches, in [0, 1).

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: An argument is out of range, or an input does not have `in_shape`.

    Example:
        >>> VisionTransformer((1, 8, 8), dim=16, depth=2)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])

    References:
        A. Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, arXiv 2010.11929.
    """

    @checked
    def __init__(
        self,
        in_shape: ImageShape = (1, 8, 8),
        num_classes: PositiveInt = 10,
        dim: PositiveInt = 64,
        depth: PositiveInt = 8,
        heads: PositiveInt = 4,
        patch: PositiveInt = 2,
        mlp_ratio: PositiveInt = 2,
        dropout: FractionBelowOne = 0.0,
    ) -> None:
        super().__init__(in_shape, patch)
        _check_heads(dim, heads)
        library = _library(self)
        config = library.ViTConfig(
            image_size=tuple(in_shape[1:]),
            num_channels=in_shape[0],
            patch_size=patch,
            hidden_size=dim,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp_ratio * dim,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            initializer_range=dim**-0.5,
            num_labels=num_classes,
        )
        self.model = library.ViTForImageClassification(config)


class SwinTransformer(_ImageClassifier):
    """transformers' ``SwinForImageClassification`` with random weights: stages of attention in shifted windows.

    Between two stages, patches are merged: half the height and width, twice the width of a token. The layers of a stage
    keep their shape; those of stage i are ``model.swin.encoder.layers[i].blocks``.

    Args:
        in_shape: Shape (C, H, W) of one image.
        num_classes: Width of the output, at least 1.
        dim: Width of a token in the first stage, a multiple of its heads.
        depths: Layers of each stage, each at least 1.
        heads: Attention heads of each stage; the width of stage i, ``dim * 2**i``, is a multiple of its own.
        window: Side of a window in tokens, from 1 to the height and width of the last stage.
        patch: Side of a square patch, which divides H and W.
        drop_path: Probability that the last layer's branches are left out for a sample, in [0, 1); that of earlier
            layers grows from 0 up to it.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: An argument is out of range, or an input does not have `in_shape`.

    Example:
        >>> SwinTransformer((1, 28, 28), dim=8, depths=(1, 1))(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])

    References:
        Z. Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021, arXiv
        2103.14030.
    """

    @checked
    def __init__(
        self,
        in_shape: ImageShape = (1, 28, 28),
        num_classes: PositiveInt = 10,
        dim: PositiveInt = 32,
        depths: PositiveInts = (2, 2),
        heads: PositiveInts = (2, 4),
        window: PositiveInt = 7,
        patch: PositiveInt = 2,
        drop_path: FractionBelowOne = 0.0,
    ) -> None:
        super().__init__(in_shape, patch)
        if len(depths) != len(heads):
            raise ValueError(
                f"depths is {tuple(depths)} and heads {tuple(heads)}; give one number of each for every stage."
            )
        rows, columns = (side // patch for side in in_shape[1:])
        for stage, number in enumerate(heads):
            _check_heads(dim * 2**stage, number)
            if window > min(rows, columns):
                raise ValueError(
                    f"window is {window}, but stage {stage} has {rows} x {columns} tokens; give at most "
                    f"{min(rows, columns)}, fewer stages, or smaller patches."
                )
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        library = _library(self)
        config = library.SwinConfig(
            image_size=tuple(in_shape[1:]),
            num_channels=in_shape[0],
            patch_size=patch,
            embed_dim=dim,
            depths=list(depths),
            num_heads=list(heads),
            window_size=window,
            drop_path_rate=drop_path,
            initializer_range=(dim * 2 ** (len(depths) - 1)) ** -0.5,
            num_labels=num_classes,
        )
        self.model = library.SwinForImageClassification(config)


class RobertaEncoderLM(nn.Module):
    """transformers' ``RobertaForMaskedLM`` with random weights: an encoder from tokens to logits of tokens.

    Its layers are ``model.roberta.encoder.layer``; with `norm_first`, which makes it a
    ``RobertaPreLayerNormForMaskedLM``, they are ``model.roberta_prelayernorm.encoder.layer``. There is no padding
    token: every position attends to all others.

    Args:
        vocab_size: Number of tokens, at least 2; 129 for the characters of
            :class:`~lightning_bpfree.demos.text.StandardLibraryTextDataModule`.
        dim: Width of a token, a multiple of `heads`.
        depth: Layers, at least 1.
        heads: Attention heads, at least 1.
        mlp_ratio: Width of a layer's feed-forward part over `dim`.
        max_length: Longest sequence, at least 1.
        dropout: Dropout probability of embeddings, attention and branches, in [0, 1).
        norm_first: Normalize before the branches of a layer rather than after its skips, as RoBERTa does.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: An argument is out of range, or an input is not of shape (B, T) with T up to `max_length`.

    Example:
        >>> RobertaEncoderLM(dim=16, depth=2)(torch.zeros(5, 64, dtype=torch.int64)).shape
        torch.Size([5, 64, 129])

    References:
        Y. Liu et al., "RoBERTa: A Robustly Optimized BERT Pretraining Approach", 2019, arXiv 1907.11692.
    """

    @checked
    def __init__(
        self,
        vocab_size: AtLeastTwo = 129,
        dim: PositiveInt = 64,
        depth: PositiveInt = 4,
        heads: PositiveInt = 4,
        mlp_ratio: PositiveInt = 4,
        max_length: PositiveInt = 64,
        dropout: FractionBelowOne = 0.0,
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        _check_heads(dim, heads)
        library = _library(self)
        kind = "RobertaPreLayerNorm" if norm_first else "Roberta"
        config = getattr(library, f"{kind}Config")(
            vocab_size=vocab_size,
            hidden_size=dim,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp_ratio * dim,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            max_position_embeddings=max_length,
            initializer_range=dim**-0.5,
            type_vocab_size=1,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.max_length = max_length
        self.model = getattr(library, f"{kind}ForMaskedLM")(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, shape (B, T, vocab_size), of tokens int64 of shape (B, T)."""
        if tokens.dim() != 2 or tokens.shape[1] > self.max_length:
            raise ValueError(
                f"RobertaEncoderLM was built for tokens of shape ('B', up to {self.max_length}), got "
                f"{tuple(tokens.shape)}; build it with a larger max_length, or feed it such tokens."
            )
        # Given the positions, RoBERTa does not look for a padding token, which there is none of.
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        logits: Tensor = self.model(input_ids=tokens, position_ids=positions).logits
        return logits
