"""Stacking: weights of the members, fitted to predictions on data that they were not trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import AtLeastTwo, checked
from lightning_bpfree.methods.deep_ensemble.combining.aggregation import mean_and_variance, mean_probability

_STEPS = 500  # of the fixed-point iteration; both problems are convex and their values settle long before


@checked
def stacking_weights(outputs: Tensor, targets: Tensor, *, regression: bool = False) -> Tensor:
    """Return the weights ``(M,)``, at least 0 and summing to 1, whose weighted mean predicts ``targets`` best.

    Classification maximizes the likelihood of the weighted mean probability (a concave problem, solved by expectation
    maximization of the mixture's weights); regression minimizes the squared error of the weighted mean.

    Args:
        outputs: the members' probabilities ``(M, N, C)``, or with ``regression`` their values ``(M, N, ...)``, on
            samples that they were not trained on.
        targets: int64 ``(N,)``, or with ``regression`` values ``(N, ...)``.
        regression: whether the outputs are values.

    Examples:
        >>> right, wrong = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([[0.1, 0.9], [0.8, 0.2]])
        >>> stacking_weights(torch.stack([right, wrong]), torch.tensor([0, 1]))
        tensor([1., 0.])

    References:
        D. H. Wolpert, "Stacked generalization", Neural Networks 5(2), 1992.
        L. Breiman, "Stacked regressions", Machine Learning 24, 1996.
        Y. Yao et al., "Using stacking to average Bayesian predictive distributions", 2018, arXiv 1704.02030.
    """
    outputs = outputs.double()
    if regression:
        return _least_squares(outputs.flatten(1), targets.double().flatten()).float()
    chosen = outputs.gather(-1, targets.reshape(1, -1, 1).expand(len(outputs), -1, 1)).squeeze(-1).clamp_min(1e-12)
    weights = torch.full((len(outputs), 1), 1 / len(outputs), dtype=torch.float64, device=outputs.device)
    for _ in range(_STEPS):
        shares = weights * chosen
        weights = (shares / shares.sum(0)).mean(1, keepdim=True)
    return _normalized(weights.squeeze(1))


def _normalized(weights: Tensor) -> Tensor:
    single = torch.where(weights < 1e-6, 0.0, weights).float()
    return single / single.sum()


def _least_squares(values: Tensor, targets: Tensor) -> Tensor:
    """Return the point of the simplex that minimizes ``|weights @ values - targets|^2``, by projected gradient."""
    gram, moment = values @ values.T, values @ targets
    step = 1 / torch.linalg.matrix_norm(gram, 2).clamp_min(1e-12)
    weights = torch.full((len(values),), 1 / len(values), dtype=values.dtype, device=values.device)
    momentum, ahead = 1.0, weights
    for _ in range(_STEPS):  # accelerated, since members are alike and the problem is badly conditioned
        following = _onto_simplex(ahead - step * (gram @ ahead - moment))
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = following + (momentum - 1) / grown * (following - weights)
        weights, momentum = following, grown
    return weights


def _onto_simplex(point: Tensor) -> Tensor:
    """Return the nearest point with coordinates of at least 0 that sum to 1."""
    ordered = point.sort(descending=True).values
    excess = (ordered.cumsum(0) - 1) / torch.arange(1, len(point) + 1, device=point.device)
    return (point - excess[(ordered > excess).sum() - 1]).clamp_min(0)


@checked
def cross_fitted(
    outputs: Tensor, targets: Tensor, folds: AtLeastTwo = 5, seed: int = 0, *, regression: bool = False
) -> Tensor:
    """Return the stacked predictions ``(N, ...)`` of every sample, with weights that were not fitted to it.

    The samples are split into folds at random; each fold is predicted with :func:`stacking_weights` of all others. The
    score estimates that of the weights fitted to all samples.

    Args:
        outputs: ``(M, N, ...)`` as in :func:`stacking_weights`.
        targets: ``(N, ...)``.
        folds: number of folds, from 2 to N.
        seed: seed of the split.
        regression: whether the outputs are values.

    Raises:
        ValueError: for a number of folds out of range.

    Examples:
        >>> members = torch.rand(3, 20, 4).softmax(-1)
        >>> cross_fitted(members, torch.randint(0, 4, (20,))).shape
        torch.Size([20, 4])
    """
    samples = len(targets)
    if folds > samples:
        raise ValueError(f"cross_fitted: folds={folds}: give a number from 2 to the {samples} samples.")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).to(targets.device)
    predicted = torch.empty_like(outputs[0])
    for fold in range(folds):
        held_out = order[fold::folds]
        rest = torch.ones(samples, dtype=torch.bool, device=targets.device)
        rest[held_out] = False
        weights = stacking_weights(outputs[:, rest], targets[rest], regression=regression)
        part = outputs[:, held_out]
        mean = mean_and_variance(part, weights=weights)[0] if regression else mean_probability(part, weights)
        predicted[held_out] = mean
    return predicted
