"""Clipping the gradients of stacked members, each by its own norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def clip_members_(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale each member's gradients in place to a Euclidean norm of at most ``max_norm``; returns the norms ``(M,)``.

    As ``torch.nn.utils.clip_grad_norm_`` of each member's parameters.

    Args:
        grads: gradients ``(M, ...)``.
        max_norm: of one member.

    Examples:
        >>> grad = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> clip_members_([grad], 1.0)
        tensor([5.0000, 0.5000])
        >>> grad.norm(dim=1)
        tensor([1.0000, 0.5000])
    """
    norms = [torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads]
    total = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    factors = (max_norm / (total + 1e-6)).clamp(max=1.0)  # as torch's
    for grad in grads:
        grad.mul_(factors.reshape(-1, *[1] * (grad.dim() - 1)))
    return total  # type: ignore[no-any-return]  # vector_norm is untyped
