"""Learnable sizes: one parameter, a mask over positions, the current number kept, and a differentiable length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_bpfree.methods.learnable_architecture.sizes.masks import (
    THRESHOLD,
    clamped,
    gaussian_mask,
    gaussian_root,
    sigmoid_mask,
    sigmoid_root,
    tap_positions,
    unit_positions,
)

Dimension = Literal["width", "depth", "kernel", "resolution"]
DIMENSIONS: tuple[Dimension, ...] = ("width", "depth", "kernel", "resolution")
SHARPNESS = 25.0


class Axis(nn.Module):
    """One learnable size: a parameter, and the mask that it makes over positions.

    Args:
        dimension: what it is the size of.
        positions: of the mask's values.
        start: of the parameter.
        bounds: within which the parameter is kept.
    """

    positions: Tensor

    def __init__(self, dimension: Dimension, positions: Tensor, start: float, bounds: tuple[float, float]) -> None:
        super().__init__()
        self.dimension = dimension
        self.size = nn.Parameter(torch.tensor(start))
        self.register_buffer("positions", positions, persistent=False)
        self.low, self.high = bounds
        self.managed = False
        """Whether something else says when the crop follows the mask; otherwise each use of it does."""
        self._kept = len(positions)

    @property
    def count(self) -> int:
        """The number of positions."""
        return len(self.positions)

    def mask(self) -> Tensor:
        """Return the mask at all positions, not thresholded."""
        raise NotImplementedError

    def root(self) -> Tensor:
        """Return where the mask crosses its threshold; differentiable."""
        raise NotImplementedError

    def length(self) -> Tensor:
        """Return the size in units, taps or samples; differentiable, and near :meth:`crop`."""
        raise NotImplementedError

    def set_crop(self, crop: int) -> None:
        """Set the parameter such that so many units, taps or samples are kept."""
        raise NotImplementedError

    def crop_of(self, kept: int) -> int:
        """Return the number of units, taps or samples of so many positions that are kept."""
        return kept

    @property
    def crops(self) -> Sequence[int]:
        """The possible crops, from the smallest to the largest."""
        return range(1, self.count + 1)

    def set_kept(self, kept: int) -> None:
        """Crop to so many positions."""
        self._kept = max(kept, 0)

    @property
    def kept(self) -> int:
        """The number of positions that are kept now."""
        if not self.managed:
            refresh([self])
        return self._kept

    @property
    def crop(self) -> int:
        """The number of units, taps or samples that are kept now."""
        return self.crop_of(self.kept)

    @torch.no_grad()
    def clamp_(self) -> bool:
        """Bring the parameter back into its bounds; says whether it had left the lower one, or is not finite."""
        collapsed = not bool(self.size >= self.low)
        self.size.copy_(torch.nan_to_num(self.size, nan=self.high).clamp(self.low, self.high))
        return collapsed


def refresh(axes: Iterable[Axis]) -> None:
    """Update the crops of all axes from their masks, with one transfer from the device."""
    with torch.no_grad():
        listed = list(axes)
        if listed:
            kept = torch.stack([(axis.mask() >= THRESHOLD).sum() for axis in listed]).tolist()
            for axis, number in zip(listed, kept, strict=True):
                axis.set_kept(int(number))


class UnitAxis(Axis):
    """Width in units, or depth in blocks: a sigmoid over the units in their order.

    Args:
        dimension: ``"width"`` or ``"depth"``.
        count: units, at least 1.
        least: that stay, at least 0.
        sharpness: slope of the mask.

    Examples:
        >>> axis = UnitAxis("width", 8)
        >>> axis.crop
        8
        >>> axis.set_crop(3)
        >>> axis.crop, round(axis.length().item(), 3)
        (3, 3.0)
    """

    def __init__(self, dimension: Dimension, count: int, least: int = 1, sharpness: float = SHARPNESS) -> None:
        self.least, self.sharpness = least, sharpness
        self._reach = math.log(1 / THRESHOLD - 1) / sharpness
        # At the start the last unit has a mask of 0.9 or more: the network is near what it was.
        bounds = ((least or 0.4) / count - self._reach, 1 + self._reach)
        super().__init__(dimension, unit_positions(count), bounds[1], bounds)

    def mask(self) -> Tensor:
        """Return the mask of all units."""
        return sigmoid_mask(self.positions, self.size, self.sharpness)

    def values(self) -> Tensor:
        """Return the mask of the units that are kept now."""
        return sigmoid_mask(self.positions[: self.kept], self.size, self.sharpness)

    def root(self) -> Tensor:
        """Return the share of units that is kept."""
        return sigmoid_root(self.size, self.sharpness, THRESHOLD)

    def length(self) -> Tensor:
        """Return the differentiable number of units."""
        return clamped(self.root() * self.count, self.least, self.count)

    @property
    def crops(self) -> Sequence[int]:
        """The possible numbers of units."""
        return range(self.least, self.count + 1)

    @torch.no_grad()
    def set_crop(self, crop: int) -> None:
        """Put the mask's root in the middle between the last unit kept and the next."""
        self.size.fill_((crop or 0.4) / self.count - self._reach)
        refresh([self])


