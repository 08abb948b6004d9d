"""Grids of generated images, as PNG files and in loggers that accept images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.nn.functional import interpolate, pad

from lightning_bpfree.methods.diffusion_adjoint.pipeline_sampler import required_diffusers

SMALLEST = 64  # pixels of a side: smaller images are enlarged, each pixel to a square
BORDER = 2  # pixels of gray around each image


def save_grid(trainer: pl.Trainer, images: Tensor, name: str) -> Path:
    """Write a grid of images into the run's folder, and hand it to the loggers; return the file.

    Args:
        trainer: whose folder and loggers.
        images: in 0 to 1, shape (B, C, H, W).
        name: name of the file, without its ending.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir) / "images"
    folder.mkdir(parents=True, exist_ok=True)
    grid, path = image_grid(images), folder / f"{name}.png"
    grid.save(path)
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # Weights & Biases
            logger.log_image(key="images", images=[grid], caption=[name])
    return path


def image_grid(images: Tensor) -> Any:
    """Return a picture (of PIL) with images side by side, about as many rows as columns.

    Args:
        images: in 0 to 1, shape (B, C, H, W), with 1 or 3 channels.
    """
    required_diffusers()
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils.pil_utils import make_image_grid

    images = images.detach().float().cpu()
    factor = max(1, math.ceil(SMALLEST / min(images.shape[-2:])))
    images = pad(interpolate(images, scale_factor=float(factor), mode="nearest"), (BORDER,) * 4, value=0.5)
    pictures = VaeImageProcessor.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    blank = [pictures[0].point(lambda _: 0)] * (rows * columns - len(pictures))
    return make_image_grid([*pictures, *blank], rows, columns)
