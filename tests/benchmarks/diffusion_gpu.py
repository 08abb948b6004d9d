"""Measures gradients through a sampler with Stable Diffusion's UNet on a CUDA device: time and memory of each.

    python tests/benchmarks/diffusion_gpu.py --out docs/results/diffusion_gpu.json          # about 15 minutes
    python tests/benchmarks/diffusion_gpu.py --minutes 8 --steps 20 --out docs/results/diffusion_gpu.json
    python tests/benchmarks/diffusion_gpu.py --cpu    # a tiny UNet on the CPU: tests this script, measures nothing

It needs this repository, torch, lightning and diffusers; weights are random, made from the configuration of Stable
Diffusion 1.x (860 million), latents are 4 x 64 x 64, prompts 77 x 768. A step is sampling with guidance 7.5 by DDIM, and
the backward pass to noise, prompt embeddings and all weights (or, with ``--trained embeddings``, without the weights).
Times are CUDA events, the least of ``--repeats`` steps after one to warm up; memory is the most that torch allocated,
parameters and gradients included, and ``above`` is what a step takes beyond them. A gradient that is out of memory is
written as such. First comes a test: the gradients of exact_adjoint must be those of direct within the noise of two runs
of direct; the exit status is 1 if they are not.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package need not be installed

import diffusers
import lightning
import torch
from torch import Tensor, nn

from lightning_bpfree.methods.diffusion_adjoint.sampler import DiffusionSampler
from lightning_bpfree.methods.diffusion_adjoint.schedules import DiscreteVP

GRADIENTS = ("truncated", "exact_adjoint", "adjoint", "checkpoint", "direct")
STABLE: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
TINY: dict[str, Any] = {
    "sample_size": 8,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
TOKENS = 77
MIB = 2**20


class Net(nn.Module):
    """A UNet of Stable Diffusion's shape, called as samplers call it."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.unet = diffusers.UNet2DConditionModel(**config)

    def forward(self, x: Tensor, time: Tensor, prompt_embeds: Tensor) -> Tensor:
        out: Tensor = self.unet(x, time, encoder_hidden_states=prompt_embeds).sample
        return out


class Case:
    """One step: sample, and differentiate.

    Args:
        chosen: the options.
        device: where.
    """

    def __init__(self, chosen: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(0)
        self.chosen, self.device = chosen, device
        config = TINY if chosen.cpu else STABLE
        self.net = Net(config).to(device)
        self.net.requires_grad_(chosen.trained == "all")
        size, width = config["sample_size"], config["cross_attention_dim"]
        self.noise = torch.randn(chosen.batch, 4, size, size, device=device).requires_grad_()
        self.embeds = torch.randn(chosen.batch, TOKENS, width, device=device).requires_grad_()
        self.none = torch.randn(1, TOKENS, width, device=device)
        self.schedule = DiscreteVP.from_betas(0.00085, 0.012, scaled=True)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.noise, self.embeds, *(p for p in self.net.parameters() if p.requires_grad)]

    def run(self, gradient: str, steps: int, precision: str) -> None:
        """Add the gradients of one step."""
        sampler = DiffusionSampler(self.net, self.schedule, num_steps=steps, gradient=gradient, guidance_scale=7.5)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            out = sampler(self.noise, {"prompt_embeds": self.embeds}, {"prompt_embeds": self.none})
        out.square().mean().backward()

    def gradients(self, gradient: str, steps: int, precision: str) -> list[Tensor]:
        """Return those of noise, prompts and weights, each as one vector on the CPU."""
        for tensor in self.tensors:
            tensor.grad = None
        self.run(gradient, steps, precision)
        found = [tensor.grad.double().flatten().cpu() for tensor in self.tensors if tensor.grad is not None]
        return [found[0], found[1], *([torch.cat(found[2:])] if found[2:] else [])]


def relative(found: list[Tensor], true: list[Tensor]) -> float:
    """The largest of the relative distances."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, true, strict=True))


def checked(case: Case) -> dict[str, Any]:
    """Compare with autograd; attention and convolutions on a GPU need not repeat their own bits."""
    true, again = (case.gradients("direct", 2, "fp32") for _ in range(2))
    exact, adjoint = (relative(case.gradients(kind, 2, "fp32"), true) for kind in ("exact_adjoint", "adjoint"))
    noise = relative(again, true)
    return {"exact_adjoint": exact, "direct_again": noise, "adjoint": adjoint, "passed": exact <= max(10 * noise, 1e-4)}


def measured(case: Case, gradient: str, steps: int, precision: str, repeats: int) -> dict[str, Any]:
    """Time and memory of one gradient; ``None`` where memory does not suffice."""
    cuda = case.device.type == "cuda"
    point: dict[str, Any] = {"gradient": gradient, "steps": steps, "precision": precision}
    for tensor in case.tensors:
        tensor.grad = torch.zeros_like(tensor)
    gc.collect()
    try:
        held = torch.cuda.memory_allocated() / MIB if cuda else 0.0
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = [timed(case, gradient, steps, precision) for _ in range(repeats + 1)][1:]
    except torch.OutOfMemoryError:
        return {**point, "seconds": None, "peak_mib": None, "above_mib": None}
    peak = torch.cuda.max_memory_allocated() / MIB if cuda else 0.0
    return {**point, "seconds": min(seconds), "peak_mib": peak, "above_mib": peak - held}


def timed(case: Case, gradient: str, steps: int, precision: str) -> float:
    """Seconds of one step."""
    if case.device.type != "cuda":
        start = time.perf_counter()
        case.run(gradient, steps, precision)
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    case.run(gradient, steps, precision)
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1000


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--cpu", action="store_true", help="a tiny UNet on the CPU, to test this script")
    parser.add_argument("--steps", type=int, nargs="*", default=[20, 50])
    parser.add_argument("--precisions", nargs="*", choices=["fp32", "bf16"], default=["bf16", "fp32"])
    parser.add_argument("--gradients", nargs="*", choices=GRADIENTS, default=list(GRADIENTS))
    parser.add_argument("--trained", choices=["all", "embeddings"], default="all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=25.0, help="start nothing new after so many")
    return parser.parse_args()


def main() -> int:
    chosen, started = options(), time.monotonic()
    if not chosen.cpu and not torch.cuda.is_available():
        print("no CUDA device: give --cpu to test this script")
        return 2
    device = torch.device("cpu" if chosen.cpu else "cuda")
    case = Case(chosen, device)
    check = checked(case)
    print(f"check: {check}", flush=True)
    found = {
        "command": " ".join(["python", "tests/benchmarks/diffusion_gpu.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "seed": 0,
        "device": "cpu" if chosen.cpu else torch.cuda.get_device_name(),
        "versions": {
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "diffusers": diffusers.__version__,
        },
        "weights": sum(p.numel() for p in case.net.parameters()),
        "trained": chosen.trained,
        "batch": chosen.batch,
        "check": check,
        "points": [],
    }
    for steps in chosen.steps if check["passed"] else ():
        for precision in chosen.precisions:
            for gradient in chosen.gradients:
                if (time.monotonic() - started) / 60 > chosen.minutes:
                    continue
                point = measured(case, gradient, steps, precision, chosen.repeats)
                found["points"].append(point)
                print(point, flush=True)
                if chosen.out is not None:
                    chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if check["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
