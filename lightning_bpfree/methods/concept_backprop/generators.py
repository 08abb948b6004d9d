"""Additional reads of a data loader, without advancing its random generators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from lightning_bpfree.core.replay.random_streams import RandomStreams


@contextlib.contextmanager
def untouched_generators(loaders: Any) -> Iterator[None]:
    """Restore global random streams, and generators of loaders and their samplers.

    Args:
        loaders: a data loader, or a list or mapping of some; anything else is left alone.

    Examples:
        >>> loader = torch.utils.data.DataLoader(torch.arange(4), shuffle=True, generator=torch.Generator())
        >>> before = loader.generator.get_state()
        >>> with untouched_generators(loader):
        ...     _ = list(loader)
        >>> torch.equal(loader.generator.get_state(), before)
        True
    """
    found: dict[int, torch.Generator] = {}
    for loader in tree_leaves(loaders):
        samplers = [getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
        samplers.append(getattr(samplers[1], "sampler", None))
        for owner in (loader, *samplers, getattr(loader, "dataset", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    states = [(generator, generator.get_state()) for generator in found.values()]
    streams = RandomStreams()
    kept = streams.save()
    try:
        yield
    finally:
        streams.load(kept)
        for generator, state in states:
            generator.set_state(state)
