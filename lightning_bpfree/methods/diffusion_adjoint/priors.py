"""Distances of a fine-tuned model from the original model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from lightning_bpfree.methods.diffusion_adjoint.fields import Conditioning
from lightning_bpfree.methods.diffusion_adjoint.sampler import DiffusionSampler
from lightning_bpfree.methods.diffusion_adjoint.schedules import FlowMatching, Node
from lightning_bpfree.methods.diffusion_adjoint.trained_parts import Optimize

Prior = Literal["l2", "kl"]


def check_prior(prior: Prior | None, optimize: Optimize) -> None:
    """Raise ValueError for a prior that compares networks, where none is trained."""
    if prior == "kl" and optimize in ("noise", "prompt_embeds"):
        raise ValueError(f"prior='kl' compares networks, and optimize={optimize!r} changes none: use prior='l2'.")


def l2(values: Sequence[Tensor], origins: Sequence[Tensor | None]) -> Tensor:
    """Return the mean square of how far values have moved, over all of their numbers.

    Args:
        values: now.
        origins: then; None for 0.

    Examples:
        >>> l2([torch.ones(2), torch.zeros(2)], [None, None])
        tensor(0.5000)
    """
    moved = [v if o is None else v - o for v, o in zip(values, origins, strict=True)]
    return torch.stack([m.square().sum() for m in moved]).sum() / sum(m.numel() for m in moved)


def kl(
    sampler: DiffusionSampler,
    samples: Tensor,
    conditioning: Conditioning,
    frozen: Callable[[], AbstractContextManager[DiffusionSampler]],
    generator: torch.Generator,
) -> Tensor:
    """Return an estimate of the KL divergence of the fine-tuned model from the frozen one, in nats a pixel.

    Of the two reverse diffusions it is the integral over the half log signal-to-noise ratio of the squared distance of
    the two predictions of the noise (Girsanov); estimated at one point for the batch, on the model's samples with new
    noise, through which no gradient goes.

    Args:
        sampler: sampler of the fine-tuned model.
        samples: its samples, shape (B, ...).
        conditioning: of the samples.
        frozen: opens a context that gives the sampler of the frozen model.
        generator: on the CPU.
    """
    nodes = sampler.schedule.grid(sampler.settings.num_steps)
    ratios = [math.log(node.alpha / node.sigma) for node in nodes if node.alpha > 0 and node.sigma > 0]
    low, high = min(ratios), max(ratios)
    if low == high:
        raise ValueError("prior='kl' compares models between the nodes of a solve: give num_steps of 2 or more.")
    ratio = low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
    flow = isinstance(sampler.schedule, FlowMatching)
    node = sampler.schedule.node(1.0 / (1.0 + math.exp(ratio)) if flow else math.exp(-ratio))
    noise = torch.randn(samples.shape, generator=generator, dtype=torch.float32).to(samples)
    x = node.alpha * samples.detach() + node.sigma * noise
    ours = sampler.derivative(_state(x, node), node, conditioning)
    with frozen() as before, torch.no_grad():
        theirs = before.derivative(_state(x, node), node, conditioning)
    # A flow predicts a velocity, of which alpha is the noise's share.
    share = node.alpha if flow else 1.0
    return (high - low) * (share * (ours - theirs)).square().mean()


def _state(x: Tensor, node: Node) -> Tensor:
    return x / node.scale
