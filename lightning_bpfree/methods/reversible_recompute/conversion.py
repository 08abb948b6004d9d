"""Conversion of an existing model's transformer layers to reversible ones, and back."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn

from lightning_bpfree.core.arguments import Name, NonNegativeInt, PositiveFloat, PositiveInt, checked
from lightning_bpfree.methods.reversible_recompute.conversion_report import Conversion
from lightning_bpfree.methods.reversible_recompute.families.base import Family, OwnBranches, Rewire
from lightning_bpfree.methods.reversible_recompute.families.known import FAMILIES, family_of
from lightning_bpfree.methods.reversible_recompute.layer_stack import ReversibleLayers
from lightning_bpfree.methods.reversible_recompute.recomputation import Schedule
from lightning_bpfree.methods.reversible_recompute.sequential import ReversibleSequential
from lightning_bpfree.methods.reversible_recompute.stream_fusion import FusionOfOneWidth

Scale = PositiveFloat | tuple[PositiveFloat, PositiveFloat]


class FunctionChangedWarning(UserWarning):
    """A module computes a different function than before, with the same weights."""


@checked
def convert_to_reversible(
    model: nn.Module,
    stacks: Name | Iterable[Name] = "all",
    schedule: Schedule = "sequential",
    *,
    rewire: Rewire | None = None,
    scale: Scale | None = None,
    fusion: FusionOfOneWidth | None = None,
    branches: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None,
    buffer_every: PositiveInt | Literal["auto"] | None = "auto",
    max_error: PositiveFloat | None = None,
    check_every: PositiveInt = 1,
    store_last: NonNegativeInt = 0,
    warn: bool = True,
) -> Conversion:
    """Make the layers of a model reversible, in place.

    Every stack, an ``nn.ModuleList`` or ``nn.Sequential`` of transformer layers, is replaced by
    :class:`ReversibleLayers` of the same layers: weights and parameter names do not change, so old checkpoints load.
    **The function changes**: two streams replace one, so a trained model must be fine-tuned or retrained.

    Known layers: ``torch.nn.TransformerEncoderLayer``; transformers' ViT, Swin, Hiera, RoBERTa and BERT, GPT-2, and
    Llama and models with its structure, such as Mistral and Qwen; timm's ViT and Swin blocks. They are recognized by
    their structure, and the branches of the first layer are compared with the layer's own output at the first call.

    Args:
        model: the model, for example a LightningModule.
        stacks: names of the stacks, such as ``"encoder.layers"``; ``"all"`` for all stacks of known layers.
        schedule: ``"autograd"``, ``"checkpoint"``, ``"sequential"`` or ``"parallel"``.
        rewire: how to convert post-norm layers, whose output is a normalization instead of a sum: ``"pre_norm"`` puts
            the normalizations before the branches (train from scratch); ``"scaled"`` keeps each whole sublayer as a
            branch and scales the skips (close to the trained function for small scales).
        scale: factors of the skips; a number for both. None: 0.1 for ``"scaled"``, else 1. The error of recovered
            inputs grows by ``1 / (s1 s2)`` per block.
        fusion: how two streams become one: a mode of ``StreamFusion`` that keeps the width. None: ``"second"`` for
            ``"scaled"``, else ``"mean"``.
        branches: ``(f, g)`` for layers of no known family: functions of a layer, its input and keyword arguments, with
            the normalization inside and without the skip.
        buffer_every: keep the inputs of every n-th block; ``"auto"``: chosen by the scales; None for none.
        max_error: largest allowed relative error of recovered inputs; None: 0.01 if skips are scaled, else any.
        check_every: measure it in every n-th pass, at least 1.
        store_last: number of blocks at the top that keep their activations, at least 0.
        warn: whether to warn that the function changes.

    Returns:
        The replaced stacks, with a way to undo the conversion.

    Raises:
        ValueError: if a name is unknown, holds layers of no known family or of several, post-norm layers lack
            ``rewire``, or a fusion changes the width.

    References:
        B. Liao, S. Tan, C. Monz, "Make Pre-trained Model Reversible", 2023, arXiv 2306.00477: scaled skips.
    """
    scales = scales_of(rewire, scale)
    if branches is not None and rewire is not None:
        raise ValueError(
            f"convert_to_reversible: rewire={rewire!r} with branches=(f, g), which are used unchanged: leave it out."
        )
    own = OwnBranches(*branches) if branches is not None else None
    conversion = Conversion()
    lists = {path: _find(model, path) for path in _paths(model, stacks)}
    # All are looked at before any is replaced: an error leaves the model as it was.
    families = {path: own or _family(path, layers, rewire) for path, layers in lists.items()}
    for path, family in families.items():
        stack = ReversibleLayers(
            list(lists[path].children()),
            family,
            schedule,
            rewire=rewire,
            scale=scales,
            fusion=fusion or ("second" if rewire == "scaled" else "mean"),
            buffer_every=buffer_every,
            max_error=0.01 if max_error is None and scales != (1.0, 1.0) else max_error,
            check_every=check_every,
            store_last=store_last,
        )
        stack.training = lists[path].training  # of itself alone: a layer may be in another mode
        conversion.replace(path, _owners(model, lists[path]), stack)
    if warn:
        warnings.warn(
            f"Made reversible, which CHANGES THE FUNCTION of the model (two streams instead of one, with the same "
            f"weights): train it from scratch or fine-tune it.\n{conversion}",
            FunctionChangedWarning,
            stacklevel=2,
        )
    return conversion


def scales_of(rewire: Rewire | None, scale: Scale | None) -> tuple[float, float]:
    """Return the scales of both skips.

    Examples:
        >>> scales_of("scaled", None), scales_of(None, 0.5)
        ((0.1, 0.1), (0.5, 0.5))
    """
    if scale is None:
        return (0.1, 0.1) if rewire == "scaled" else (1.0, 1.0)
    first, second = (scale, scale) if isinstance(scale, int | float) else scale
    return float(first), float(second)


def _paths(model: nn.Module, stacks: str | Iterable[str]) -> list[str]:
    if stacks != "all":
        named = [stacks] if isinstance(stacks, str) else list(dict.fromkeys(stacks))
        if not named:
            raise ValueError("stacks=[] is empty: name at least one list of layers, or give 'all' for all known ones.")
        return named
    found = convertible(model)
    if not found:
        raise ValueError(
            f"stacks='all', but {type(model).__name__} has no nn.ModuleList or nn.Sequential of known layers "
            f"({', '.join(family.name for family in FAMILIES)}): name the stacks, and give branches=(f, g) for layers "
            "of your own."
        )
    return found


def convertible(model: nn.Module) -> list[str]:
    """Return the names of all lists of layers that :func:`convert_to_reversible` knows.

    Examples:
        >>> layer = nn.TransformerEncoderLayer(8, 2, norm_first=True)
        >>> convertible(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))
        ['layers']
    """
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module)
        and path
        and all(family_of(layer) is not None for layer in module)
        and any(family.reversible(layer) for layer in module if (family := family_of(layer)) is not None)
    ]


def _find(model: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    names = dict(model.named_modules(remove_duplicate=False))
    if path not in names or not path:
        lists = [name for name, module in names.items() if isinstance(module, nn.ModuleList | nn.Sequential) and name]
        near = difflib.get_close_matches(path, lists, n=5, cutoff=0.0)
        raise ValueError(
            f"stacks names {path!r}, which the model does not have. Its lists of layers: {', '.join(near)}."
        )
    module = names[path]
    if isinstance(module, ReversibleLayers | ReversibleSequential):
        raise ValueError(f"stacks names {path!r}, which is already reversible: set its schedule instead.")
    if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
        raise ValueError(
            f"stacks names {path!r}, a {type(module).__name__}; give the nn.ModuleList or nn.Sequential of layers"
            + (" (a compiled module is compiled after its conversion)." if hasattr(module, "_orig_mod") else ".")
        )
    return module


def _owners(model: nn.Module, stack: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return every place that holds the list."""
    return [(owner, name) for owner in model.modules() for name, child in owner._modules.items() if child is stack]


