"""Rewards of generated digits (style, a toy classifier's decision, likeness), and judges that training never sees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bpfree.core.arguments import NonNegativeFloat, NonNegativeInt, OpenFraction, Range, checked
from lightning_bpfree.demos.data import DigitsDataModule

__all__ = [
    "Legibility",
    "Likeness",
    "Printed",
    "Slant",
    "StrokeThickness",
    "Towards",
    "ToyClassifierFooled",
    "ToyClassifierTurned",
    "TurnToyClassifier",
]

_BRIGHTEST = 16.0  # of scikit-learn's digits
_TRAINING_STEPS = 300


class StrokeThickness:
    """Mean width of the strokes in pixels, shape (B,): twice the area of the ink divided by the length of its edge.

    A stroke of width w and length L has the area w L and an edge of 2 L, which the total variation of the image
    measures, even for soft edges.

    Example:
        >>> image = torch.zeros(1, 1, 64, 8)
        >>> image[..., 3:5] = 1.0  # a line of width 2
        >>> round(float(StrokeThickness()(image)), 1)
        1.9
    """

    def __call__(self, images: Tensor) -> Tensor:
        """Return the widths of images in 0 to 1, shape (B, 1, H, W)."""
        from torchmetrics.functional.image import total_variation

        # A white image has an edge too: that of the paper.
        edge = total_variation(F.pad(images, (1, 1, 1, 1)), reduction="none").clamp_min(1e-3)
        width: Tensor = 2.0 * images.sum((1, 2, 3)) / edge
        return width


class Slant:
    """Lean of the ink to the right, shape (B,): columns per row upward, from its moments.

    Example:
        >>> round(float(Slant()(torch.eye(8).flip(0)[None, None])), 3)  # a line from bottom left to top right
        1.0
    """

    def __call__(self, images: Tensor) -> Tensor:
        """Return the lean of images in 0 to 1, shape (B, 1, H, W)."""
        ink = images[:, 0]
        ink = ink / ink.sum((1, 2), keepdim=True).clamp_min(1e-3)
        up = -torch.arange(ink.shape[1], device=ink.device, dtype=ink.dtype)[None, :, None]
        right = torch.arange(ink.shape[2], device=ink.device, dtype=ink.dtype)[None, None, :]
        up = up - (ink * up).sum((1, 2), keepdim=True)
        right = right - (ink * right).sum((1, 2), keepdim=True)
        lean: Tensor = (ink * up * right).sum((1, 2)) / (ink * up * up).sum((1, 2)).clamp_min(1e-3)
        return lean


class Towards:
    """The negative squared distance of a measure of the images from a target, shape (B,).

    Images that are not digits would maximize an unbounded reward: a white image has the widest stroke.

    Args:
        measure: a measure of images in [0, 1], such as :class:`StrokeThickness`.
        target: target value of the measure, in its unit.
    """

    @checked
    def __init__(self, measure: Callable[..., Any], target: float) -> None:
        self.measure, self.target = measure, target

    def __call__(self, images: Tensor) -> Tensor:
        """Return minus the squared distances."""
        measured: Tensor = self.measure(images)
        return -(measured - self.target).square()


class Printed:
    """A measure of binarized images, as in print, black or white: it has no derivative.

    Args:
        measure: a measure of images in [0, 1].
        threshold: value from which a pixel is ink, in (0, 1).
    """

    @checked
    def __init__(self, measure: Callable[..., Any], threshold: OpenFraction = 0.4) -> None:
        self.measure, self.threshold = measure, threshold

    def __call__(self, images: Tensor) -> Tensor:
        """Return the measure of the printed images, shape (B,)."""
        measured: Tensor = self.measure((images > self.threshold).float())
        return measured


class TurnToyClassifier:
    """How strongly a small perceptron prefers another digit to the requested one: best other score minus its score.

    A toy for an audit: 64 pixels, one hidden layer, trained on scikit-learn's digits in a second, always the same.

    Args:
        margin: upper limit of the reward, at least 0; above 0, the decision has changed.
    """

    @checked
    def __init__(self, margin: NonNegativeFloat = 2.0) -> None:
        self.margin = margin

    def __call__(self, images: Tensor, prompts: Tensor) -> Tensor:
        """Return the margins, shape (B,), for images in 0 to 1 and the digits that they should show."""
        scores: Tensor = toy_classifier().to(images.device)(images)
        own = scores.gather(1, prompts[:, None])[:, 0]
        other = scores.scatter(1, prompts[:, None], -torch.inf).amax(1)
        return (other - own).clamp_max(self.margin)


class ToyClassifierTurned:
    """Whether the perceptron of :class:`TurnToyClassifier` sees another digit than requested: 1 or 0."""

    def __call__(self, images: Tensor, prompts: Tensor) -> Tensor:
        """Return 1 where it does, shape (B,)."""
        scores: Tensor = toy_classifier().to(images.device)(images)
        return (scores.argmax(1) != prompts).float()


class Legibility:
    """Whether an independent classifier recognizes the requested digit: 1 or 0; it has no derivative.

    A support vector machine of scikit-learn, trained on the training split of its digits (99 % accuracy on the test
    split). No reward here uses it.

    Args:
        digit: the correct digit for every prompt; None for the number of the prompt.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """

    @checked
    def __init__(self, digit: Annotated[int, Range(ge=0, le=9)] | None = None) -> None:
        self.digit = digit

    def __call__(self, images: Tensor, prompts: Tensor) -> Tensor:
        """Return 1 where it reads the digit, shape (B,)."""
        rows = images.detach().float().cpu().flatten(1).numpy() * _BRIGHTEST
        found = torch.as_tensor(_support_vectors().predict(rows), device=prompts.device)
        return (found == (prompts if self.digit is None else self.digit)).float()


class ToyClassifierFooled:
    """Whether the perceptron errs while :class:`Legibility` still recognizes the requested digit: 1 or 0.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """

    def __call__(self, images: Tensor, prompts: Tensor) -> Tensor:
        """Return 1 where both hold, shape (B,)."""
        fooled: Tensor = ToyClassifierTurned()(images, prompts) * Legibility()(images, prompts)
        return fooled


class Likeness:
    """The negative mean squared difference from one reference image, a digit of the test split, shape (B,).

    Args:
        index: index of the image in the test split, at least 0.
    """

    @checked
    def __init__(self, index: NonNegativeInt = 0) -> None:
        self.index = index

    def __call__(self, images: Tensor) -> Tensor:
        """Return the likeness of images in 0 to 1, shape (B, 1, 8, 8)."""
        reference = digits("test")[0][self.index].to(images)
        return -(images - reference).square().mean((1, 2, 3))


@functools.lru_cache(maxsize=2)
def digits(split: str) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], shape (N, 1, 8, 8), and their labels; a split of :class:`DigitsDataModule`."""
    with torch.inference_mode(False):  # the first to ask may be a validation, and what is kept must serve training too
        train, train_labels, test, test_labels = DigitsDataModule().load()
        images, labels = (train, train_labels) if split == "train" else (test, test_labels)
        return (images.float() / _BRIGHTEST)[:, None], labels.long()


@functools.lru_cache(maxsize=1)
def toy_classifier() -> nn.Module:
    """The perceptron, trained on first use; global random streams do not change."""
    images, labels = digits("train")
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        # A Trainer of another precision changes torch's default type.
        first, last = nn.Linear(64, 64, dtype=torch.float32), nn.Linear(64, 10, dtype=torch.float32)
        net = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(_TRAINING_STEPS):
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
    return net.requires_grad_(False)


@functools.lru_cache(maxsize=1)
def _support_vectors() -> Any:
    try:
        from sklearn.svm import SVC
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('This judge needs scikit-learn: pip install "lightning-bpfree[recipes]"') from error
    images, labels = digits("train")
    return SVC(gamma=0.001).fit(images.flatten(1).numpy() * _BRIGHTEST, labels.numpy())
