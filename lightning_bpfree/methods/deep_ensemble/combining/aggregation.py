"""Combination of members' outputs into those of the ensemble: pure functions of stacked member outputs.

Member probabilities have the shape ``(M, B, C)``: members, samples, classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import Fraction, checked

_WINNER = 1e-3  # what the winner of a vote gets of the others' shares, so that argmax finds it where shares tie


def check_weights(weights: Sequence[float], members: int) -> None:
    """Raise ValueError unless ``weights`` are ``members`` numbers of at least 0 that sum to 1."""
    if len(weights) != members:
        raise ValueError(f"weights={list(weights)} are {len(weights)} numbers for {members} members: give one each.")
    if not all(0 <= weight <= 1 for weight in weights):
        raise ValueError(f"weights={list(weights)}: each must be between 0 and 1.")
    total = math.fsum(weights)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"weights={list(weights)} sum to {total:g}, not to 1: divide each by the sum.")


def _weights(outputs: Tensor, weights: Sequence[float] | Tensor | None) -> Tensor:
    """Return the weights as a tensor ``(M, 1, ...)`` that multiplies ``outputs``."""
    if weights is None:
        given = torch.full((len(outputs),), 1 / len(outputs), dtype=outputs.dtype, device=outputs.device)
    else:
        given = torch.as_tensor(weights, dtype=outputs.dtype, device=outputs.device)
        check_weights(given.tolist(), len(outputs))
    return given.reshape(-1, *[1] * (outputs.dim() - 1))


@checked
def mean_probability(probabilities: Tensor, weights: Sequence[Fraction] | Tensor | None = None) -> Tensor:
    """Return the (weighted) mean of the members' probabilities, ``(B, C)``.

    Its negative log-likelihood is at most the members' mean negative log-likelihood (Jensen's inequality).

    Args:
        probabilities: ``(M, B, C)``, each row sums to 1.
        weights: ``(M,)``, at least 0, summing to 1; None for equal weights.

    Raises:
        ValueError: for weights that do not sum to 1, or whose number is not M.

    Examples:
        >>> members = torch.tensor([[[0.75, 0.25]], [[0.25, 0.75]]])
        >>> mean_probability(members)
        tensor([[0.5000, 0.5000]])
        >>> mean_probability(members, [1.0, 0.0])
        tensor([[0.7500, 0.2500]])

    References:
        B. Lakshminarayanan, A. Pritzel, C. Blundell, "Simple and Scalable Predictive Uncertainty Estimation using Deep
        Ensembles", 2017, arXiv 1612.01474.
    """
    return (_weights(probabilities, weights) * probabilities).sum(0)


@checked
def vote_shares(probabilities: Tensor, weights: Sequence[Fraction] | Tensor | None = None) -> Tensor:
    """Return the (weighted) share of the members that choose each class, ``(B, C)``.

    Examples:
        >>> vote_shares(torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]], [[0.3, 0.7]]]))
        tensor([[0.3333, 0.6667]])
    """
    classes = probabilities.shape[-1]
    votes = torch.nn.functional.one_hot(probabilities.argmax(-1), classes).to(probabilities.dtype)
    return (_weights(votes, weights) * votes).sum(0)


@checked
def majority_vote(probabilities: Tensor, weights: Sequence[Fraction] | Tensor | None = None) -> Tensor:
    """Return the class with the most votes, int64 of shape ``(B,)``; a tie goes to the larger mean probability.

    Args:
        probabilities: ``(M, B, C)``; a member votes for its most probable class.
        weights: weights of the votes, ``(M,)``, summing to 1; None for equal weights.

    Raises:
        ValueError: for weights that do not sum to 1, or whose number is not M.

    Examples:
        >>> majority_vote(torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]]]))  # one vote each; means 0.65 and 0.35
        tensor([0])
        >>> majority_vote(torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]]]), weights=[0.2, 0.8])
        tensor([1])
    """
    shares = vote_shares(probabilities, weights)
    # Shares of equal votes may differ in the last bit where weights were added in another order.
    leading = shares >= shares.amax(-1, keepdim=True) - 1e-5
    return torch.where(leading, mean_probability(probabilities, weights), -1.0).argmax(-1)


def vote_probabilities(probabilities: Tensor, weights: Sequence[Fraction] | Tensor | None = None) -> Tensor:
    """Return vote shares as probabilities ``(B, C)``, whose argmax is :func:`majority_vote`.

    A thousandth of the mean probability keeps the logarithm finite for classes without a vote, and a thousandth goes to
    the winner, which decides ties. Vote shares are coarse: their calibration is not that of the mean.

    Examples:
        >>> vote_probabilities(torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]]])).argmax(-1)
        tensor([0])
    """
    shares, mean = vote_shares(probabilities, weights), mean_probability(probabilities, weights)
    winner = torch.nn.functional.one_hot(majority_vote(probabilities, weights), shares.shape[-1])
    # Less of the mean than the winner gets, or the mean would decide near ties of weighted votes.
    return (1 - 1.5 * _WINNER) * shares + _WINNER * winner + 0.5 * _WINNER * mean


@checked
def mean_and_variance(
    values: Tensor, variances: Tensor | None = None, weights: Sequence[Fraction] | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the mixture of the members' predictions, each with the shape of one prediction.

    Args:
        values: the members' predictions (means), ``(M, ...)``.
        variances: the members' own predictive variances, ``(M, ...)``; None for none: the result is then the variance
            between members, divided by M.
        weights: ``(M,)``, summing to 1; None for equal weights.

    Examples:
        >>> mean_and_variance(torch.tensor([[1.0], [3.0]]))
        (tensor([2.]), tensor([1.]))
        >>> mean_and_variance(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.5], [1.5]]))
        (tensor([2.]), tensor([2.]))
    """
    shares = _weights(values, weights)
    mean = (shares * values).sum(0)
    within = 0 if variances is None else (shares * variances).sum(0)
    return mean, (shares * (values - mean) ** 2).sum(0) + within


@checked
def disagreement(probabilities: Tensor) -> Tensor:
    """Return the share of pairs of members that choose different classes, ``(B,)``; 0 for one member.

    Examples:
        >>> disagreement(torch.tensor([[[0.9, 0.1]], [[0.4, 0.6]], [[0.3, 0.7]]]))
        tensor([0.6667])
    """
    members = len(probabilities)
    if members == 1:
        return torch.zeros_like(probabilities[0, ..., 0])
    votes = torch.nn.functional.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).sum(0)
    agreeing = (votes * (votes - 1)).sum(-1).to(probabilities.dtype)
    return 1 - agreeing / (members * (members - 1))


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy over the last dimension, in nats.

    Examples:
        >>> entropy(torch.tensor([1.0, 0.0]))
        tensor(0.)
    """
    summed: Tensor = torch.special.entr(probabilities).sum(-1)
    return summed


@checked
def mutual_information(probabilities: Tensor) -> Tensor:
    """Return the entropy of the mean minus the mean entropy, ``(B,)``, in nats: the disagreement of the members.

    Examples:
        >>> mutual_information(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([0.6931])
    """
    return (entropy(probabilities.mean(0)) - entropy(probabilities).mean(0)).clamp_min(0)
