"""Exchange of measured numbers between ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class ScalarExchange(ABC):
    """Splits the measurement of ``K`` numbers over ranks, and gives all ranks the same result.

    A strategy that is also a ScalarExchange declares that ranks exchange no gradients: every rank must be able to
    build the whole estimate from the numbers that :meth:`agree` returns.
    """

    @abstractmethod
    def share(self, num: int) -> Sequence[int]:
        """Return the indices below ``num`` that this rank measures."""

    @abstractmethod
    def agree(self, values: Tensor, num: int) -> Tensor:
        """Return all ``num`` numbers, the same bits on every rank.

        Args:
            values: this rank's measurements, in the order of :meth:`share`.
            num: how many numbers all ranks measure together.
        """

    @abstractmethod
    def verify(self, module: nn.Module) -> None:
        """Raise RuntimeError if the ranks' parameters are not bit-equal; make their buffers equal."""

    @property
    @abstractmethod
    def bytes_sent(self) -> int:
        """Payload that this rank has sent since the start of the fit, in bytes."""
