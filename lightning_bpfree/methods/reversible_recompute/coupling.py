"""Additive couplings of two streams: a block whose inputs can be computed from its outputs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import PositiveFloat, checked
from lightning_bpfree.methods.reversible_recompute.refused import RefusedStackError

Branch = Callable[..., Tensor]


class Coupling(NamedTuple):
    """One reversible block as schedules see it: ``y1 = s1 x1 + f(x2)`` and ``y2 = s2 x2 + g(y1)``.

    Args:
        f: first branch, with its normalization and without a skip; keeps shape and type.
        g: second branch, likewise.
        owner: the module that holds the parameters and buffers of both.
        scale: ``(s1, s2)``, above 0.
        label: what messages call the block.
    """

    f: Branch
    g: Branch
    owner: nn.Module
    scale: tuple[float, float] = (1.0, 1.0)
    label: str = "the block"

    def forward(self, x1: Tensor, x2: Tensor, context: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the outputs of both streams."""
        y1 = join(x1, self.first(x2, context), self.scale[0])
        return y1, join(x2, self.second(y1, context), self.scale[1])

    def first(self, x2: Tensor, context: Mapping[str, Any]) -> Tensor:
        """Return ``f(x2)``, checked."""
        return evaluate(self.f, x2, context, self.label, "f")

    def second(self, y1: Tensor, context: Mapping[str, Any]) -> Tensor:
        """Return ``g(y1)``, checked."""
        return evaluate(self.g, y1, context, self.label, "g")


def join(x: Tensor, branch: Tensor, scale: float) -> Tensor:
    """Return ``scale * x + branch``."""
    return x + branch if scale == 1.0 else torch.add(branch, x, alpha=scale)


def part(y: Tensor, branch: Tensor, scale: float) -> Tensor:
    """Return the ``x`` of which :func:`join` has made ``y``, up to rounding."""
    return y - branch if scale == 1.0 else (y - branch).div_(scale)


def evaluate(branch: Branch, x: Tensor, context: Mapping[str, Any], label: str, name: str) -> Tensor:
    """Return ``branch(x)``, with the keyword arguments of ``context`` that it names.

    Raises:
        TypeError: if it returns no tensor, or one of a wider type.
        ValueError: if it changes the shape.
        RefusedStackError: if it changes its input in place.
    """
    if context:
        names = accepted(branch)
        context = context if names is None else {key: context[key] for key in names if key in context}
    version = None if x.is_inference() else x._version
    try:
        out: Any = branch(x, **context)
    except RuntimeError as error:
        if "leaf Variable that requires grad" not in str(error):
            raise
        raise RefusedStackError(_in_place(name, label)) from error
    if not isinstance(out, Tensor):
        raise TypeError(f"{name} of {label} returns {type(out).__name__}; a branch returns one tensor.")
    if out.shape != x.shape:
        raise RefusedStackError(
            f"{name} of {label} makes shape {tuple(out.shape)} of {tuple(x.shape)}; a branch of a reversible block "
            "keeps the shape. Put layers that change it between two reversible stacks."
        )
    if torch.promote_types(out.dtype, x.dtype) != x.dtype:
        raise TypeError(
            f"{name} of {label} makes {out.dtype} of {x.dtype}, which a stream of that type cannot take: cast the "
            "input of the stack, or the output of the branch."
        )
    if version is not None and x._version != version:
        raise RefusedStackError(_in_place(name, label))
    return out


def _in_place(name: str, label: str) -> str:
    return (
        f"{name} of {label} changes its input in place (an in-place activation at its start?), which loses what the "
        "other stream adds to: use the out-of-place form, such as nn.ReLU(inplace=False)."
    )


def accepted(branch: Branch) -> tuple[str, ...] | None:
    """Return the keyword arguments of ``branch`` apart from its input; None for all."""
    if isinstance(branch, functools.partial):
        return _names(branch.func, len(branch.args) + 1)
    if isinstance(branch, nn.Module):
        plain: nn.Module = getattr(branch, "_orig_mod", branch)  # a compiled module seems to take anything
        if "forward" not in vars(plain):
            return _names(type(plain).forward, 2)
        branch = plain.forward
    return _names.__wrapped__(branch, 1)  # not kept: a closure may hold a whole model


@functools.lru_cache(maxsize=256)
def _names(function: Callable[..., Any], skip: int) -> tuple[str, ...] | None:
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return tuple(p.name for p in parameters[skip:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


class ReversibleBlock(nn.Module):
    """Two streams coupled by two branches: ``y1 = s1 x1 + f(x2)``, ``y2 = s2 x2 + g(y1)``.

    Args:
        f: module from (..., C) to the same shape, with its normalization inside and without a skip; in a transformer,
            the attention.
        g: the same; in a transformer, the feed-forward part.
        scale: factors ``(s1, s2)`` of the skips, above 0. Away from 1, errors of the inverse grow as ``1 / (s1 s2)``
            per block: use ``buffer_every`` and ``max_error`` of :class:`ReversibleSequential` then.

    Raises:
        ValueError: if a scale is not above 0.

    Shape:
        - Input: two tensors of one shape; keyword arguments go to the branches whose ``forward`` names them.
        - Output: two tensors of that shape.

    Examples:
        >>> block = ReversibleBlock(nn.Linear(4, 4), nn.Linear(4, 4)).double()
        >>> x1, x2 = torch.randn(2, 3, 4, dtype=torch.double)
        >>> back = block.inverse(*block(x1, x2))
        >>> torch.allclose(back[0], x1) and torch.allclose(back[1], x2)
        True

    References:
        A. N. Gomez, M. Ren, R. Urtasun, R. B. Grosse, "The Reversible Residual Network", 2017, arXiv 1707.04585.
        K. Mangalam et al., "Reversible Vision Transformers", 2022, arXiv 2302.04869.
    """

    @checked
    def __init__(self, f: nn.Module, g: nn.Module, *, scale: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)) -> None:
        super().__init__()
        self.f, self.g = f, g
        self.scale = (float(scale[0]), float(scale[1]))

    def coupling(self, label: str = "the block") -> Coupling:
        """Return the block as schedules see it."""
        return Coupling(self.f, self.g, self, self.scale, label)

    def forward(self, x1: Tensor, x2: Tensor, **context: Any) -> tuple[Tensor, Tensor]:
        """Return both outputs by plain autograd."""
        return self.coupling().forward(x1, x2, context)

    def inverse(self, y1: Tensor, y2: Tensor, **context: Any) -> tuple[Tensor, Tensor]:
        """Return the inputs of these outputs, up to rounding; stochastic branches must draw the same numbers."""
        coupling = self.coupling()
        x2 = part(y2, coupling.second(y1, context), self.scale[1])
        return part(y1, coupling.first(x2, context), self.scale[0]), x2

    def extra_repr(self) -> str:
        """Return the scales that are not 1."""
        return "" if self.scale == (1.0, 1.0) else f"scale={self.scale}"
