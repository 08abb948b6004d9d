"""Rewards for generated images: callables and torchmetrics, called according to their signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

Score = Callable[..., Any]


def takes_prompts(score: Score) -> bool:
    """Return whether to call a score with the numbers of the prompts after the images.

    It is if it has two or more arguments without a default; metrics of torchmetrics are by what ``update`` takes.

    Examples:
        >>> takes_prompts(lambda images: images), takes_prompts(lambda images, prompts: images)
        (False, True)
    """
    called: Any = score
    if isinstance(score, Metric):
        called = score.update
    elif isinstance(score, nn.Module):
        called = score.forward
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    arguments = inspect.signature(called).parameters.values()
    return sum(a.kind in kinds and a.default is inspect.Parameter.empty for a in arguments) >= 2


def scored(score: Score, images: Tensor, prompts: Tensor) -> Tensor:
    """Return the score of a batch by a reward or a judge: a number per image, shape (B,), or one for all, shape ().

    Args:
        score: the callable or metric.
        images: in 0 to 1, shape (B, C, H, W).
        prompts: numbers of their prompts, int64, shape (B,).

    Raises:
        ValueError: for a result of another shape.
    """
    if isinstance(score, Metric):
        score.reset()  # one batch, not all so far
    result = score(images, prompts) if takes_prompts(score) else score(images)
    value = torch.as_tensor(result, device=images.device)
    if value.shape not in ((), (len(images),)):
        raise ValueError(
            f"{name_of(score)} returned shape {tuple(value.shape)} for {len(images)} images: return a number for each, "
            f"shape ({len(images)},), or one for all."
        )
    return value.float()


def name_of(score: Score) -> str:
    """Return the name of a score for messages."""
    return getattr(score, "__name__", type(score).__name__)


def check_finite(reward: Score, values: Tensor) -> None:
    """Raise RuntimeError for NaN and infinity, before anything is differentiated."""
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise RuntimeError(
            f"reward {name_of(reward)} gave NaN or infinity for {bad} of {values.numel()} values. No parameter has "
            "moved. Look at the images, lower lr, or bound the reward."
        )
