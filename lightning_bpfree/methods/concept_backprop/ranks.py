"""Samples of all ranks, on every rank."""

from __future__ import annotations

from typing import Any

import torch

from lightning_bpfree.methods.concept_backprop.detection import Samples


def gathered(samples: Samples, world_size: int) -> Samples:
    """Return the samples of all ranks, in their order, the same on each, so that all fit the same probes.

    Args:
        samples: samples of this rank.
        world_size: number of ranks; with one, the samples themselves are returned.
    """
    if world_size == 1:
        return samples
    parts: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(parts, tuple(samples))
    found = [Samples(*part) for part in parts]
    outputs = [part.outputs for part in found if part.outputs is not None]
    return Samples(
        {name: torch.cat([part.features[name] for part in found]) for name in samples.features},
        {name: torch.cat([part.labels[name] for part in found]) for name in samples.labels},
        torch.cat([part.inputs for part in found]),
        torch.cat(outputs) if len(outputs) == world_size else None,
    )
