"""New ViT, Swin, Hiera and RoBERTa models of transformers with reversible layers."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, cast

from torch import nn
from typing_extensions import Unpack  # torch needs it too

from lightning_bpfree.core.arguments import NonNegativeInt, PositiveFloat, PositiveInt, checked
from lightning_bpfree.methods.reversible_recompute.conversion import Scale, convert_to_reversible
from lightning_bpfree.methods.reversible_recompute.families.base import Rewire
from lightning_bpfree.methods.reversible_recompute.layer_stack import ReversibleLayers
from lightning_bpfree.methods.reversible_recompute.recomputation import Schedule
from lightning_bpfree.methods.reversible_recompute.sequential import ReversibleSequential
from lightning_bpfree.methods.reversible_recompute.stream_fusion import Fusion, FusionOfOneWidth

RobertaHead = Literal["masked_lm", "sequence_classification", "causal_lm"]
_ROBERTA: dict[RobertaHead, str] = {
    "masked_lm": "RobertaForMaskedLM",
    "sequence_classification": "RobertaForSequenceClassification",
    "causal_lm": "RobertaForCausalLM",
}


class Recompute(TypedDict, total=False):
    """Options of all builders, as :func:`convert_to_reversible` takes them.

    Args:
        schedule: ``"autograd"``, ``"checkpoint"``, ``"sequential"`` (default) or ``"parallel"``.
        buffer_every: keep the inputs of every n-th block; ``"auto"`` (default): chosen by the scales of the skips; None
            for none.
        max_error: largest relative error of recovered inputs, above 0; None for any.
        check_every: measure it in every n-th pass, at least 1.
        store_last: number of blocks at the top of each stack that keep their activations, at least 0.
    """

    schedule: Schedule
    buffer_every: PositiveInt | Literal["auto"] | None
    max_error: PositiveFloat | None
    check_every: PositiveInt
    store_last: NonNegativeInt


@checked
def reversible_vit(config: Any = None, *, fusion: Fusion = "concat", **recompute: Unpack[Recompute]) -> nn.Module:
    """Build a vision transformer for classification with reversible layers: Rev-ViT.

    Args:
        config: a ``transformers.ViTConfig``, or its keyword arguments in a dict; None for its defaults.
        fusion: how two streams become one after the last layer: ``"concat"``, the paper's choice, for which the final
            normalization and the classifier have twice the channels; or a mode of
            :class:`~lightning_bpfree.StreamFusion` that keeps the width.
        **recompute: see :class:`Recompute`.

    Returns:
        A ``transformers.ViTForImageClassification``. The classifier uses the class token; the paper's models have none.

    Raises:
        ImportError: if transformers is not installed.
        TypeError: for a config of another kind, or an unknown option.
        ValueError: for an unknown keyword of a config, or an option out of range.

    Shape:
        - Input: images (B, C, H, W).
        - Output: an object whose ``logits`` are (B, num_labels).

    Examples:
        >>> import torch
        >>> size = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 3}
        >>> model = reversible_vit({**size, "image_size": 8, "patch_size": 4, "num_labels": 5}, schedule="parallel")
        >>> model(torch.randn(2, 3, 8, 8)).logits.shape
        torch.Size([2, 5])
        >>> model.classifier.in_features
        16

    References:
        K. Mangalam et al., "Reversible Vision Transformers", 2022, arXiv 2302.04869.
    """
    model = _built("ViTForImageClassification", "ViTConfig", config)
    if fusion != "concat":
        return _converted(model, recompute, fusion=fusion)
    # A conversion keeps the width, because it does not know what follows. Here that is known, and made again.
    _converted(model, recompute)
    path, stack = next((path, m) for path, m in model.named_modules() if isinstance(m, ReversibleLayers))
    layers = ReversibleLayers([*stack.children()], stack.family, fusion="concat", **recompute)
    model.set_submodule(path, layers)
    width = 2 * model.config.hidden_size
    model.vit.layernorm = nn.LayerNorm(width, eps=model.config.layer_norm_eps)
    if model.config.num_labels > 0:
        model.classifier = nn.Linear(width, model.config.num_labels)
        nn.init.trunc_normal_(model.classifier.weight, std=model.config.initializer_range)
        nn.init.zeros_(model.classifier.bias)
    return cast(nn.Module, model)


@checked
def reversible_swin(
    config: Any = None, *, fusion: FusionOfOneWidth = "mean", **recompute: Unpack[Recompute]
) -> nn.Module:
    """Build a shifted-window transformer for classification with a reversible stack in every stage: Rev-Swin.

    Patch merging between stages stays ordinary, so memory grows with the number of stages but not with their depths.

    Args:
        config: a ``transformers.SwinConfig``, or its keyword arguments in a dict; None for its defaults.
        fusion: how two streams become one after every stage, the last one included: a mode of
            :class:`~lightning_bpfree.StreamFusion` that keeps the width. ``"mean"`` adds no parameters;
            ``"concat_linear"`` is closest to the authors' choice.
        **recompute: see :class:`Recompute`.

    Returns:
        A ``transformers.SwinForImageClassification``.

    Raises:
        ImportError: if transformers is not installed.
        TypeError: for a config of another kind, or an unknown option.
        ValueError: for an unknown keyword of a config, or an option out of range.

    Shape:
        - Input: images (B, C, H, W).
        - Output: an object whose ``logits`` are (B, num_labels).

    Examples:
        >>> import torch
        >>> size = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 2, "drop_path_rate": 0.1}
        >>> model = reversible_swin({**size, "image_size": 16, "patch_size": 2, "num_labels": 5})
        >>> model(torch.randn(2, 3, 16, 16)).logits.shape
        torch.Size([2, 5])

    References:
        Z. Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021, arXiv
        2103.14030.
        T. Zhu, K. Mangalam, "PaReprop: Fast Parallelized Reversible Backpropagation", 2023, arXiv 2306.09342.
    """
    model = _built("SwinForImageClassification", "SwinConfig", config)
    return _converted(model, recompute, fusion=fusion)


@checked
def reversible_hiera(
    config: Any = None, *, fusion: FusionOfOneWidth = "mean", **recompute: Unpack[Recompute]
) -> nn.Module:
    """Build Hiera for classification with reversible stacks: a multiscale transformer without convolutions.

    Layers that pool queries or increase the width stay ordinary; a stage of one such layer has no reversible stack.

    Args:
        config: a ``transformers.HieraConfig``, or its keyword arguments in a dict; None for its defaults.
        fusion: how two streams become one after every run of reversible layers: a mode of
            :class:`~lightning_bpfree.StreamFusion` that keeps the width.
        **recompute: see :class:`Recompute`.

    Returns:
        A ``transformers.HieraForImageClassification``.

    Raises:
        ImportError: if transformers is not installed.
        TypeError: for a config of another kind, or an unknown option.
        ValueError: for an unknown keyword of a config, or an option out of range.

    Shape:
        - Input: images (B, C, H, W).
        - Output: an object whose ``logits`` are (B, num_labels).

    Examples:
        >>> import torch
        >>> size = {"embed_dim": 8, "depths": [2, 3], "num_heads": [1, 2], "masked_unit_attention": [True, False]}
        >>> unit = {"image_size": [32, 32], "masked_unit_size": [4, 4], "num_query_pool": 1, "num_labels": 5}
        >>> model = reversible_hiera({**size, **unit})
        >>> model(torch.randn(2, 3, 32, 32)).logits.shape
        torch.Size([2, 5])

    References:
        C. Ryali et al., "Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles", 2023, arXiv
        2306.00989.
    """
    model = _built("HieraForImageClassification", "HieraConfig", config)
    return _converted(model, recompute, fusion=fusion)


@checked
def reversible_roberta(
    config: Any = None,
    *,
    head: RobertaHead = "masked_lm",
    rewire: Rewire = "pre_norm",
    scale: Scale | None = None,
    fusion: FusionOfOneWidth | None = None,
    **recompute: Unpack[Recompute],
) -> nn.Module:
    """Build RoBERTa with reversible layers: Rev-RoBERTa.

    RoBERTa applies its normalizations after the skips, which cannot be inverted; the paper does not say how it changed
    them. Here they are applied before the branches, with the same parameters.

    Args:
        config: a ``transformers.RobertaConfig``, or its keyword arguments in a dict; None for its defaults.
        head: ``"masked_lm"``, ``"sequence_classification"``, or ``"causal_lm"``, for which a copy of the config is set
            to ``is_decoder=True`` and ``use_cache=False``.
        rewire: ``"pre_norm"``, or ``"scaled"`` for whole sublayers as branches with scaled skips.
        scale: factors of the skips; None: 0.1 for ``"scaled"``, else 1.
        fusion: how two streams become one after the last layer: a mode of
            :class:`~lightning_bpfree.StreamFusion` that keeps the width. None: ``"second"`` for
            ``"scaled"``, else ``"mean"``.
        **recompute: see :class:`Recompute`.

    Returns:
        A ``transformers.RobertaForMaskedLM``, ``RobertaForSequenceClassification`` or ``RobertaForCausalLM``.

    Raises:
        ImportError: if transformers is not installed.
        TypeError: for a config of another kind, or an unknown option.
        ValueError: for an unknown keyword of a config or head, or an option out of range.

    Shape:
        - Input: numbers of tokens (B, T).
        - Output: an object whose ``logits`` are (B, T, vocab_size), or (B, num_labels).

    Examples:
        >>> import torch
        >>> size = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 3}
        >>> model = reversible_roberta({**size, "vocab_size": 20, "max_position_embeddings": 12})
        >>> model(torch.randint(3, 20, (2, 6))).logits.shape
        torch.Size([2, 6, 20])

    References:
        Y. Liu et al., "RoBERTa: A Robustly Optimized BERT Pretraining Approach", 2019, arXiv 1907.11692.
        T. Zhu, K. Mangalam, "PaReprop: Fast Parallelized Reversible Backpropagation", 2023, arXiv 2306.09342.
    """
    causal = {"is_decoder": True, "use_cache": False} if head == "causal_lm" else {}
    model = _built(_ROBERTA[head], "RobertaConfig", config, **causal)
    return _converted(model, recompute, rewire=rewire, scale=scale, fusion=fusion)


@checked
def set_schedule(model: nn.Module, schedule: Schedule) -> int:
    """Set how all reversible stacks of a model recover their activations; may be called between two passes.

    Args:
        model: any module, for example a LightningModule.
        schedule: ``"autograd"``, ``"checkpoint"``, ``"sequential"`` or ``"parallel"``.

    Returns:
        The number of stacks.

    Raises:
        ValueError: if there are none, or for an unknown schedule.

    Examples:
        >>> from lightning_bpfree.methods.reversible_recompute.models.mvit import ReversibleMViT
        >>> set_schedule(ReversibleMViT((3, 8, 8), 10, dim=8, depths=(1, 1), patch=4), "parallel")
        2
    """
    stacks = [m for m in model.modules() if isinstance(m, ReversibleLayers | ReversibleSequential)]
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no reversible stack: build one, or convert its layers by "
            "convert_to_reversible or the ReversibleRecompute callback first."
        )
    for stack in stacks:
        stack.schedule = schedule
    return len(stacks)


def _built(model: str, kind: str, config: Any, **forced: Any) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f'{model} comes from transformers: pip install "lightning-bpfree[vision]".') from error
    made = _config(getattr(transformers, kind), config)
    for key, value in forced.items():
        setattr(made, key, value)
    return getattr(transformers, model)(made)


def _config(kind: Any, config: Any) -> Any:
    if isinstance(config, kind):
        return copy.deepcopy(config)
    if not isinstance(config, Mapping | None):
        raise TypeError(
            f"config is a {type(config).__name__}; give a {kind.__name__}, its keyword arguments in a dict, or None."
        )
    default = kind()
    for key in config or {}:
        # A config takes any keyword and keeps it, misspelled ones too.
        if not hasattr(default, key) and key != "attn_implementation":
            near = difflib.get_close_matches(key, vars(default), cutoff=0.0)
            raise ValueError(
                f"config has {key!r}, which {kind.__name__} does not know; similar names: {', '.join(near)}."
            )
    return kind(**(config or {}))


def _converted(model: Any, recompute: Any, **options: Any) -> nn.Module:
    # Nothing is trained yet, so no function is lost.
    convert_to_reversible(model, warn=False, **recompute, **options)
    return cast(nn.Module, model)
