"""Pipelines of diffusers through the sampler: the same images, gradients everywhere, and what is refused."""

from __future__ import annotations

import contextlib

import diffusers
import pytest
import torch
from tiny_diffusion import ddim_scheduler, flux, image_pipeline, prompts, sd3, stable_diffusion

from lightning_bpfree.methods.diffusion_adjoint.diffusers_schedules import schedule_of
from lightning_bpfree.methods.diffusion_adjoint.pipeline_sampler import PipelineCall, PipelineSampler, load_pipeline

SINGLE = {"rtol": 1e-5, "atol": 1e-5}  # equal mathematics in float32, images in 0 to 1


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("guidance_rescale", [0.0, 0.7])
def test_stable_diffusion_from_prompts(guidance_rescale):
    pipe = stable_diffusion(text=True)
    arguments = {"prompt": ["a dog", "cat"], "negative_prompt": ["x", "y"], "latents": torch.randn(2, 4, 8, 8)}
    arguments |= {"num_inference_steps": 4, "guidance_rescale": guidance_rescale, "output_type": "pt"}
    found = PipelineCall(pipe, {})(**arguments).images
    torch.testing.assert_close(found.detach(), pipe(**arguments).images, **SINGLE)
    found.mean().backward()
    assert all(parameter.grad is not None for parameter in pipe.unet.parameters())


def test_images_without_prompts():
    pipe, generator = image_pipeline(), torch.Generator()
    arguments = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"}
    found = PipelineCall(pipe, {})(generator=generator.manual_seed(0), **arguments).images
    true = pipe(generator=generator.manual_seed(0), **arguments).images
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(true), **SINGLE)


def test_sd3_in_one_step():
    pipe = sd3()  # of more steps, diffusers shifts the nodes twice, and so has others
    given = {"prompt_embeds": torch.randn(2, 5, 32), "pooled_prompt_embeds": torch.randn(2, 64)}
    given |= {f"negative_{name}": torch.randn_like(value) for name, value in given.items()}
    given |= {"latents": torch.randn(2, 4, 8, 8), "num_inference_steps": 1, "output_type": "pt"}
    true = pipe(**given).images
    torch.testing.assert_close(PipelineCall(pipe, {})(**given).images.detach(), true, **SINGLE)


def test_flux_with_its_dynamic_shift():
    pipe, latents = flux(), torch.randn(2, 4, 16, 16)
    given = {"prompt_embeds": torch.randn(2, 5, 32), "pooled_prompt_embeds": torch.randn(2, 32)}
    given |= {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "pt"}
    packed = diffusers.FluxPipeline._pack_latents(latents, 2, 4, 16, 16)
    true = pipe(latents=packed, **given).images
    torch.testing.assert_close(PipelineCall(pipe, {})(latents=latents, **given).images.detach(), true, **SINGLE)


@pytest.mark.parametrize("make", [stable_diffusion, sd3, flux])
def test_gradients_reach_noise_prompts_and_weights_as_by_autograd(make):
    pipe, found = make(), {}
    widths = {"StableDiffusionPipeline": (8, None), "StableDiffusion3Pipeline": (32, 64), "FluxPipeline": (32, 32)}
    width, pooled = widths[type(pipe).__name__]
    side = 16 if pooled == 32 else 8
    noise = torch.randn(1, 4, side, side)
    given = {"prompt_embeds": torch.randn(1, 5, width)}
    if pooled:
        given["pooled_prompt_embeds"] = torch.randn(1, pooled)
    for gradient in ("direct", "exact_adjoint"):
        source = PipelineSampler(pipe, num_steps=2, gradient=gradient)
        leaves = [tensor.clone().requires_grad_() for tensor in (noise, *given.values())]
        source.sampler.zero_grad()
        source.images(leaves[0], dict(zip(given, leaves[1:], strict=True))).square().mean().backward()
        found[gradient] = [*(leaf.grad for leaf in leaves), *(p.grad for p in source.sampler.parameters())]
    for ours, autograd in zip(found["exact_adjoint"], found["direct"], strict=True):
        torch.testing.assert_close(ours, autograd, rtol=1e-4, atol=1e-8)  # float32; small components round off


