"""Parameterizations of input changes: additive, on a coarse grid, in the latent space of an autoencoder."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bpfree.core.arguments import PositiveInt, checked


class Parameterization(ABC):
    """From free numbers, one set a sample, to changed inputs.

    Attributes:
        continuous: whether half of a change is a change too.
    """

    continuous: bool = True

    def prepare(self, inputs: Tensor) -> None:  # noqa: B027  # most have nothing to learn
        """Fit to many inputs; called before inputs are changed."""

    @abstractmethod
    def start(self, inputs: Tensor) -> Tensor:
        """Return the free numbers ``(B, ...)`` that change nothing.

        Raises:
            ValueError: for inputs that cannot be changed in this way.
        """

    @abstractmethod
    def apply(self, inputs: Tensor, free: Tensor) -> Tensor:
        """Return changed inputs."""

    def reference(self, inputs: Tensor) -> Tensor:
        """Return what changed inputs are compared with: the inputs, or their reconstruction by an autoencoder."""
        return inputs

    def size(self, inputs: Tensor, free: Tensor) -> Tensor:
        """Return the size of the change in free numbers, ``(B,)``: the sparsity penalty."""
        return free.abs().flatten(1).sum(1)

    def project(self, inputs: Tensor, free: Tensor) -> None:  # noqa: B027  # most leave them free
        """Move the free numbers, in place, to the nearest ones that are allowed."""

    def attached(self, module: nn.Module, free: Tensor) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the module sees the changed inputs."""
        return contextlib.nullcontext()


class AdditiveChange(Parameterization):
    """Adds a number to every value of the input, within a range.

    Args:
        low: smallest value of an input; None for no limit.
        high: largest value.
        mask: 1 where the input may change, and 0 elsewhere; broadcast over samples. None for everywhere.

    Examples:
        >>> change = AdditiveChange(low=0.0, high=1.0)
        >>> x, free = torch.tensor([[0.5, 0.9]]), torch.tensor([[0.2, 0.5]])
        >>> change.project(x, free)
        >>> change.apply(x, free)
        tensor([[0.7000, 1.0000]])
    """

    @checked
    def __init__(self, low: float | None = None, high: float | None = None, mask: Tensor | None = None) -> None:
        if low is not None and high is not None and not low < high:
            raise ValueError(f"low={low}, high={high}: the range of inputs is empty.")
        self.low, self.high, self.mask = low, high, mask

    def start(self, inputs: Tensor) -> Tensor:
        """Return zeros."""
        check_floating(inputs, type(self).__name__)
        check_range(inputs, self.low, self.high)
        return torch.zeros_like(inputs)

    def apply(self, inputs: Tensor, free: Tensor) -> Tensor:
        """Return the sums."""
        return inputs + free

    def project(self, inputs: Tensor, free: Tensor) -> None:
        """Keep the sums in the range, and the change zero where the mask is 0."""
        if self.mask is not None:
            free.mul_(self.mask.to(free))
        if self.low is not None or self.high is not None:
            free.copy_((inputs + free).clamp(self.low, self.high) - inputs)


class GridChange(AdditiveChange):
    """Adds a smooth change to images: numbers on a coarse grid with interpolation.

    High frequencies, which adversarial changes use, are impossible.

    Args:
        cells: rows and columns of the grid.
        low: least value of an image.
        high: largest value.

    Examples:
        >>> GridChange(4).apply(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 4, 4)).mean()
        tensor(1.)
    """

    @checked
    def __init__(self, cells: PositiveInt = 7, low: float | None = None, high: float | None = None) -> None:
        super().__init__(low, high)
        self.cells = cells

    def start(self, inputs: Tensor) -> Tensor:
        """Return zeros on the grid."""
        if inputs.dim() != 4:
            raise ValueError(
                f"GridChange changes images of shape (B, C, H, W), and got {tuple(inputs.shape)}: use AdditiveChange."
            )
        check_floating(inputs, "GridChange")
        check_range(inputs, self.low, self.high)
        return inputs.new_zeros(*inputs.shape[:2], self.cells, self.cells)

    def apply(self, inputs: Tensor, free: Tensor) -> Tensor:
        """Return the images plus the interpolated grid, clamped to the range."""
        smooth = F.interpolate(free, size=inputs.shape[2:], mode="bilinear", align_corners=True)
        made = inputs + smooth
        return made if self.low is None and self.high is None else made.clamp(self.low, self.high)

    def project(self, inputs: Tensor, free: Tensor) -> None:
        """Leave the grid unconstrained; :meth:`apply` clamps the images."""


@runtime_checkable
class Autoencoder(Protocol):
    """A module with an encoder and a decoder."""

    def encode(self, inputs: Tensor) -> Tensor:
        """Return latents."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return inputs."""


class LatentChange(Parameterization):
    """Adds to the latents of an autoencoder: changed inputs are outputs of its decoder.

    Args:
        autoencoder: a module with ``encode`` and ``decode``. If it has a method ``fit``, it is called once with the
            inputs of the concept's data.
        low: smallest value of an input; None for no limit.
        high: largest value.

    Raises:
        ValueError: for an object without these methods.
    """

    @checked
    def __init__(self, autoencoder: nn.Module, low: float | None = None, high: float | None = None) -> None:
        if not isinstance(autoencoder, Autoencoder):
            raise ValueError(
                f"{type(self).__name__}: autoencoder: {type(autoencoder).__name__} has no methods encode and decode."
            )
        self.autoencoder: Any = autoencoder
        self.low, self.high, self._fitted = low, high, False

    def prepare(self, inputs: Tensor) -> None:
        """Fit the autoencoder if it has ``fit`` and is not fitted yet."""
        fit = getattr(self.autoencoder, "fit", None)
        if callable(fit) and not self._fitted:
            fit(inputs)
        self._fitted = True

    def start(self, inputs: Tensor) -> Tensor:
        """Return zeros with the shape of the latents."""
        check_floating(inputs, "LatentChange")
        check_range(inputs, self.low, self.high)
        return torch.zeros_like(self.autoencoder.encode(inputs))

    def reference(self, inputs: Tensor) -> Tensor:
        """Return the reconstruction of the unchanged inputs by the autoencoder."""
        return self.apply(inputs, torch.zeros_like(self.autoencoder.encode(inputs)))

    def apply(self, inputs: Tensor, free: Tensor) -> Tensor:
        """Return the decoded latents."""
        made: Tensor = self.autoencoder.decode(self.autoencoder.encode(inputs).detach() + free)
        return made if self.low is None and self.high is None else made.clamp(self.low, self.high)


def check_floating(inputs: Tensor, name: str) -> None:
    """Raise ValueError for whole numbers, to which nothing small can be added."""
    if not inputs.is_floating_point():
        raise ValueError(
            f"{name} adds to inputs, and these are {inputs.dtype}: use TokenChange for token ids, CategoryChange "
            "for one-hot boards, or convert them to floating point."
        )


def check_range(inputs: Tensor, low: float | None, high: float | None) -> None:
    """Raise ValueError for inputs out of the range in which changed ones are kept."""
    slack = 1e-4 * (1 + max(abs(low or 0.0), abs(high or 0.0)))
    if (low is not None and float(inputs.min()) < low - slack) or (
        high is not None and float(inputs.max()) > high + slack
    ):
        raise ValueError(
            f"inputs run from {float(inputs.min()):g} to {float(inputs.max()):g}, out of the range low={low}, high="
            f"{high} that changed inputs are kept in: give the range of the inputs as the network sees them "
            "(standardized images: (0 - mean) / std to (1 - mean) / std)."
        )
