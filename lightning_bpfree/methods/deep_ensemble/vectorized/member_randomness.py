"""Random numbers within torch.func.vmap, from each member's own stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_bpfree.methods.deep_ensemble.streams import MemberStreams
from lightning_bpfree.methods.deep_ensemble.vectorized.per_member import AtWork, per_member

_FACTORIES: set[Any] = {torch.rand, torch.randn, torch.randint, torch.randperm}
_LIKE: dict[Any, Callable[..., Tensor]] = {torch.rand_like: torch.rand, torch.randn_like: torch.randn}
# How many dimensions of (B, C, ...) a mask has; the others share it.
_CHANNELS: dict[Any, int] = {F.dropout1d: 3, F.dropout2d: 4, F.dropout3d: 5}


class MemberRandomness(TorchFunctionMode):
    """Draws dropout masks and random tensors from the members' streams, as each member would alone.

    What it does not know is left to vmap, which refuses it with ``randomness="error"``.

    Args:
        streams: the members' streams.
        at_work: who is computing.
    """

    def __init__(self, streams: MemberStreams, at_work: AtWork) -> None:
        super().__init__()
        self.streams, self.at_work = streams, at_work

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace one call."""
        kwargs = kwargs or {}
        if self.at_work.index is not None and kwargs.get("generator") is None:
            if func is F.dropout or func in _CHANNELS:
                return self._dropout(func, *args, **kwargs)
            if func in _FACTORIES:
                return self._drawn(lambda g: func(*args, **{**kwargs, "generator": g}))
            if func in _LIKE:
                like = args[0]
                options = {"dtype": like.dtype, "device": like.device, **kwargs}
                return self._drawn(lambda g: _LIKE[func](like.shape, **{**options, "generator": g}))
            if func is torch.bernoulli and len(args) == 1:
                return self._bernoulli(args[0])
        return func(*args, **kwargs)

    def _drawn(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        drawn: Tensor = per_member(
            lambda _: torch.stack([draw(generator) for generator in self.streams.generators()]),
            self.at_work,
            self.at_work.index,  # type: ignore[arg-type]
        )
        return drawn

    def _bernoulli(self, p: Tensor) -> Tensor:
        def draw(ps: Tensor) -> Tensor:
            pairs = zip(ps.detach(), self.streams.generators(), strict=True)
            return torch.stack([torch.bernoulli(own, generator=generator) for own, generator in pairs])

        drawn: Tensor = per_member(draw, self.at_work, p)
        return drawn

    def _dropout(self, func: Any, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0 or x.numel() == 0:
            return func(x, p, training, inplace)  # type: ignore[no-any-return]
        shape = tuple(x.shape)
        if func in _CHANNELS:
            if len(shape) != _CHANNELS[func]:
                return func(x, p, training, inplace)  # type: ignore[no-any-return]  # vmap refuses it
            shape = shape[:2] + (1,) * (len(shape) - 2)

        def masks(generator: torch.Generator) -> Tensor:
            # As torch's own dropout on the CPU: the same bits of the same stream.
            mask = torch.empty(shape, dtype=x.dtype, device=x.device)
            return mask.bernoulli_(1 - p, generator=generator).div_(1 - p if p < 1 else 1)

        drawn = self._drawn(masks)
        return x.mul_(drawn) if inplace else x * drawn
