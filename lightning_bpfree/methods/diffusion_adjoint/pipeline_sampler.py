"""Images from a diffusers pipeline with a differentiable sampler, and pipelines from local folders."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack  # torch needs it too

from lightning_bpfree.core.arguments import checked
from lightning_bpfree.methods.diffusion_adjoint.diffusers_schedules import schedule_of
from lightning_bpfree.methods.diffusion_adjoint.families import FluxTransformer, Prompts, family_of
from lightning_bpfree.methods.diffusion_adjoint.sampler import DiffusionSampler, Options, Settings


def load_pipeline(path: str | Path, **kwargs: Any) -> Any:
    """Return the diffusers pipeline in a local folder: safetensors only, nothing downloaded, no code from the folder.

    Whether gradients are recorded is as before: loading some pipelines switches them off for the whole process.

    Args:
        path: folder with a ``model_index.json``.
        **kwargs: for ``DiffusionPipeline.from_pretrained``.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
        FileNotFoundError: there is no such folder, or no pipeline in it.
    """
    folder = Path(path)
    if not (folder / "model_index.json").is_file():
        what = "has no model_index.json" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"pipeline={str(path)!r}: the folder {what} (looked in {folder.absolute()}). Give the folder of a pipeline "
            "that was saved by save_pretrained; names of models on a hub are not looked up."
        )
    diffusers = required_diffusers()
    enabled = torch.is_grad_enabled()
    try:
        return diffusers.DiffusionPipeline.from_pretrained(
            str(folder), **{"local_files_only": True, "use_safetensors": True, "trust_remote_code": False, **kwargs}
        )
    finally:
        torch.set_grad_enabled(enabled)


def required_diffusers() -> Any:
    """Return the package diffusers, or raise ModuleNotFoundError naming the extra that brings it."""
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'diffusion pipelines need diffusers: pip install "lightning-bpfree[diffusion]"'
        ) from error
    return diffusers


class PipelineSampler:
    """Differentiable samples from a pipeline's networks, encoders and schedule, with a solver of this package.

    Args:
        pipe: a DDPMPipeline, DDIMPipeline, StableDiffusionPipeline, StableDiffusion3Pipeline or FluxPipeline.
        **settings: see :class:`~lightning_bpfree.methods.diffusion_adjoint.sampler.Settings`.

    Raises:
        ValueError: for parts of the pipeline that the solver does not support.
    """

    @checked
    def __init__(self, pipe: Any, **settings: Unpack[Options]) -> None:
        self.pipe, self.family = pipe, family_of(pipe)
        shape = self.family.shape(None, None)
        schedule, prediction = schedule_of(pipe.scheduler, mu=self.family.mu(shape))
        self.sampler = DiffusionSampler(self.family.network(), schedule, prediction, **settings)

    def noise(self, seeds: Sequence[int], height: int | None = None, width: int | None = None) -> Tensor:
        """Return standard normal latents, one row per seed, the same on every device."""
        shape = self.family.shape(height, width)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        # float32 whatever torch's default is, which Trainers of other precisions change: a seed means one noise.
        return torch.stack([torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators])

    def latents(self, noise: Tensor, prompts: Prompts | None, without: Prompts | None = None) -> Tensor:
        """Return samples before decoding, from noise and encoded prompts."""
        mu = self.family.mu(noise.shape)
        if mu is not None:  # a dynamic shift goes by the size of the image
            self.sampler.schedule = schedule_of(self.pipe.scheduler, mu=mu)[0]
        out: Tensor = self.sampler(noise, prompts, without)
        return out

    def images(self, noise: Tensor, prompts: Prompts | None, without: Prompts | None = None) -> Tensor:
        """Return images in [0, 1], shape (B, C, H, W), from noise and encoded prompts."""
        return self.family.decode(self.latents(noise, prompts, without))


class PipelineCall:
    """Stands in for ``__call__`` of a pipeline: the same arguments, images with gradients.

    Args:
        pipe: the pipeline.
        settings: settings of the sampler, those that are not to be taken from the call.
    """

    def __init__(self, pipe: Any, settings: dict[str, Any]) -> None:
        self.given = settings
        self.defaults = {
            name: parameter.default for name, parameter in inspect.signature(type(pipe).__call__).parameters.items()
        }
        self.inner = PipelineSampler(pipe, **settings)
        self.sampler, self.family = self.inner.sampler, self.inner.family

    def __call__(self, **arguments: Any) -> Any:
        """Return what the pipeline returns, with ``output_type`` ``"pt"`` or ``"latent"``.

        Raises:
            TypeError: for an argument that the differentiable call does not have.
        """
        call = _Call(self, arguments)
        with self.sampler.using(call.settings()):
            latents = self.inner.latents(*call.inputs())
        output = call.output_type
        images: Any = latents if output == "latent" else self.family.decode(latents)
        if output == "pil":
            images = self.family.pipe.image_processor.postprocess(images.detach() * 2 - 1, output_type="pil")
        if output == "np":
            images = images.detach().cpu().permute(0, 2, 3, 1).float().numpy()
        if not call.taken.get("return_dict", True):
            return (images,)
        return required_diffusers().ImagePipelineOutput(images=images)


class _Call:
    """The arguments of one call."""

    def __init__(self, of: PipelineCall, arguments: dict[str, Any]) -> None:
        self.of, self.family, self.taken = of, of.family, arguments
        embeddings = self.family.embeddings
        known = {"prompt", "negative_prompt", "height", "width", "generator", "latents", "output_type", "return_dict"}
        known |= {"batch_size", "num_images_per_prompt", "num_inference_steps", "guidance_scale", "guidance_rescale"}
        known |= {*embeddings, *(f"negative_{name}" for name in embeddings), self.family.guidance}
        unknown = [name for name, value in arguments.items() if name not in known and value != of.defaults.get(name)]
        if unknown:
            raise TypeError(
                f"a differentiable {type(self.family.pipe).__name__} has no argument {', '.join(sorted(unknown))}: it "
                f"takes {', '.join(sorted(known))}."
            )
        self.output_type = arguments.get("output_type", "pt")
        if self.output_type not in ("pt", "latent", "pil", "np"):
            raise ValueError(f"output_type={self.output_type!r}: choose 'pt', 'latent', 'pil' or 'np'.")

    def value(self, name: str, otherwise: Any = None) -> Any:
        """Return an argument, or the pipeline's own default."""
        default = self.of.defaults.get(name, otherwise)
        value = self.taken.get(name, default)
        return otherwise if value is None or value is inspect.Parameter.empty else value

    def settings(self) -> Settings:
        """Return the sampler's settings: those of the callback, else of the call."""
        of_call = {"num_steps": self.value("num_inference_steps", 50)}
        of_call["guidance_scale"] = float(self.value(self.family.guidance, 1.0))
        of_call["guidance_rescale"] = float(self.value("guidance_rescale", 0.0))
        given = {name: value for name, value in of_call.items() if name not in self.of.given}
        return self.of.sampler.settings._replace(**given)

    def inputs(self) -> tuple[Tensor, Prompts | None, Prompts | None]:
        """Return noise, conditioning, and that of the empty prompt."""
        guided = self.settings().guidance_scale != 1.0
        prompts, without = self._prompts(guided)
        network = self.of.sampler.denoiser
        if isinstance(network, FluxTransformer):
            network.guidance = float(self.value("guidance_scale", 3.5))
        rows = max(len(value) for value in prompts.values()) if prompts else self.value("batch_size", 1)
        copies = int(self.value("num_images_per_prompt", 1))
        if copies > 1:
            prompts, without = (_repeated(part, copies) for part in (prompts, without))
            rows *= copies
        return self._latents(rows), prompts, without

    def _prompts(self, guided: bool) -> tuple[Prompts | None, Prompts | None]:
        names = self.family.embeddings
        prompts = {name: self.taken[name] for name in names if self.taken.get(name) is not None}
        without = {n: self.taken[f"negative_{n}"] for n in names if self.taken.get(f"negative_{n}") is not None}
        texts = self.taken.get("prompt")
        if texts is None:
            return prompts or None, without or None
        if prompts:
            raise ValueError("prompt and prompt_embeds are both given: keep one.")
        texts = [texts] if isinstance(texts, str) else list(texts)
        negative = self.taken.get("negative_prompt") or ""
        negatives = [negative] * len(texts) if isinstance(negative, str) else list(negative)
        return self.family.encode(texts, negatives if guided else None)

    def _latents(self, rows: int) -> Tensor:
        pipe = self.family.pipe
        latents: Tensor | None = self.taken.get("latents")
        shape = self.family.shape(self.value("height"), self.value("width"))
        if latents is not None:
            if tuple(latents.shape[1:]) != shape:
                raise ValueError(f"latents have shape {tuple(latents.shape)}: give (B, {', '.join(map(str, shape))}).")
            return latents.expand(rows, *shape) if len(latents) == 1 else latents
        required_diffusers()
        from diffusers.utils.torch_utils import randn_tensor

        noise: Tensor = randn_tensor((rows, *shape), self.value("generator"), pipe.device, torch.float32)
        return noise


def _repeated(prompts: Prompts | None, copies: int) -> Prompts | None:
    return None if prompts is None else {name: value.repeat_interleave(copies, 0) for name, value in prompts.items()}