def test_saved_and_loaded_without_a_network(tmp_path):
    image_pipeline().save_pretrained(tmp_path)
    torch.set_grad_enabled(True)
    pipe = load_pipeline(tmp_path)
    assert type(pipe).__name__ == "DDIMPipeline"
    assert torch.is_grad_enabled()


def test_loading_that_switches_gradients_off_is_mended(tmp_path, monkeypatch):
    image_pipeline().save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained

    def spoiling(*args, **kwargs):
        torch.set_grad_enabled(False)
        return loaded(*args, **kwargs)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", spoiling)
    load_pipeline(tmp_path)
    assert torch.is_grad_enabled()


def test_pickled_weights_are_not_loaded(tmp_path):
    pipe = image_pipeline()
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        load_pipeline(tmp_path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        load_pipeline(tmp_path)


# --- what is refused ---


@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_clipping_schedulers(setting):
    with pytest.raises(ValueError, match=f"{setting}=True.*gradient dies"):
        schedule_of(ddim_scheduler(**{setting: True}))


def test_schedulers_that_no_solver_represents():
    with pytest.raises(ValueError, match=r"LCMScheduler has no schedule.*DDIMScheduler.*FlowMatchEuler"):
        schedule_of(diffusers.LCMScheduler())
    with pytest.raises(ValueError, match="use_karras_sigmas=True"):
        schedule_of(diffusers.EulerDiscreteScheduler(use_karras_sigmas=True))
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        schedule_of(ddim_scheduler(rescale_betas_zero_snr=True))


def test_mismatched_predictions():
    with pytest.raises(ValueError, match=r"prediction='epsilon'.*'v_prediction'"):
        schedule_of(ddim_scheduler(prediction_type="v_prediction"), "epsilon")
    scheduler = ddim_scheduler()
    scheduler.register_to_config(prediction_type="noise")
    with pytest.raises(ValueError, match="prediction_type='noise'"):
        schedule_of(scheduler)


@pytest.mark.parametrize(
    "name", ["DDPM", "DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete", "PNDM", "UniPCMultistep"]
)
def test_schedulers_give_their_betas(name):
    settings = {"clip_sample": False} if name == "DDPM" else {}
    scheduler = getattr(diffusers, f"{name}Scheduler")(beta_start=0.001, beta_end=0.01, **settings)
    schedule, prediction = schedule_of(scheduler)
    assert prediction == "epsilon"
    abar = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(torch.tensor(schedule.rhos, dtype=torch.double), ((1 - abar) / abar).sqrt())


def test_an_active_safety_checker():
    pipe = stable_diffusion()
    pipe.safety_checker = object()
    with pytest.raises(ValueError, match="safety_checker"):
        PipelineSampler(pipe)


def test_pipelines_of_another_kind():
    class MyPipeline(diffusers.DiffusionPipeline):
        pass

    with pytest.raises(ValueError, match=r"MyPipeline is none of.*DDIMPipeline"):
        PipelineSampler(MyPipeline())


def test_arguments_of_a_call_that_it_does_not_have():
    call = PipelineCall(stable_diffusion(), {"guidance_scale": 1.0, "num_steps": 2})
    with pytest.raises(TypeError, match="no argument ip_adapter_image"):
        call(prompt_embeds=prompts(), ip_adapter_image="x")
    with pytest.raises(ValueError, match="output_type='jpeg'"):
        call(prompt_embeds=prompts(), output_type="jpeg")
    with pytest.raises(ValueError, match=r"latents have shape \(2, 3, 8, 8\)"):
        call(prompt_embeds=prompts(), latents=torch.zeros(2, 3, 8, 8))
    with contextlib.suppress(ImportError):
        assert call(prompt_embeds=prompts(), output_type="pil", num_images_per_prompt=2).images[0].size == (16, 16)
