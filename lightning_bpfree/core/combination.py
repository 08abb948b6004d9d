"""Gradient estimates from slopes along directions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightning_bpfree.core.directions import Directions, accumulator_dtype
from lightning_bpfree.core.params import Params, count


class Combination:
    """Makes the estimate ``sum_k a_k v_k`` of the gradient from slopes ``s_k = <g, v_k>``.

    If ``a_k = s_k / K`` and the slopes are this rank's own, each direction is added while it is in memory: the sum
    needs one copy of the parameters, and no direction is drawn twice. Otherwise the directions are regenerated once
    all slopes are known.

    Args:
        directions: the ``K`` directions.
        orthogonal: see :func:`weights_from_slopes`.
        normalize: see :func:`weights_from_slopes`.
        exchanged: whether the final slopes are known only after an exchange between ranks.

    Examples:
        >>> directions = Directions({"w": torch.zeros(2)}, num=1, seed=0)
        >>> combination, v = Combination(directions), directions[0]
        >>> combination.add(torch.tensor(3.0), v)
        >>> torch.equal(combination.gradients(torch.tensor([3.0]))(None)["w"], 3 * directions[0]["w"])
        True
    """

    def __init__(
        self, directions: Directions, orthogonal: bool = False, normalize: bool = False, exchanged: bool = False
    ) -> None:
        self.directions, self.orthogonal, self.normalize = directions, orthogonal, normalize
        self.at_once = not exchanged and _is_mean(directions, orthogonal, normalize)
        self._total: Params = {}

    def add(self, slopes: Tensor, directions: Params) -> None:
        """Add a direction with its slope, or a stack ``(C, *shape)`` with slopes ``(C,)``; may overwrite them."""
        if not self.at_once:
            return
        coefficients = slopes / len(self.directions)
        for name, like in self.directions.like.items():
            v = directions.pop(name).to(accumulator_dtype(like))  # popped: no more than one extra tensor lives
            c = coefficients.to(v.device, v.dtype)
            part = torch.tensordot(c, v, 1) if c.dim() else v.mul_(c)
            self._total[name] = self._total[name].add_(part) if name in self._total else part

    def gradients(self, slopes: Tensor) -> Callable[[Tensor | None], Params]:
        """Return the estimate as a function of a scalar factor (or None).

        Args:
            slopes: all ``K`` slopes that the ranks agreed on, shape ``(K,)``.
        """
        if self.at_once:
            return self._summed
        weights = weights_from_slopes(slopes, self.directions, self.orthogonal, self.normalize)
        return partial(self.directions.combine, weights)

    def _summed(self, scale: Tensor | None) -> Params:
        total = {name: self._total[name].to(like.dtype) for name, like in self.directions.like.items()}
        return total if scale is None else {name: part * scale for name, part in total.items()}


def _is_mean(directions: Directions, orthogonal: bool, normalize: bool) -> bool:
    """Whether ``a_k = s_k / K``; random signs lie on the sphere already, ``|v|^2 = d``."""
    return not orthogonal and (not normalize or directions.distribution == "rademacher")


def weights_from_slopes(
    slopes: Tensor, directions: Directions, orthogonal: bool = False, normalize: bool = False
) -> Tensor:
    """Return coefficients ``a_k`` such that ``sum_k a_k v_k`` estimates the gradient without bias.

    With ``s_k = <g, v_k>``, ``V`` the matrix of directions, ``G = V^T V`` and ``d`` the number of coordinates:

    - plain: ``a = s / K``; variance about ``(d + 1) / K`` times ``|g|^2`` for Gaussian directions;
    - ``normalize``: every direction is scaled to length sqrt(d): ``a_k = d s_k / (K |v_k|^2)``;
    - ``orthogonal``: the gradient is projected onto the span of the directions, as with orthonormalized directions:
      ``a = (d / K) G^-1 s``; with ``K = d`` directions the estimate is the gradient itself.

    Args:
        slopes: ``s_k``, shape ``(K,)``.
        directions: the ``K`` directions.
        orthogonal: see above.
        normalize: see above; has no effect with ``orthogonal`` or on Rademacher directions.

    Raises:
        ValueError: if ``orthogonal`` is set with more directions than coordinates.
    """
    num = len(directions)
    if _is_mean(directions, orthogonal, normalize):
        return slopes / num
    dimension = count(directions.like)
    wide = slopes.to("cpu", torch.float64)
    if orthogonal:
        if num > dimension:
            raise ValueError(
                f"orthogonal=True with num_directions={num}, but only {dimension} parameters are trained: use at most "
                f"{dimension} directions."
            )
        weights: Tensor = torch.linalg.solve(directions.gram(), wide) * (dimension / num)
    else:
        weights = wide * dimension / (num * directions.squared_norms())
    return weights.to(slopes.device, slopes.dtype)
