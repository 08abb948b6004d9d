"""Helpers for rules that evaluate one at a time or in chunks: ``chunk_size``, slow vectorization, and timing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import nn

from lightning_bpfree.core.arguments import PositiveInt

T = TypeVar("T")
ChunkSize = PositiveInt | Literal["auto", "fastest"]

# Measured on CPUs: vmapped convolutions with a weight for each evaluation turn into slow grouped ones, and recurrent
# kernels do not batch over weights.
_LOOPED = (nn.modules.conv._ConvNd, nn.RNNBase)


def vectorizes_badly(module: nn.Module) -> bool:
    """Whether a loop is faster (or the only option) when each evaluation has its own weights."""
    return any(isinstance(part, _LOOPED) for part in module.modules())


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its class name if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def timed(evaluate: Callable[[], T], device: torch.device, runs: int) -> tuple[float, T]:
    """Return the shortest time of some runs, in seconds, and the last result.

    Args:
        evaluate: what to run.
        device: the device to synchronize with.
        runs: how many runs, at least 1; the first is a warm-up.
    """
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        result = evaluate()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds), result
