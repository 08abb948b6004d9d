"""Scores of weights, and masks of the best ones with exact counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import FractionBelowOne, NonNegativeInt, checked
from lightning_bpfree.core.params import Params, count, widen
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.methods.lottery_ticket.masks import Masks

Scope = Literal["global", "layer"]


@checked
def snr(mean: Mapping[str, Tensor], std: Mapping[str, Tensor]) -> Params:
    """Return the signal-to-noise ratio ``|mean| / std`` of every weight of a search distribution.

    A search that adapts a deviation for every weight makes it small where the curvature is high, so that the score is
    about ``|mean| sqrt(curvature)``.

    Args:
        mean: named tensors.
        std: standard deviations, > 0, at least for the names of ``mean``, with the same shapes.

    Examples:
        >>> snr({"w": torch.tensor([-2.0, 3.0])}, {"w": torch.tensor([1.0, 3.0])})["w"]
        tensor([2., 1.])

    References:
        R. T. Lange, H. Sprekeler, "Lottery Tickets in Evolutionary Optimization", 2023, arXiv 2306.00045.
    """
    return {name: widen(tensor).abs() / widen(std[name]) for name, tensor in mean.items()}


@checked
def magnitude(mean: Mapping[str, Tensor]) -> Params:
    """Return the magnitude of every weight.

    Examples:
        >>> magnitude({"w": torch.tensor([-2.0, 3.0])})["w"]
        tensor([2., 3.])

    References:
        J. Frankle, M. Carbin, "The Lottery Ticket Hypothesis", 2019, arXiv 1803.03635.
    """
    return {name: tensor.abs() for name, tensor in mean.items()}


def random_scores(like: Mapping[str, Tensor], seed: int) -> Params:
    """Return random scores in [0, 1), a function of ``seed`` and of names' order and shapes alone, in float64.

    Examples:
        >>> like = {"w": torch.zeros(3)}
        >>> torch.equal(random_scores(like, 1)["w"], random_scores(like, 1)["w"])
        True
    """
    scores = {}
    for i, (name, tensor) in enumerate(like.items()):
        generator = torch.Generator().manual_seed(mix(seed, i))  # on the CPU: the same on every kind of device
        scores[name] = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
    return scores


@checked
def snip(params: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Params:
    """Return ``|w dL/dw|``: the first-order change of the loss if the weight is removed.

    Args:
        params: named tensors.
        gradients: gradients of the loss, at least for the names of ``params``.

    Examples:
        >>> snip({"w": torch.tensor([-2.0, 3.0])}, {"w": torch.tensor([0.5, 0.1])})["w"]
        tensor([1.0000, 0.3000])

    References:
        N. Lee, T. Ajanthan, P. H. S. Torr, "SNIP", 2019, arXiv 1810.02340.
    """
    return {name: (widen(tensor) * widen(gradients[name])).abs() for name, tensor in params.items()}


@checked
def num_kept(total: NonNegativeInt, sparsity: FractionBelowOne) -> int:
    """Return how many of ``total`` weights a sparsity leaves: ``round(total (1 - sparsity))``.

    Raises:
        ValueError: for a sparsity outside [0, 1).

    Examples:
        >>> num_kept(4000, 1 - 0.8**10)
        429
    """
    return round(total * (1 - sparsity))


@checked
def top_masks(
    scores: Mapping[str, Tensor], sparsity: FractionBelowOne, previous: Masks | None = None, scope: Scope = "global"
) -> Masks:
    """Return masks in which the weights with the highest scores survive.

    Counts are exact, and the result depends on the scores alone: of equal scores, the first survive.

    Args:
        scores: named tensors without NaN.
        sparsity: the share of weights that are pruned, including those of earlier levels, in [0, 1).
        previous: earlier masks; weights that they prune stay pruned.
        scope: ``"global"``: ``round(total (1 - sparsity))`` survive over all tensors together; ``"layer"``: the same
            within each tensor.

    Raises:
        ValueError: for a sparsity out of range or below that of ``previous``, a NaN score, or a tensor that would be
            pruned completely.

    Examples:
        >>> scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 4.0])}
        >>> top_masks(scores, 0.25)
        Masks(3 of 4 weights left in 2 tensors)
        >>> top_masks(scores, 0.5, scope="layer")["b"]
        tensor([False,  True])
    """
    # What is pruned already has no say: not its NaN (zero over zero) either.
    left = scores if previous is None else {n: s.masked_fill(~previous[n], -torch.inf) for n, s in scores.items()}
    broken = [name for name, score in left.items() if bool(score.isnan().any())]
    if broken:
        raise ValueError(f"Scores of {', '.join(broken)} are NaN: look at the weights, deviations or gradients.")
    groups = [list(left)] if scope == "global" else [[name] for name in left]
    made: Params = {}
    for names in groups:
        made.update(_top({name: left[name] for name in names}, sparsity, previous))
    masks = Masks(made)
    empty = [name for name, kept in masks.counts.items() if kept == 0]
    if empty:
        raise ValueError(
            f"sparsity={sparsity:.6g} would prune all of {', '.join(empty)}. Prune all layers alike (scope='layer'), "
            "use fewer levels or a lower sparsity, or exclude these layers (exclude=)."
        )
    return masks


def _top(scores: Mapping[str, Tensor], sparsity: float, previous: Masks | None) -> Params:
    kept = num_kept(count(scores), sparsity)
    left = count(scores) if previous is None else sum(previous.counts[name] for name in scores)
    if kept > left:
        raise ValueError(
            f"sparsity={sparsity:.6g} asks for {kept} weights of {', '.join(scores)}, but earlier pruning left "
            f"{left}: pruned weights stay pruned. Give a higher sparsity, or use the same scope for all levels."
        )
    first = next(iter(scores.values())).device
    flat = torch.cat([widen(score).flatten().to(first) for score in scores.values()])
    # A full, stable sort: topk makes no promise which of equal scores it returns.
    best = flat.sort(descending=True, stable=True).indices[:kept]
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=first)
    chosen[best] = True
    parts = zip(scores.items(), chosen.split([score.numel() for score in scores.values()]), strict=True)
    return {name: part.view(score.shape).to(score.device) for (name, score), part in parts}
