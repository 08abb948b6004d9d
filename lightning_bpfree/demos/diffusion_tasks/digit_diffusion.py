"""A diffusion model of handwritten digits, small enough to train on a CPU in minutes, saved as a diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_bpfree.core.arguments import FractionBelowOne, OpenFraction, PositiveFloat, PositiveInts, checked

__all__ = ["DigitDiffusion"]

_CLASSES = 10
_BRIGHTEST = 16.0  # of scikit-learn's digits


class DigitDiffusion(LightningModule):
    """A class-conditional UNet2DModel that predicts noise, for images of one channel.

    Batches are those of :class:`~lightning_bpfree.demos.data.DigitsDataModule`: standardized images and labels. A tenth
    of the labels is dropped, for classifier-free guidance. Logs ``train_loss`` and ``val_loss``, mean squared errors of
    the predicted noise, the latter with averaged weights. When the fit ends, it saves to `folder` the pipeline
    (averaged weights, safetensors), ``embeddings.safetensors`` with the ten class embeddings as ``prompt_embeds`` and
    that of no class as ``negative_prompt_embeds``, and ``no_class.safetensors`` with the latter under both names.

    Args:
        folder: Folder to which the pipeline is saved.
        channels: Channels of the UNet at 8 x 8, 4 x 4, and so on; multiples of 8.
        lr: Highest learning rate of the one-cycle schedule, above 0.
        drop_label: Share of the labels that are dropped, in [0, 1).
        ema_decay: Decay of the averaged weights, in (0, 1).

    Raises:
        ModuleNotFoundError: diffusers is not installed.
        ValueError: An argument is out of range.
    """

    @checked
    def __init__(
        self,
        folder: str,
        channels: PositiveInts = (32, 64),
        lr: PositiveFloat = 2e-3,
        drop_label: FractionBelowOne = 0.1,
        ema_decay: OpenFraction = 0.995,
    ) -> None:
        super().__init__()
        diffusers = _diffusers()
        self.folder, self.lr, self.drop_label, self.ema_decay = folder, lr, drop_label, ema_decay
        attention = len(channels) - 1  # at the coarsest level alone
        self.unet = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=tuple(channels),
            norm_num_groups=8,
            down_block_types=("DownBlock2D",) * attention + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * attention,
            class_embed_type="identity",
        )
        self.classes = nn.Embedding(_CLASSES + 1, 4 * channels[0])
        # The last step of "trailing" goes to data without noise, and the first begins where noise is all there is.
        self.scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
        parts = nn.ModuleDict({"unet": self.unet, "classes": self.classes})
        self.averaged = torch.optim.swa_utils.AveragedModel(parts, multi_avg_fn=average).requires_grad_(False)

    def _loss(self, parts: Any, images: Tensor, labels: Tensor) -> Tensor:
        noise = torch.randn_like(images)
        times = torch.randint(self.scheduler.config.num_train_timesteps, (len(images),), device=images.device)
        noisy = self.scheduler.add_noise(images, noise, times)
        predicted: Tensor = parts["unet"](noisy, times, class_labels=parts["classes"](labels)).sample
        return torch.nn.functional.mse_loss(predicted, noise)

    def _images(self, standardized: Tensor) -> Tensor:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        pixels: Tensor = standardized * data.std + data.mean
        return pixels / (_BRIGHTEST / 2) - 1.0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean squared error of the predicted noise."""
        images, labels = self._images(batch[0]), batch[1]
        left_out = torch.rand(len(labels), device=labels.device) < self.drop_label
        parts = {"unet": self.unet, "classes": self.classes}
        loss = self._loss(parts, images, labels.masked_fill(left_out, _CLASSES))
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the averaged weights."""
        self.averaged.update_parameters(nn.ModuleDict({"unet": self.unet, "classes": self.classes}))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """The same on validation images, with the same noise in every epoch."""
        with torch.random.fork_rng():
            torch.manual_seed(batch_idx)
            loss = self._loss(self.averaged.module, self._images(batch[0]), batch[1])
        self.log("val_loss", loss, prog_bar=True, batch_size=len(batch[0]))

    def on_fit_end(self) -> None:
        """Save the pipeline."""
        if self.trainer.is_global_zero:
            self.save(self.folder)
            rank_zero_info(f"The pipeline and its embeddings are in {self.folder}.")

    def save(self, folder: str | Path) -> None:
        """Write pipeline and embeddings into a folder."""
        from safetensors.torch import save_file

        parts: Any = self.averaged.module
        pipeline = _diffusers().DDIMPipeline(parts["unet"], self.scheduler)
        pipeline.save_pretrained(folder, safe_serialization=True)
        table = parts["classes"].weight.detach().cpu()
        none = table[_CLASSES:].clone()
        save_file(
            {"prompt_embeds": table[:_CLASSES].clone(), "negative_prompt_embeds": none},
            Path(folder) / "embeddings.safetensors",
        )
        save_file(
            {"prompt_embeds": none, "negative_prompt_embeds": none.clone()}, Path(folder) / "no_class.safetensors"
        )

    def configure_optimizers(self) -> Any:
        """AdamW with a one-cycle schedule."""
        trained = [*self.unet.parameters(), *self.classes.parameters()]
        optimizer = torch.optim.AdamW(trained, lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _diffusers() -> Any:
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('This model needs diffusers: pip install "lightning-bpfree[diffusion]"') from error
    return diffusers
