"""Diffusion models with known samples and gradients: Gaussians in closed form, and a UNet of a few thousand weights."""

from __future__ import annotations

import math

import torch
from tiny_diffusion import text_unet
from torch import nn

from lightning_bpfree.methods.diffusion_adjoint.sampler import DiffusionSampler
from lightning_bpfree.methods.diffusion_adjoint.schedules import DiscreteVP

STABLE_DIFFUSION = DiscreteVP.from_betas(0.00085, 0.012, scaled=True)


def log_spaced(schedule: DiscreteVP = STABLE_DIFFUSION) -> DiscreteVP:
    """The same schedule with nodes even in log rho, which a convergence order wants."""
    alphas = [1 / (1 + rho * rho) for rho in schedule.rhos]
    return DiscreteVP(alphas, spacing="log_rho")


class Gaussian(nn.Module):
    """The exact noise of data from N(mean, std^2), a coordinate each; conditioning adds to the mean."""

    def __init__(self, mean: float = 0.7, std: float = 0.4, schedule: DiscreteVP = STABLE_DIFFUSION) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.double))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.double))
        self.schedule = schedule

    def forward(self, x: torch.Tensor, time: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        rho = rho_of(self.schedule, float(time[0]))
        y, mean = x * math.sqrt(1 + rho * rho), self.mean if shift is None else self.mean + shift
        return rho * (y - mean) / (self.std.square() + rho * rho)


def rho_of(schedule: DiscreteVP, time: float) -> float:
    """The inverse of the schedule's time, from its definition: linear in log rho between whole times."""
    low = min(int(time), len(schedule.rhos) - 2)
    logs = math.log(schedule.rhos[low]), math.log(schedule.rhos[low + 1])
    return math.exp(logs[0] + (time - low) * (logs[1] - logs[0]))


class TextNet(nn.Module):
    """The tiny UNet with cross attention, called as samplers call it."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = text_unet()

    def forward(self, x: torch.Tensor, time: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return self.unet(x, time, encoder_hidden_states=prompt_embeds).sample


class Tanh(nn.Module):
    """A small network that depends on time, with dropout."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.double) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6, dtype=dtype), nn.Linear(6, 3, dtype=dtype)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, time: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        x = x if c is None else x + c
        return self.second(self.drop(torch.tanh(self.first(torch.cat([x, time[:, None] / 1000], 1)))))


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found - true) / torch.linalg.vector_norm(true))


def gradients(sampler: DiffusionSampler, noise: torch.Tensor, **conditionings: torch.Tensor) -> list[torch.Tensor]:
    """The sample, and the gradients of a loss by noise, by the conditioning and by all weights as one vector.

    Conditioning is given by the network's names, that of the empty prompt with `no_` before them.
    """
    sampler.zero_grad()
    noise = noise.detach().clone().requires_grad_()
    given = {name: value.detach().clone().requires_grad_() for name, value in conditionings.items()}
    conditioning = {name: value for name, value in given.items() if not name.startswith("no_")}
    without = {name.removeprefix("no_"): value for name, value in given.items() if name.startswith("no_")}
    out = sampler(noise, conditioning, without or None)
    target = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out - target).square().sum().backward()
    weights = [p.grad.flatten() for p in sampler.parameters() if p.grad is not None]
    parts = [noise.grad, *(value.grad for value in given.values()), torch.cat(weights) if weights else None]
    return [out.detach(), *(part for part in parts if part is not None)]
