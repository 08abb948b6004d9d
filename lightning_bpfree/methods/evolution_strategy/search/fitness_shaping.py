"""Fitness shaping: member weights from the fitness of a population; smaller is better."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import checked

Shaping = Literal["centered_rank", "z_score", "raw"]


def ranked(fitness: Tensor, by_rank: Tensor) -> Tensor:
    """Return one weight per member, given the weights of the ranks, best (smallest fitness) first.

    Members of equal fitness get the mean of the weights of their ranks, so that their order does not matter; rewards
    and error counts often tie.

    Args:
        fitness: shape ``(N,)``; infinity is the worst rank.
        by_rank: shape ``(N,)``.

    Examples:
        >>> ranked(torch.tensor([3.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, -1.0]))
        tensor([-1.0000,  0.5000,  0.5000], dtype=torch.float64)
    """
    order = fitness.sort().values
    first = torch.searchsorted(order, fitness)
    last = torch.searchsorted(order, fitness, right=True)
    total = torch.cat([by_rank.new_zeros(1, dtype=torch.float64), by_rank.double().cumsum(0)])
    return (total[last] - total[first]) / (last - first)


@checked
def shaped(fitness: Tensor, shaping: Shaping) -> Tensor:
    """Return fitness on a common scale, shape ``(N,)``; smaller is better.

    Args:
        fitness: shape ``(N,)``.
        shaping: ``"centered_rank"``: ranks, evenly spaced over [-1/2, 1/2]: invariant to monotone maps of the fitness.
            ``"z_score"``: mean 0, standard deviation 1. ``"raw"``: unchanged.

    Raises:
        ValueError: for an unknown shaping.

    Examples:
        >>> shaped(torch.tensor([10.0, 0.0, 2.0]), "centered_rank")
        tensor([ 0.5000, -0.5000,  0.0000], dtype=torch.float64)
    """
    if shaping == "centered_rank":
        return ranked(fitness, torch.linspace(-0.5, 0.5, len(fitness), dtype=torch.float64, device=fitness.device))
    if shaping == "z_score":
        wide = fitness.double()
        return (wide - wide.mean()) / wide.std(correction=0).clamp_min(torch.finfo(torch.float64).tiny)
    return fitness.double()
