"""The network, and a gradient of every kind, for the benchmarks of diffusion samplers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lightning_bpfree.methods.diffusion_adjoint.gradients import Gradient
from lightning_bpfree.methods.diffusion_adjoint.sampler import DiffusionSampler
from lightning_bpfree.methods.diffusion_adjoint.schedules import DiscreteVP

TORCHDIFFEQ = "torchdiffeq"
KINDS = (*get_args(Gradient), TORCHDIFFEQ)


class TextUNet(nn.Module):
    """A random UNet with cross attention.

    Args:
        channels: of its two levels.
        size: side of the latents.
    """

    def __init__(self, channels: tuple[int, int] = (32, 64), size: int = 16) -> None:
        super().__init__()
        self.size = size
        self.unet = UNet2DConditionModel(
            block_out_channels=channels,
            layers_per_block=1,
            sample_size=size,
            in_channels=4,
            out_channels=4,
            norm_num_groups=2,
            cross_attention_dim=32,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, x: Tensor, time: Tensor, prompt_embeds: Tensor) -> Tensor:
        out: Tensor = self.unet(x, time, encoder_hidden_states=prompt_embeds).sample
        return out

    def inputs(self, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Noise and prompt embeddings that need a gradient."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch, 4, self.size, self.size)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        embeds = torch.randn(batch, 8, 32, generator=generator, dtype=torch.float64).to(dtype)
        return noise.requires_grad_(), embeds.requires_grad_()


def schedule() -> DiscreteVP:
    """Stable Diffusion's."""
    return DiscreteVP.from_betas(0.00085, 0.012, scaled=True)


def step(
    net: nn.Module, noise: Tensor, embeds: Tensor, kind: str, steps: int, solver: str = "euler"
) -> Callable[[], Tensor]:
    """Return a function: sample, and differentiate by noise, conditioning and weights; it returns the sample."""
    if kind == TORCHDIFFEQ:
        return _by_torchdiffeq(net, noise, embeds, steps, solver)
    settings: dict[str, Any] = {"last_steps": 1} if kind == "truncated" else {}
    sampler = DiffusionSampler(net, schedule(), num_steps=steps, solver=solver, gradient=kind, **settings)

    def run() -> Tensor:
        out: Tensor = sampler(noise, {"prompt_embeds": embeds})
        out.square().mean().backward()
        return out.detach()

    return run


def sampled(net: nn.Module, noise: Tensor, embeds: Tensor, steps: int) -> Callable[[], Tensor]:
    """Return a function that samples, and nothing else."""
    sampler = DiffusionSampler(net, schedule(), num_steps=steps)
    return lambda: sampler(noise, {"prompt_embeds": embeds})


def _by_torchdiffeq(net: nn.Module, noise: Tensor, embeds: Tensor, steps: int, solver: str) -> Callable[[], Tensor]:
    from torchdiffeq import odeint_adjoint

    noises = schedule()
    nodes = noises.grid(steps)
    times = {node.rho: node for node in nodes}
    rhos = torch.tensor([node.rho for node in nodes], dtype=torch.float64)

    def field(rho: Tensor, y: Tensor) -> Tensor:
        value = float(rho.detach())
        node = times.get(value) or noises.node(value)
        out: Tensor = net(node.scale * y, torch.full((len(y),), node.time, dtype=y.dtype), embeds)
        return out

    def run() -> Tensor:
        params = (embeds, *net.parameters())
        start = noise / nodes[0].scale
        out = odeint_adjoint(field, start, rhos, method=solver, adjoint_params=params)[-1] * nodes[-1].scale
        out.square().mean().backward()
        found: Tensor = out.detach()
        return found

    return run


def gradients(net: nn.Module, noise: Tensor, embeds: Tensor, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return the gradients by noise, conditioning and weights, each as one vector."""
    for tensor in (noise, embeds, *net.parameters()):
        tensor.grad = None
    run()
    none = torch.zeros(())
    parts = {"noise": [noise], "conditioning": [embeds], "weights": list(net.parameters())}
    return {
        name: torch.cat([(none.expand_as(t) if t.grad is None else t.grad).flatten().double() for t in tensors])
        for name, tensors in parts.items()
    }