def _family(path: str, stack: Any, rewire: Rewire | None) -> Family:
    found = [family_of(layer) for layer in stack]
    for layer, family in zip(stack, found, strict=True):
        if family is None or family is not found[0]:
            raise ValueError(
                f"stacks names {path!r}, which holds a {type(layer).__name__} "
                + ("of no known family" if family is None else f"beside a {found[0].name}" if found[0] else "")
                + f". Known are {', '.join(f.name for f in FAMILIES)}; for others give branches=(f, g)."
                + (" A compiled layer is compiled after its conversion." if hasattr(layer, "_orig_mod") else "")
            )
    family = found[0]
    assert family is not None
    post = [family.post_norm(layer) for layer in stack]
    if any(post) and rewire is None:
        raise ValueError(
            f"{path!r} holds post-norm layers ({family.name}), whose output is a normalization, which cannot be "
            "inverted. Choose rewire='pre_norm' (normalizations before the branches; train from scratch) or "
            "rewire='scaled' (whole sublayers with scaled skips; close to the trained function)."
        )
    if not all(post) and rewire is not None:
        raise ValueError(f"rewire={rewire!r} is for post-norm layers; {path!r} holds pre-norm ones: leave it out.")
    kinds = {str(kind): None for layer in stack if (kind := family.attention_kind(layer)) is not None}
    if len(kinds) > 1:
        raise ValueError(
            f"{path!r} holds layers of several kinds of attention ({', '.join(kinds)}), each with its "
            "own mask, but a reversible stack takes one mask for all its layers: configure one kind, or leave this "
            "stack out."
        )
    if not any(family.reversible(layer) for layer in stack):
        raise ValueError(f"all layers of {path!r} change the shape of their input: none can be reversible.")
    return family
