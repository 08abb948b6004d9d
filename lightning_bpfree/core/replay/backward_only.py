"""Detection of code that only a backward pass runs: tensor hooks, retained gradients, custom backward passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, _SingleLevelFunction

_CALLS = {"register_hook": "Tensor.register_hook", "retain_grad": "Tensor.retain_grad"}
_DIRECTIONS = 3  # along which a backward pass is compared with differences
_OFF = 0.2  # of the larger of both: far above the rounding of differences, far below another sign or factor


class BackwardOnly:
    """Finds, in one evaluation without a graph, what changes the backward pass and nothing else.

    Calls of ``Tensor.register_hook`` and ``Tensor.retain_grad`` are recorded and have no effect. An
    ``autograd.Function`` is recorded if its backward pass is not the derivative of its forward pass, as in gradient
    reversal. A function with a piecewise constant forward pass, such as rounding, is accepted: its backward pass
    replaces a derivative that does not exist.

    Attributes:
        found: maps each name that was found to whether it still defines a forward-mode derivative.

    Examples:
        >>> watch = BackwardOnly()
        >>> with watch:
        ...     _ = torch.ones(2).register_hook(print)
        >>> watch.found
        {'Tensor.register_hook': False}
    """

    def __init__(self) -> None:
        self.found: dict[str, bool] = {}
        self._compared: set[type] = set()
        self._comparing = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> BackwardOnly:
        kind: Any = Tensor
        for name, label in _CALLS.items():
            self._stack.callback(setattr, kind, name, getattr(kind, name))
            setattr(kind, name, self._noting(label))
        # Below `Function.apply`, which may be kept under another name: `reverse = Reverse.apply`.
        single: Any = _SingleLevelFunction
        self._stack.callback(lambda: delattr(single, "apply"))
        single.apply = classmethod(self._applied)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _noting(self, label: str) -> Callable[..., Any]:
        def note(*_args: Any, **_kwargs: Any) -> contextlib.nullcontext[None]:
            self.found[label] = False
            return _NoHandle()

        return note

    def _applied(self, kind: Any, *args: Any, **kwargs: Any) -> Any:
        own = not kind.__module__.startswith("torch.") and kind not in self._compared
        if own and not kwargs and not self._comparing:
            self._compared.add(kind)
            self._comparing = True
            try:
                if _backward_is_another(kind, args):
                    self.found[f"{kind.__name__} (autograd.Function)"] = kind.jvp is not Function.jvp
            finally:
                self._comparing = False
        above: Any = super(_SingleLevelFunction, kind)  # a class derived from it
        return above.apply(*args, **kwargs)


class _NoHandle(contextlib.nullcontext[None]):
    """What stands for the handle of a hook that was not registered."""

    def remove(self) -> None:
        """Do nothing."""


def _backward_is_another(kind: Any, args: Sequence[Any]) -> bool:
    """Whether a function's backward pass is seen not to be the derivative of its forward pass."""
    for double in (True, False):
        try:
            return _differs(kind, args, double)
        except Exception:  # the function does not take doubles, or no second call, or no backward pass: not known
            continue
    return False


def _differs(kind: Any, args: Sequence[Any], double: bool) -> bool:
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point() and a.numel()]
    inputs = [args[i].detach().to(torch.float64 if double else torch.float32) for i in places]
    if not inputs:
        return False
    generator = torch.Generator().manual_seed(0)

    def outputs(tensors: Iterable[Tensor]) -> list[Tensor]:
        filled = dict(zip(places, tensors, strict=True))
        torch.manual_seed(0)
        made = kind.apply(*(filled.get(i, arg) for i, arg in enumerate(args)))
        return [t for t in torch.utils._pytree.tree_leaves(made) if isinstance(t, Tensor) and t.is_floating_point()]

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)

    with torch.enable_grad():
        leaves = [x.clone().requires_grad_() for x in inputs]
        results = [r for r in outputs([leaf.view_as(leaf) for leaf in leaves]) if r.requires_grad]
        weights = [drawn(r) for r in results]
        if not results:
            return False
        grads = torch.autograd.grad(results, leaves, weights, allow_unused=True, materialize_grads=True)
    size = max(float(x.abs().max()) for x in inputs) or 1.0
    reach = size * (1e-6 if double else 1e-3)
    misses = 0
    with torch.no_grad():
        for _ in range(_DIRECTIONS):
            vs = [drawn(x) for x in inputs]
            slope = sum(float((g * v).sum()) for g, v in zip(grads, vs, strict=True))
            ahead = outputs([x + reach * v for x, v in zip(inputs, vs, strict=True)])
            behind = outputs([x - reach * v for x, v in zip(inputs, vs, strict=True)])
            moves = [(a - b, w) for a, b, w in zip(ahead, behind, weights, strict=True)]
            difference = sum(float((move * w).sum()) for move, w in moves) / (2 * reach)
            if all(not bool(move.any()) for move, _ in moves):
                return False
            misses += abs(slope - difference) > _OFF * max(abs(slope), abs(difference))
    return misses == _DIRECTIONS


def hooks_of_modules(module: nn.Module) -> list[str]:
    """Return the names of the submodules that have backward hooks."""
    return [
        f"{name or type(part).__name__} ({type(part).__name__})"
        for name, part in module.named_modules()
        if part._backward_hooks or part._backward_pre_hooks
    ]


def names_hooks(functions: Iterable[Any]) -> bool:
    """Whether the code of one of the functions contains a call that registers a hook, even in an untaken branch."""
    return any(not _CALLS.keys().isdisjoint(_names(getattr(function, "__code__", None))) for function in functions)


def _names(code: Any) -> Iterator[str]:
    if code is not None:
        yield from code.co_names
        for constant in code.co_consts:
            if hasattr(constant, "co_names"):
                yield from _names(constant)


def findings(found: Mapping[str, bool], forward_mode: bool) -> list[str]:
    """Return the entries of ``found`` that a rule without a backward pass would ignore.

    Args:
        found: see :class:`BackwardOnly`.
        forward_mode: whether the rule uses forward-mode derivatives, including those that a function defines.
    """
    return sorted(name for name, known in found.items() if not (forward_mode and known))
