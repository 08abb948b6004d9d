"""Peak memory of training."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

MIB = 2**20


class PeakMemory:
    """Measures peak memory from :meth:`start` to :meth:`peak`.

    On a CUDA device: the peak memory that torch has allocated. On the CPU: the rise of this process's resident memory
    above its level at the start; up to 30 MiB of that is code loaded at its first use. Use a process that has not
    trained before: freed memory may stay with the process, and reuse of it is not measured.

    Args:
        device: the device on which the module computes.

    Examples:
        >>> memory = PeakMemory(torch.device("cpu"))
        >>> memory.start()
        >>> block = bytearray(64 * MIB)
        >>> memory.peak() is None or memory.peak() >= 0  # 64, if the process had no such memory at hand
        True
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: float | None = None

    @property
    def kind(self) -> str:
        """The kind of memory that is measured."""
        return "allocated on the GPU" if self.device.type == "cuda" else "of the process, above its level before"

    def start(self) -> None:
        """Start measuring."""
        reset_peak(self.device)
        self._before = 0.0 if self.device.type == "cuda" else peak_mib(self.device)

    def peak(self) -> float | None:
        """Return the peak since the start, in MiB; None if the system does not report it."""
        now = peak_mib(self.device)
        return None if now is None or self._before is None else now - self._before


def reset_peak(device: torch.device) -> None:
    """Reset the peak, where the system supports it: CUDA devices, and Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Linux puts the high-water mark back to the present level; imports and the reading of data have raised it.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib(device: torch.device) -> float | None:
    """Return the peak memory since the last reset, in MiB; None if the system does not report it.

    On a CUDA device: memory allocated by torch. On the CPU: the resident size of this process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    status = Path("/proc/self/status")
    if status.exists():
        marks = [line.split() for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM")]
        if marks:
            return int(marks[0][1]) / 1024
    try:
        import resource  # noqa: PLC0415  # not everywhere
    except ImportError:  # Windows
        return None
    unit = MIB if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
