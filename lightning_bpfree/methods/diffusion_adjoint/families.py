"""Families of diffusers pipelines: how their networks are called, how prompts are encoded, how images are decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bpfree.methods.diffusion_adjoint.diffusers_schedules import dynamic_mu

Prompts = dict[str, Tensor]


class Network(nn.Module):
    """A network of diffusers, called as ``network(x, time, **conditioning)``.

    Args:
        network: the network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class ImageUNet(Network):
    """A UNet2DModel; ``prompt_embeds`` of shape (B, D) are its class labels, with ``class_embed_type="identity"``."""

    def forward(self, x: Tensor, time: Tensor, prompt_embeds: Tensor | None = None) -> Tensor:
        """Return the prediction, shape (B, C, H, W)."""
        out: Tensor = self.network(x, time, class_labels=prompt_embeds).sample
        return out


class TextUNet(Network):
    """A UNet2DConditionModel; ``prompt_embeds`` of shape (B, L, D) go to its cross attention."""

    def forward(self, x: Tensor, time: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Return the prediction, shape (B, C, H, W)."""
        out: Tensor = self.network(x, time, encoder_hidden_states=prompt_embeds).sample
        return out


class SD3Transformer(Network):
    """An SD3Transformer2DModel."""

    def forward(self, x: Tensor, time: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Tensor:
        """Return the prediction, shape (B, C, H, W)."""
        out: Tensor = self.network(
            x, timestep=time, encoder_hidden_states=prompt_embeds, pooled_projections=pooled_prompt_embeds
        ).sample
        return out


class FluxTransformer(Network):
    """A FluxTransformer2DModel on latents as images: patches of 2 x 2 are made and undone around it.

    Args:
        network: the network.
        guidance: the guidance scale that distilled models get as input.
    """

    def __init__(self, network: nn.Module, guidance: float = 3.5) -> None:
        super().__init__(network)
        self.guidance = guidance

    def forward(self, x: Tensor, time: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Tensor:
        """Return the prediction, shape (B, C, H, W)."""
        b, c, h, w = x.shape
        rows, columns = h // 2, w // 2
        patches = x.view(b, c, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, 4 * c)
        places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
        places[..., 1] += torch.arange(rows, device=x.device)[:, None]
        places[..., 2] += torch.arange(columns, device=x.device)
        config: Any = self.network.config
        out: Tensor = self.network(
            hidden_states=patches,
            timestep=time / 1000,
            guidance=x.new_full((b,), self.guidance) if config.guidance_embeds else None,
            pooled_projections=pooled_prompt_embeds,
            encoder_hidden_states=prompt_embeds,
            txt_ids=x.new_zeros(prompt_embeds.shape[1], 3),
            img_ids=places.view(-1, 3),
        ).sample
        return out.view(b, rows, columns, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


class Family:
    """What pipelines of one kind share; subclasses are final.

    Args:
        pipe: the pipeline.
    """

    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    """Arguments of the pipeline that the network is conditioned on; those without a prompt begin with ``negative_``."""
    guidance: ClassVar[str] = "guidance_scale"
    """The argument of the pipeline that is the scale of classifier-free guidance."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def network(self) -> Network:
        """Return the network with the solver's way of calling it."""
        raise NotImplementedError

    def shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """Return the shape of one latent for an image of that size in pixels; None: the model's own."""
        raise NotImplementedError

    def mu(self, shape: Sequence[int]) -> float | None:
        """Return the exponent of the dynamic shift for latents of that shape, if the scheduler has one."""
        patch = self.patch
        return dynamic_mu(self.pipe.scheduler.config, (shape[-2] // patch) * (shape[-1] // patch))

    @property
    def patch(self) -> int:
        """Side of a patch of the transformer."""
        return 1

    def encode(self, prompts: list[str], negative: list[str] | None) -> tuple[Prompts, Prompts | None]:
        """Return the embeddings of prompts, and of negative ones where given, by the names of arguments."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Return images in 0 to 1, shape (B, C, H, W)."""
        vae = self.pipe.vae
        latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        latents = latents.to(vae.dtype)
        if torch.is_grad_enabled() and latents.requires_grad:
            # Outside of the ODE: its activations, which may be larger than the network's, are recomputed as well.
            decoded: Tensor = checkpoint(lambda z: vae.decode(z, return_dict=False)[0], latents, use_reentrant=False)
        else:
            decoded = vae.decode(latents, return_dict=False)[0]
        return in_unit_range(decoded.float())

    def _latent_size(self, height: int | None, width: int | None, sample_size: Any) -> tuple[int, int]:
        factor = self.pipe.vae_scale_factor
        for name, pixels in {"height": height, "width": width}.items():
            if pixels is not None and pixels % (factor * self.patch):
                raise ValueError(f"{name}={pixels} is no multiple of {factor * self.patch}.")
        sides = sample_size if isinstance(sample_size, list | tuple) else (sample_size, sample_size)
        return (height // factor if height else sides[0], width // factor if width else sides[1])


class PixelFamily(Family):
    """UNet2DModel without an autoencoder: DDPMPipeline and DDIMPipeline."""

    def network(self) -> Network:
        """Return the UNet with the solver's way of calling it."""
        return ImageUNet(self.pipe.unet)

    def shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """Return the shape of one image."""
        config = self.pipe.unet.config
        sides = config.sample_size if isinstance(config.sample_size, list | tuple) else (config.sample_size,) * 2
        return (config.in_channels, height or sides[0], width or sides[1])

    def encode(self, prompts: list[str], negative: list[str] | None) -> tuple[Prompts, Prompts | None]:
        """Raise: this kind of model reads no text."""
        raise ValueError(f"{type(self.pipe).__name__} reads no prompts: give prompt_embeds, or nothing.")

    def decode(self, latents: Tensor) -> Tensor:
        """Return images in 0 to 1."""
        return in_unit_range(latents)


class StableDiffusionFamily(Family):
    """UNet2DConditionModel with one text encoder: StableDiffusionPipeline."""

    def network(self) -> Network:
        """Return the UNet with the solver's way of calling it."""
        if self.pipe.unet.config.addition_embed_type is not None:
            raise ValueError(
                f"addition_embed_type={self.pipe.unet.config.addition_embed_type!r} of the UNet (SDXL) is not "
                "supported: use StableDiffusionPipeline models, or DiffusionSampler with a denoiser of your own."
            )
        return TextUNet(self.pipe.unet)

    def shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """Return the shape of one latent."""
        config = self.pipe.unet.config
        return (config.in_channels, *self._latent_size(height, width, config.sample_size))

    def encode(self, prompts: list[str], negative: list[str] | None) -> tuple[Prompts, Prompts | None]:
        """Return the text encoder's last hidden states."""
        embeds, without = self.pipe.encode_prompt(
            prompts, self.pipe.device, 1, negative is not None, negative_prompt=negative
        )[:2]
        return {"prompt_embeds": embeds}, None if negative is None else {"prompt_embeds": without}


class SD3Family(Family):
    """StableDiffusion3Pipeline."""

    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")

    def network(self) -> Network:
        """Return the transformer with the solver's way of calling it."""
        return SD3Transformer(self.pipe.transformer)

    @property
    def patch(self) -> int:
        """Side of a patch of the transformer."""
        return int(self.pipe.transformer.config.patch_size)

    def shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """Return the shape of one latent."""
        config = self.pipe.transformer.config
        return (config.in_channels, *self._latent_size(height, width, config.sample_size))

    def encode(self, prompts: list[str], negative: list[str] | None) -> tuple[Prompts, Prompts | None]:
        """Return what the three text encoders say."""
        embeds, without, pooled, pooled_without = self.pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=negative is not None, negative_prompt=negative
        )
        empty = {"prompt_embeds": without, "pooled_prompt_embeds": pooled_without}
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}, None if negative is None else empty


class FluxFamily(Family):
    """FluxPipeline; the network is told ``guidance_scale``, and ``true_cfg_scale`` is classifier-free guidance."""

    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds", "pooled_prompt_embeds")
    guidance: ClassVar[str] = "true_cfg_scale"

    def network(self) -> Network:
        """Return the transformer with the solver's way of calling it."""
        return FluxTransformer(self.pipe.transformer)

    @property
    def patch(self) -> int:
        """Side of a patch of the transformer."""
        return 2

    def shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """Return the shape of one latent, before patches are made."""
        sides = self._latent_size(height, width, self.pipe.default_sample_size)
        return (self.pipe.transformer.config.in_channels // 4, *sides)

    def encode(self, prompts: list[str], negative: list[str] | None) -> tuple[Prompts, Prompts | None]:
        """Return what the two text encoders say."""

        def encoded(texts: list[str]) -> Prompts:
            embeds, pooled, _ = self.pipe.encode_prompt(texts, None)
            return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

        return encoded(prompts), None if negative is None else encoded(negative)


FAMILIES: Mapping[str, type[Family]] = {
    "DDIMPipeline": PixelFamily,
    "DDPMPipeline": PixelFamily,
    "StableDiffusionPipeline": StableDiffusionFamily,
    "StableDiffusion3Pipeline": SD3Family,
    "FluxPipeline": FluxFamily,
}


def in_unit_range(images: Tensor) -> Tensor:
    """Return images from -1 to 1 in 0 to 1, as pipelines do; no gradient passes where they saturate."""
    return (images / 2 + 0.5).clamp(0, 1)


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline.

    Raises:
        ValueError: for a pipeline of another kind, and for one with an active safety checker.
    """
    kinds = [FAMILIES[kind.__name__] for kind in type(pipe).__mro__ if kind.__name__ in FAMILIES]
    if not kinds:
        raise ValueError(
            f"{type(pipe).__name__} is none of the pipelines that can be differentiated: {', '.join(FAMILIES)}. For "
            "another model call DiffusionSampler with its network and its scheduler's schedule."
        )
    if getattr(pipe, "safety_checker", None) is not None:
        raise ValueError(
            "safety_checker of the pipeline is active: it blacks out images, through which no gradient passes, and "
            "this package offers no gradient through or around one. Load the pipeline with safety_checker=None for a "
            "model and a use that permit it."
        )
    return kinds[0](pipe)
