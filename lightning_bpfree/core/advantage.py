"""Rewards minus what was to be expected: the numbers that a score is multiplied by."""

from __future__ import annotations

from torch import Tensor


def leave_one_out(rewards: Tensor) -> Tensor:
    """Return each reward minus the mean of the other samples' of the same input.

    The baseline of a sample does not depend on it, so that REINFORCE stays unbiased; the advantages of an input sum to
    0, so that the samples of an input are each other's negative phase.

    Args:
        rewards: shape ``(M, B)``, of ``M >= 2`` samples of each of ``B`` inputs.

    Raises:
        ValueError: for a single sample.

    Examples:
        >>> import torch
        >>> leave_one_out(torch.tensor([[1.0], [-1.0], [0.0]])).T
        tensor([[ 1.5000, -1.5000,  0.0000]])

    References:
        W. Kool, H. van Hoof, M. Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019.
    """
    num = len(rewards)
    if num < 2:
        raise ValueError("leave_one_out: one sample of each input has no other one; give rewards of two or more.")
    return (rewards - rewards.mean(0)) * (num / (num - 1))
