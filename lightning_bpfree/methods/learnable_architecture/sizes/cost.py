"""The cost of a network, as a differentiable function of its sizes and as a number for its crops."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_bpfree.methods.learnable_architecture.sizes.axes import Axis
from lightning_bpfree.methods.learnable_architecture.sizes.masks import clamped

Measure = Literal["macs", "params", "latency"]
_LEAST = 0.5  # stands for a depth of no block, whose logarithm is not finite


@dataclass(frozen=True)
class Share:
    """The share of the channels of a layer that is left: a constant part and the parts of several sizes.

    Args:
        constant: share of channels that stay.
        parts: sizes, each with its share.
    """

    constant: float
    parts: tuple[tuple[Axis, float], ...]

    def value(self) -> Tensor:
        """Return the differentiable share."""
        total = self.parts[0][0].length() * 0 + self.constant
        for axis, weight in self.parts:
            total = total + weight * axis.length() / axis.crops[-1]
        return total

    def number(self) -> float:
        """Return the share of the present crop."""
        return self.constant + sum(weight * axis.crop / axis.crops[-1] for axis, weight in self.parts)


@dataclass(frozen=True)
class Smallest:
    """The share of samples that is left along one axis behind several resolutions: that of the smallest.

    Args:
        axes: the resolutions.
    """

    axes: tuple[Axis, ...]

    def value(self) -> Tensor:
        """Return the differentiable share."""
        return torch.stack([axis.length() / axis.crops[-1] for axis in self.axes]).min()

    def number(self) -> float:
        """Return the share of the present crop."""
        return min(axis.crop / axis.crops[-1] for axis in self.axes)


@dataclass(frozen=True)
class Kept:
    """Whether a block is left: 1, 0, or between them for the block at which the depth ends.

    Args:
        axis: the number of blocks.
        index: index of the block.
    """

    axis: Axis
    index: int

    def value(self) -> Tensor:
        """Return the differentiable share."""
        length = self.axis.length()
        inside = length.detach() - self.index
        # The block at the end gets the gradient; those far from it have none.
        return clamped(length - self.index, 0.0, 1.0) if -1 <= inside <= 1 else inside.clamp(0, 1)

    def number(self) -> float:
        """Return whether the block is left."""
        return float(self.index < self.axis.kept)


Factor = Share | Smallest | Kept


@dataclass(frozen=True)
class Term:
    """One summand of the cost: what it is where nothing is cropped, and the shares of it that are left.

    Args:
        full: multiply-accumulates, or parameters.
        factors: shares.
    """

    full: float
    factors: tuple[Factor, ...]


@dataclass
class Cost:
    """The cost of a network: a sum of products of shares.

    Args:
        terms: the summands.
    """

    terms: list[Term] = field(default_factory=list)

    @property
    def full(self) -> float:
        """The cost where nothing is cropped."""
        return sum(term.full for term in self.terms)

    def value(self) -> Tensor:
        """Return the differentiable cost of the present masks."""
        total: Tensor | float = 0.0
        cache: dict[Factor, Tensor] = {}
        for term in self.terms:
            product: Tensor | float = term.full
            for factor in term.factors:
                if factor not in cache:
                    cache[factor] = factor.value()
                product = product * cache[factor]
            total = total + product
        return torch.as_tensor(total)

    def number(self) -> float:
        """Return the cost of the present crops."""
        cache: dict[Factor, float] = {}
        total = 0.0
        for term in self.terms:
            product = term.full
            for factor in term.factors:
                if factor not in cache:
                    cache[factor] = factor.number()
                product *= cache[factor]
            total += product
        return total

    def at(self, axes: Iterable[Axis], smallest: bool) -> float:
        """Return the cost at the smallest or the largest sizes of some axes; the present ones come back.

        Args:
            axes: the axes.
            smallest: whether the smallest sizes are meant.
        """
        listed = list(axes)
        before = [axis.kept for axis in listed]
        managed = [axis.managed for axis in listed]
        for axis in listed:
            axis.managed = True
            axis.set_kept(_kept_for(axis, axis.crops[0 if smallest else -1]))
        try:
            return self.number()
        finally:
            for axis, kept, was in zip(listed, before, managed, strict=True):
                axis.set_kept(kept)
                axis.managed = was


def _kept_for(axis: Axis, crop: int) -> int:
    """Return how many positions are kept at a crop."""
    return next(kept for kept in range(axis.count + 1) if axis.crop_of(kept) >= crop)


def settle(cost: Cost, axes: Sequence[Axis], target: float, tolerance: float) -> bool:
    """Change sizes by single steps until the cost of the crops is near its target; says whether it is.

    Each step is the one that leaves its size nearest to its first value, by their ratio, among those that bring the
    cost nearer to its target. All sizes change by about one factor, so that the proportions of the search stay. By
    absolute steps, the widest layers would pay for all and end at single units. Where no step brings the cost nearer,
    a step of one size and the opposite step of another are tried together.

    Args:
        cost: of the network.
        axes: the sizes that may change.
        target: of the cost.
        tolerance: relative.
    """
    first = {axis: max(float(axis.length().detach()), _LEAST) for axis in axes}
    for _ in range(10_000):
        off = cost.number() - target
        if abs(off) <= tolerance * target:
            return True
        moves = _moves(cost, axes, target, first, -1 if off > 0 else 1)
        better = [move for move in moves if abs(move.off) < abs(off)]
        if better:
            _apply(min(better, key=lambda move: move.moved))
        elif not _exchange(cost, axes, target, first, moves):
            return False
    return False


class _Move(NamedTuple):
    """One step of one size.

    Args:
        axis: the size.
        crop: what it becomes.
        moved: how far the size is then from what it was at first: the absolute logarithm of the ratio.
        off: the cost less its target, after the step.
    """

    axis: Axis
    crop: int
    moved: float
    off: float


def _moves(cost: Cost, axes: Sequence[Axis], target: float, first: Mapping[Axis, float], direction: int) -> list[_Move]:
    """Return the single steps of all sizes in a direction."""
    found = []
    for axis in axes:
        crops, now = axis.crops, axis.crop
        step = crops.index(now) + direction if now in crops else -1
        if 0 <= step < len(crops):
            before = axis.size.detach().clone()
            axis.set_crop(crops[step])
            moved = abs(math.log(max(crops[step], _LEAST) / first[axis]))
            found.append(_Move(axis, crops[step], moved, cost.number() - target))
            _put(axis, before, now)
    return found


def _exchange(
    cost: Cost, axes: Sequence[Axis], target: float, first: Mapping[Axis, float], moves: Sequence[_Move]
) -> bool:
    """Make the two opposite steps that together come nearest to the target; says whether they come nearer."""
    off = cost.number() - target
    best: tuple[float, _Move, _Move] | None = None
    for move in moves:
        before, now = move.axis.size.detach().clone(), move.axis.crop
        _apply(move)
        others = [axis for axis in axes if axis is not move.axis]
        for other in _moves(cost, others, target, first, 1 if off > 0 else -1):
            if abs(other.off) < (abs(off) if best is None else best[0]):
                best = abs(other.off), move, other
        _put(move.axis, before, now)
    if best is None:
        return False
    _apply(best[1])
    _apply(best[2])
    return True


def _apply(move: _Move) -> None:
    move.axis.set_crop(move.crop)


def _put(axis: Axis, size: Tensor, crop: int) -> None:
    with torch.no_grad():
        axis.size.copy_(size)
    axis.set_kept(_kept_for(axis, crop))


def deviation(cost: Cost, target: float) -> Tensor:
    """Return the squared relative deviation of the cost from its target.

    Its value is that of the crops, and its gradient that of the differentiable sizes: it is zero where the network that
    is computed meets the budget, and not where a network of fractional sizes would.

    Args:
        cost: of the network.
        target: above 0.
    """
    value = cost.value()
    exact = value + (cost.number() - value).detach()
    return (exact / target - 1).square()
