"""Tasks and networks for learned architectures: pixels as a sequence, denoising, and a residual network."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_bpfree.core.arguments import PositiveFloat, PositiveInt, PositiveInts, check_arguments, checked

__all__ = ["Denoiser", "PixelSequence", "SmallResNet"]


class PixelSequence(nn.Module):
    """Passes images to a sequence network, pixel by pixel.

    Args:
        net: Network for inputs of shape (B, C, H * W).

    Example:
        >>> PixelSequence(nn.Conv1d(1, 3, 1))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 3, 64])
    """

    @checked
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the network, for images of shape (B, C, H, W)."""
        out: Tensor = self.net(x.flatten(2))
        return out


class _ResidualBlock(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.norm2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.act = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or a != b:
            self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        out: Tensor = self.act(hidden + self.shortcut(x))
        return out


class SmallResNet(nn.Module):
    """A residual network of 3 x 3 convolutions; each stage after the first has half the height and width.

    Args:
        channels: Channels of the images.
        widths: Channels of each stage, at least one.
        blocks: Residual blocks of a stage.
        num_classes: Width of the output.

    Raises:
        ValueError: A size is below 1.

    Example:
        >>> SmallResNet()(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])

    References:
        K. He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv 1512.03385.
    """

    @checked
    def __init__(
        self,
        channels: PositiveInt = 1,
        widths: PositiveInts = (10, 20, 40),
        blocks: PositiveInt = 2,
        num_classes: PositiveInt = 10,
    ) -> None:
        super().__init__()
        first = widths[0]
        conv = nn.Conv2d(channels, first, 3, padding=1, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(first), nn.ReLU())
        before = [first, *widths[:-1]]
        self.stages = nn.ModuleList(
            nn.Sequential(
                _ResidualBlock(a, b, 1 if stage == 0 else 2), *(_ResidualBlock(b, b, 1) for _ in range(blocks - 1))
            )
            for stage, (a, b) in enumerate(zip(before, widths, strict=True))
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, num_classes), of images of shape (B, channels, H, W)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Denoiser(LightningModule):
    """Dense prediction of the clean image from one with Gaussian noise.

    Batches are pairs of images and labels; labels are not used. Logs, as means over the epoch, ``train_loss``,
    ``val_loss`` and ``test_loss``: mean squared errors. The noise of an image for validation and test is always the
    same.

    Args:
        net: Network from images to images of the same shape.
        noise: Standard deviation of the noise, above 0.
        lr: Learning rate of AdamW, above 0.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, net: nn.Module, noise: PositiveFloat = 1.0, lr: PositiveFloat = 0.005) -> None:
        check_arguments(Denoiser, locals())
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """The images without noise."""
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean squared error under fresh noise."""
        x = batch[0]
        return self._logged("train", x, torch.randn_like(x))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val_loss``."""
        self._logged("val", batch[0], self._fixed_noise(batch[0], batch_idx))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test_loss``."""
        self._logged("test", batch[0], self._fixed_noise(batch[0], batch_idx))

    def configure_optimizers(self) -> Any:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])

    def _fixed_noise(self, x: Tensor, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch_idx)
        return torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)

    def _logged(self, stage: str, x: Tensor, noise: Tensor) -> Tensor:
        loss = F.mse_loss(self(x + self.hparams["noise"] * noise), x)
        self.log(f"{stage}_loss", loss.detach(), on_step=False, on_epoch=True, prog_bar=True, batch_size=len(x))
        return loss
