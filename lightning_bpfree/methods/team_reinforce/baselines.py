"""Baselines: numbers that are subtracted from a reward before it multiplies the scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import PositiveFloat, checked
from lightning_bpfree.core.auxiliary_modules import AuxiliaryModules
from lightning_bpfree.core.network.network_call import RefusedError
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.methods.team_reinforce.training_pass import TeamPass

Baseline = Literal["leave_one_out", "critic", "per_layer", "none"]
WIDTH = 64  # of a critic's hidden layer


class Baselines:
    """Makes advantages of rewards, one for each layer, and trains critics.

    Args:
        kind: ``"leave_one_out"``, ``"critic"``, ``"per_layer"`` or ``"none"``.
        lr: learning rate (Adam) of critics.
    """

    @checked
    def __init__(self, kind: Baseline, lr: PositiveFloat) -> None:
        self.kind, self.own = kind, AuxiliaryModules("adam", lr)

    def advantages(self, work: TeamPass, rewards: Tensor, seed: int) -> list[Tensor]:
        """Return the advantages of every layer, ``(M * B,)``.

        Args:
            work: the pass, before any of its values is changed.
            rewards: shape ``(M, B)``.
            seed: seed of the critics' start.
        """
        layers = len(work.layers)
        if self.kind == "leave_one_out":
            return [leave_one_out(rewards).reshape(-1)] * layers
        if self.kind == "none":
            return [rewards.reshape(-1)] * layers
        if self.kind == "critic":
            known = work.inputs[: rewards.shape[1]]
            return [(rewards - self._expected("critic", known, rewards.mean(0), seed)).reshape(-1)] * layers
        flat, below = rewards.reshape(-1), [work.inputs, *(layer.value for layer in work.layers[:-1])]
        names = [layer.name for layer in work.layers]
        pairs = zip(names, below, strict=True)
        return [flat - self._expected(f"critic/{name}", known, flat, seed) for name, known in pairs]

    def _expected(self, key: str, known: Tensor, rewards: Tensor, seed: int) -> Tensor:
        """Return what a critic expects given ``known``, before it learns from the rewards."""
        if not known.is_floating_point():
            raise RefusedError(
                f"baseline={self.kind!r}: a critic reads the network's input, which is {known.dtype} here. Use "
                "baseline='leave_one_out', or network=... to name the submodule after the embedding."
            )
        known = known.detach().flatten(1)
        dtype = torch.float64 if known.dtype == torch.float64 else torch.float32
        build: Callable[[], nn.Module] = partial(_critic, known.shape[1])
        critic = self.own.get(key, build, mix(seed, known.shape[1]), known.device, dtype)
        with torch.enable_grad(), torch.autocast(known.device.type, enabled=False):
            expected = critic(known.to(dtype))[:, 0]
            error = 0.5 * (rewards.to(dtype) - expected).square().mean()
        self.own.propose(key, torch.autograd.grad(error, list(critic.parameters())))
        made: Tensor = expected.detach().to(rewards.dtype)
        return made


def _critic(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))


@checked
def leave_one_out(rewards: Tensor) -> Tensor:
    """Return each reward minus the mean reward of the other samples of the same input.

    The baseline of a sample does not depend on the sample, so that REINFORCE stays unbiased. The advantages of an input
    sum to 0, so that its samples act as each other's negative phase.

    Args:
        rewards: shape ``(M, B)``, for ``M >= 2`` samples of each of ``B`` inputs.

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
        raise ValueError(
            "leave_one_out: it needs at least two samples of each input; give rewards of shape (M, B) with M >= 2."
        )
    return (rewards - rewards.mean(0)) * (num / (num - 1))
