"""Settings and inputs of a sampler that are refused, each by an error that names the argument and the cure."""

from __future__ import annotations

import pytest
import torch
from diffusion_problems import STABLE_DIFFUSION, Tanh, log_spaced

from lightning_bpfree import DiffusionAdjoint
from lightning_bpfree.methods.diffusion_adjoint.sampler import DiffusionSampler
from lightning_bpfree.methods.diffusion_adjoint.schedules import DiscreteVP, FlowMatching, LinearVP


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"solver": "ddim"}, "solver='ddim': choose 'euler'"),
        ({"gradient": "exact"}, "gradient='exact': choose 'exact_adjoint'"),
        ({"gradient": "adjoint", "solver": "dpmpp_2m"}, "solver='dpmpp_2m' has no such form"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
        ({"guidance_rescale": 2.0}, "guidance_rescale=2.0"),
        ({"last_steps": 0}, "last_steps=0"),
        ({"micro_batch": 0}, "micro_batch=0"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionSampler(Tanh(), STABLE_DIFFUSION, **settings)
    with pytest.raises(ValueError, match=message):
        DiffusionAdjoint(**settings)


def test_predictions_and_schedules():
    with pytest.raises(ValueError, match="prediction='flow_prediction': it does not belong to DiscreteVP"):
        DiffusionSampler(Tanh(), STABLE_DIFFUSION, "flow_prediction")
    with pytest.raises(ValueError, match="prediction='epsilon': it does not belong to FlowMatching"):
        DiffusionSampler(Tanh(), FlowMatching(), "epsilon")
    with pytest.raises(ValueError, match="alphas_cumprod="):
        DiscreteVP([0.5, 0.9])
    with pytest.raises(ValueError, match="beta_min"):
        LinearVP(2.0, 1.0)
    with pytest.raises(ValueError, match="spacing='even'"):
        DiscreteVP([0.9, 0.5], spacing="even")
    with pytest.raises(ValueError, match="num_steps=2000: the schedule has 1000 times"):
        STABLE_DIFFUSION.grid(2000)
    with pytest.raises(ValueError, match="shift=0"):
        FlowMatching(shift=0)


def test_a_predicted_sample_at_no_noise():
    noise = torch.randn(2, 3, dtype=torch.double)
    with pytest.raises(ValueError, match="solver='heun' evaluates the network at data without noise"):
        DiffusionSampler(Tanh(), STABLE_DIFFUSION, "sample", solver="heun")(noise)
    DiffusionSampler(Tanh(), log_spaced(), "sample", solver="heun")(noise)


def test_noise_and_conditioning():
    sampler, noise = DiffusionSampler(Tanh(), STABLE_DIFFUSION, num_steps=2), torch.randn(4, 3, dtype=torch.double)
    with pytest.raises(ValueError, match=r"conditioning 'c' has shape \(3, 3\): give 4 rows"):
        sampler(noise, {"c": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="noise has shape"):
        sampler(torch.zeros(0, 3))
    guided = DiffusionSampler(Tanh(), STABLE_DIFFUSION, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 needs `unconditional`"):
        guided(noise, {"c": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match="both need the same names"):
        guided(noise, {"c": torch.zeros(1, 3)}, {"d": torch.zeros(1, 3)})
    wrong = DiffusionSampler(lambda x, time: x[:, :1], STABLE_DIFFUSION)
    with pytest.raises(ValueError, match=r"the network returned shape \(4, 1\)"):
        wrong(noise)


def test_truncation_and_noise():
    net = Tanh().requires_grad_(False)
    sampler = DiffusionSampler(net, STABLE_DIFFUSION, num_steps=3, gradient="truncated")
    with pytest.raises(ValueError, match="'truncated' stops before the initial noise"):
        sampler(torch.randn(2, 3, dtype=torch.double, requires_grad=True))


def test_inference_mode():
    sampler = DiffusionSampler(Tanh(), STABLE_DIFFUSION, num_steps=2)
    noise = torch.randn(2, 3, dtype=torch.double)
    with torch.inference_mode():
        made_there = sampler(noise)  # samples without gradients are fine
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"Trainer\(inference_mode=False\)"):
        sampler(noise.clone().requires_grad_())
    with torch.inference_mode(), torch.enable_grad(), pytest.raises(RuntimeError, match="inference mode"):
        sampler(noise)
    with pytest.raises(RuntimeError, match="made in inference mode"):
        sampler(made_there)
