"""Gradient injection: a loss whose backward pass returns a gradient that was computed by other means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import checked

GradientSource = Callable[[Tensor], Iterable[Tensor]]


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: GradientSource, *parameters: Tensor) -> Tensor:  # noqa: ARG004  # autograd needs the parameters as inputs
        ctx.gradients = gradients
        return loss.detach().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.gradients(scale))


@checked
def inject(loss: Tensor, parameters: Sequence[Tensor], gradients: GradientSource) -> Tensor:
    """Return a scalar with the value of ``loss`` whose backward pass puts ``gradients`` into ``parameters``.

    The parameters are inputs of the autograd node, so everything that depends on their gradients (accumulation,
    gradient scalers, DistributedDataParallel's reducer, hooks) works as for an ordinary loss.

    Args:
        loss: a scalar; it is detached from its own graph, if any.
        parameters: leaf tensors that require a gradient.
        gradients: called once per backward pass with the incoming gradient of the loss (a scalar: 1, or the loss scale
            divided by the number of accumulated batches); returns one gradient per parameter, already multiplied
            by it. The call is deferred to the backward pass, so that no second copy of the parameters is held until
            then.

    Examples:
        >>> w = torch.zeros(2, requires_grad=True)
        >>> inject(torch.tensor(3.0), [w], lambda scale: [scale * torch.ones(2)]).backward()
        >>> w.grad
        tensor([1., 1.])
    """
    return _Inject.apply(loss, gradients, *parameters)  # type: ignore[no-any-return]  # Function.apply is untyped


def zeros(parameter: Tensor) -> Tensor:
    """Return a gradient of zeros for ``parameter``."""
    return torch.zeros_like(parameter)
