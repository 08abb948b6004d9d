"""Corruptions of a training set, to study the robustness of training rules to noise; validation and test stay clean.

The parts are those of D. Y. M. Tang, "The Integrated Forward-Forward Algorithm", 2023, arXiv 2305.12960: noise on a
third of the training images, rows missing from another third, and a third more images of noise with random labels.
Label noise is available in addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bpfree.core.arguments import (
    Fraction,
    NonNegativeFloat,
    OpenFraction,
    Seed32,
    checked,
    checked_class,
)

CorruptionName = Literal["none", "gaussian", "missing_rows", "random_images", "random_labels", "paper"]


class Pixels(NamedTuple):
    """Statistics of the clean images that a corruption needs.

    Args:
        black: Their smallest value.
        white: Their largest value.
        mean: Their mean.
    """

    black: float
    white: float
    mean: float


@checked_class
@dataclass(frozen=True)
class Corruption:
    """Corruption of the training set; shares are of the training samples in use, rounded to whole samples.

    Images with Gaussian noise and images with missing rows are disjoint, so their shares sum to at most 1. The other
    two parts are independent of them and of each other; label noise does not affect random images. A larger share
    corrupts a superset of the samples of a smaller share. Noise is added before standardization, without clipping:
    values may leave the range of the pixels, since otherwise black could only get brighter.

    Args:
        gaussian: Share of the images that get Gaussian noise.
        missing_rows: Share of the images whose bottom rows are black, which is the smallest value of the images.
        random_images: Images to add, as a share of the training samples: the mean of the training images and Gaussian
            noise, with a label drawn from all classes.
        random_labels: Share of the labels that are replaced by another one, uniformly.
        noise_std: Standard deviation of the Gaussian noise of both parts, in units of the range of the pixels.
        missing_height: Share of the height that is missing, at least one row and not all; None draws the number of
            rows for each image, from one to all but one.
        seed: Determines all random choices here.

    Raises:
        ValueError: An argument is out of range; from :meth:`apply` where it is out of range for this data set.

    Example:
        >>> images, labels = torch.rand(60, 1, 8, 8), torch.arange(60) % 10
        >>> images, labels = CORRUPTIONS["paper"].apply(images, labels, 10, Pixels(0.0, 1.0, 0.5))
        >>> len(images), int((images[:60, :, -1] == 0).all(dim=(1, 2)).sum())
        (80, 20)
    """

    gaussian: Fraction = 0.0
    missing_rows: Fraction = 0.0
    random_images: Fraction = 0.0
    random_labels: Fraction = 0.0
    noise_std: NonNegativeFloat = 0.1
    missing_height: OpenFraction | None = None
    seed: Seed32 = 0

    def __post_init__(self) -> None:
        if self.gaussian + self.missing_rows > 1 + 1e-9:
            raise ValueError(
                f"Corruption: gaussian is {self.gaussian} and missing_rows {self.missing_rows}, together more than "
                "all images, and no image gets both; choose shares whose sum is at most 1."
            )

    def added(self, n: int) -> int:
        """The number of images that are added to ``n`` training samples."""
        return round(self.random_images * n)

    def apply(self, images: Tensor, labels: Tensor, num_classes: int, pixels: Pixels) -> tuple[Tensor, Tensor]:
        """Return corrupted copies, random images last.

        Args:
            images: Clean training images, (N, C, H, W), before standardization.
            labels: Their classes, (N,), from 0 to `num_classes` - 1.
            num_classes: Number of classes.
            pixels: Statistics of the clean images.
        """
        images, labels, n = images.clone(), labels.clone(), len(images)
        noise = self.noise_std * (pixels.white - pixels.black)
        order = torch.from_numpy(self._stream(0).permutation(n))
        noisy = order[: round(self.gaussian * n)]  # from the front, and the others from the back: never the same
        cut = order.flip(0)[: min(round(self.missing_rows * n), n - len(noisy))]
        images[noisy] += noise * self._normal(1, len(noisy), images.shape[1:])
        if len(cut):
            images[cut] = torch.where(self._missing(n, images.shape[2])[cut], pixels.black, images[cut])
        if self.random_labels:
            state = self._stream(3)
            wrong = torch.from_numpy(state.permutation(n))[: round(self.random_labels * n)]
            further = torch.from_numpy(state.randint(1, num_classes, n))  # never all the way round to the same label
            labels[wrong] = (labels[wrong] + further[wrong]) % num_classes
        if added := self.added(n):
            images = torch.cat([images, pixels.mean + noise * self._normal(4, added, images.shape[1:])])
            labels = torch.cat([labels, torch.from_numpy(self._stream(5).randint(0, num_classes, added))])
        return images, labels

    def _stream(self, part: int) -> np.random.RandomState:
        # RandomState's streams are frozen across numpy versions. Each draw has its own: no part changes with another.
        return np.random.RandomState([self.seed, part])

    def _normal(self, part: int, n: int, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(self._stream(part).standard_normal((n, *shape)).astype("float32"))

    def _missing(self, n: int, height: int) -> Tensor:
        """Which rows of each image are missing, (N, 1, H, 1)."""
        if height < 2:
            raise ValueError(
                f"missing_rows is {self.missing_rows}, but images of this data set have one row; give 0, or choose "
                "another data set."
            )
        if self.missing_height is None:
            rows = torch.from_numpy(self._stream(2).randint(1, height, n))
        else:
            rows = torch.full((n,), min(max(round(self.missing_height * height), 1), height - 1))
        return (torch.arange(height) >= height - rows[:, None])[:, None, :, None]


_THIRD = 1 / 3
CORRUPTIONS: dict[CorruptionName, Corruption] = {
    "none": Corruption(),
    "gaussian": Corruption(gaussian=_THIRD),
    "missing_rows": Corruption(missing_rows=_THIRD),
    "random_images": Corruption(random_images=_THIRD),
    "random_labels": Corruption(random_labels=_THIRD),
    "paper": Corruption(gaussian=_THIRD, missing_rows=_THIRD, random_images=_THIRD),
}


@checked
def chosen_corruption(choice: CorruptionName | Corruption | None) -> Corruption:
    """The corruption of this name, or the given corruption; None means no corruption.

    Raises:
        ValueError: There is no corruption of this name.

    Example:
        >>> chosen_corruption("random_labels").random_labels == 1 / 3
        True
    """
    if isinstance(choice, Corruption):
        return choice
    return CORRUPTIONS[choice or "none"]
