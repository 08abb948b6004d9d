"""Parts of rules that evaluate one by one or many at a time: ``chunk_size``, what vectorizes badly, and timing."""

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


def vectorises_badly(module: nn.Module) -> bool:
    """Whether a loop is faster, and at times the only way, where each evaluation has weights of its own."""
    return any(isinstance(part, _LOOPED) for part in module.modules())


def first_line(error: Exception) -> str:
    """Return what an exception says in its first line; its name if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def timed(evaluate: Callable[[], T], device: torch.device, runs: int) -> tuple[float, T]:
    """Return the shortest time of some runs, in seconds, and the last result.

    Args:
        evaluate: what to run.
        device: to wait for.
        runs: how many, at least 1; the first warms up.
    """
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        result = evaluate()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds), result
