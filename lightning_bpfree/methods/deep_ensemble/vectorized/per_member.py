"""Temporary exit from torch.func.vmap, to process members one by one or in groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class AtWork:
    """Who computes in the module now.

    Args:
        members: how many there are.
        member: the one member at work, where :attr:`index` is None.
        index: within vmap: the number of a member, batched over all of them.
    """

    members: int
    member: int = 0
    index: Tensor | None = None


class _PerMember(torch.autograd.Function):
    """Calls a function with the tensors of all members, unbatched; its operations are seen by autograd as they are."""

    @staticmethod
    def forward(*_: Any) -> Any:
        raise RuntimeError("per_member works inside of torch.func.vmap only")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Callable[..., Any], _: Tensor, *tensors: Tensor) -> Any:
        stacked = [
            tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
            for tensor, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        return call(*stacked), 0


def per_member(call: Callable[..., Any], at_work: AtWork, *tensors: Tensor) -> Any:
    """Return what ``call`` returns, within vmap over members.

    Args:
        call: takes each tensor as ``(M, ...)`` and returns a tensor, or a tuple of tensors, with M first.
        at_work: with :attr:`AtWork.index`.
        tensors: as the code within vmap sees them, with or without a batch of members.
    """
    return _PerMember.apply(call, at_work.index, *tensors)