class KernelAxis(Axis):
    """Size of a kernel in taps: a Gaussian over [-1, 1], around the middle or the last tap.

    Args:
        count: taps, odd.
        start: standard deviation.
        causal: whether the mask is around the last tap.

    Examples:
        >>> axis = KernelAxis(33, start=0.075)
        >>> axis.crop
        5
    """

    def __init__(self, count: int, start: float, causal: bool = False) -> None:
        self.mean = 1.0 if causal else 0.0
        self._reach = math.sqrt(-2 * math.log(THRESHOLD))
        # A kernel of one tap has a mask of 1 whatever its spread, so that no gradient would lead back from it.
        self.least = 1 if count == 1 else 2 if causal else 3
        bounds = ((self.least / 2 if not causal else self.least - 0.5) * 2 / max(count - 1, 1) / self._reach, 2.5)
        super().__init__("kernel", tap_positions(count), start, bounds)

    def mask(self) -> Tensor:
        """Return the mask of all taps."""
        return gaussian_mask(self.positions, self.size, self.mean)

    def window(self) -> slice:
        """Return which taps are kept now."""
        first = self.count - self.kept if self.mean else (self.count - self.kept) // 2
        return slice(first, first + self.kept)

    def values(self) -> Tensor:
        """Return the mask of the taps that are kept now."""
        return gaussian_mask(self.positions[self.window()], self.size, self.mean)

    def root(self) -> Tensor:
        """Return the distance from the mask's maximum to the threshold."""
        return gaussian_root(self.size, THRESHOLD)

    def length(self) -> Tensor:
        """Return the differentiable number of taps."""
        steps = self.root() * (self.count - 1) / 2  # from the maximum to the threshold
        return clamped(steps + 0.5 if self.mean else 2 * steps, self.least, self.count)

    @property
    def crops(self) -> Sequence[int]:
        """The possible numbers of taps."""
        return range(self.least, self.count + 1, 1 if self.mean else 2)

    @torch.no_grad()
    def set_crop(self, crop: int) -> None:
        """Put the mask's root in the middle between the last tap kept and the next."""
        steps = crop - 0.5 if self.mean else crop / 2
        self.size.fill_(min(max(steps * 2 / max(self.count - 1, 1) / self._reach, self.low), self.high))
        refresh([self])


class FrequencyAxis(Axis):
    """Resolution in samples: a sigmoid over the frequencies of a signal.

    Args:
        samples: samples of the signal, even.
        sharpness: slope of the mask.

    Examples:
        >>> axis = FrequencyAxis(16)
        >>> axis.set_crop(8)
        >>> axis.crop
        8
    """

    def __init__(self, samples: int, sharpness: float = SHARPNESS) -> None:
        self.samples, self.sharpness = samples, sharpness
        self._reach = math.log(1 / THRESHOLD - 1) / sharpness
        bounds = (0.5 / samples - self._reach, 1 + self._reach)
        super().__init__("resolution", torch.arange(samples // 2 + 1) / (samples // 2), bounds[1], bounds)

    def mask(self) -> Tensor:
        """Return the mask of all frequencies."""
        return sigmoid_mask(self.positions, self.size, self.sharpness)

    def values(self) -> Tensor:
        """Return the mask of all frequencies; the crop leaves out those below the threshold."""
        return self.mask()

    def root(self) -> Tensor:
        """Return the highest frequency that is kept, relative to the highest there is."""
        return sigmoid_root(self.size, self.sharpness, THRESHOLD)

    def length(self) -> Tensor:
        """Return the differentiable number of samples."""
        return clamped(self.root() * self.samples + 1, 2, self.samples)

    def crop_of(self, kept: int) -> int:
        """Return the number of samples that hold so many frequencies."""
        return min(self.samples, 2 * max(kept, 1))

    @property
    def crops(self) -> Sequence[int]:
        """The possible numbers of samples."""
        return range(2, self.samples + 1, 2)

    @torch.no_grad()
    def set_crop(self, crop: int) -> None:
        """Put the mask's root in the middle between the last frequency kept and the next."""
        self.size.fill_(min((crop - 1) / self.samples - self._reach, self.high))
        refresh([self])
