"""Diffusion models of a few thousand weights, built from their configurations: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def ddim_scheduler(**settings: Any) -> DDIMScheduler:
    return DDIMScheduler(**{**STABLE, "set_alpha_to_one": False, "steps_offset": 1, **settings})


def text_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        norm_num_groups=2,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def image_unet(**settings: Any) -> UNet2DModel:
    options = {
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**options, **settings})


def autoencoder(**settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[4, 8],
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        norm_num_groups=2,
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        **settings,
    )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_pipeline(**settings: Any) -> DDIMPipeline:
    return quiet(DDIMPipeline(image_unet(**settings), ddim_scheduler()))


def stable_diffusion(text: bool = False) -> StableDiffusionPipeline:
    parts = text_parts() if text else {"text_encoder": None, "tokenizer": None}
    return quiet(
        StableDiffusionPipeline(
            vae=autoencoder(),
            unet=text_unet(),
            scheduler=ddim_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
            **parts,
        )
    )


def text_parts() -> dict[str, Any]:
    """A CLIP text encoder and a byte-level tokenizer, made by hand: no vocabulary to fetch."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
    )
    return {"text_encoder": CLIPTextModel(config), "tokenizer": tokenizer}


def sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=4,
        attention_head_dim=8,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
    )
    none = dict.fromkeys(
        ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
    )
    vae = autoencoder(shift_factor=0.06, scaling_factor=1.5)
    return quiet(
        StableDiffusion3Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, **none)
    )


def flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    none = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    vae = autoencoder(shift_factor=0.06, scaling_factor=1.5)
    return quiet(FluxPipeline(transformer=transformer, scheduler=scheduler, vae=vae, **none))


def prompts(rows: int = 2, **settings: Any) -> torch.Tensor:
    return torch.randn(rows, 5, 8, generator=torch.Generator().manual_seed(1), **settings)
