"""A rehearsal: one evaluation without side effects, which finds out what a training step writes to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

LARGEST_CLONE = 2 << 30  # bytes of tensors that are kept for the time of a rehearsal


class _Before(NamedTuple):
    tensor: Tensor
    storage: Tensor
    version: int
    copy: Tensor | None


class Writes:
    """Finds which of the given tensors an evaluation writes to, and undoes the writes.

    In-place operations are detected by torch's version counters. Writes that bypass these (``.data``, NumPy) are
    detected by comparison with a copy, if the tensors have at most :data:`LARGEST_CLONE` bytes in total.

    Args:
        tensors: by name.
        uncopied: names of tensors that are not copied, because the caller handles writes that bypass the counters.

    Examples:
        >>> weight, bias = torch.zeros(2), torch.zeros(2)
        >>> writes = Writes([("weight", weight), ("bias", bias)])
        >>> with writes:
        ...     _ = weight.data.add_(1)
        >>> sorted(writes.found), weight
        (['weight'], tensor([0., 0.]))
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], uncopied: Container[str] = ()) -> None:
        named = list(tensors)
        keep = sum(tensor.nbytes for name, tensor in named if name not in uncopied) <= LARGEST_CLONE
        with torch.no_grad():
            self._before = {
                name: _Before(t, t.data, _version(t), t.detach().clone() if keep and name not in uncopied else None)
                for name, t in named
            }
        self.found: set[str] = set()

    def __enter__(self) -> Writes:
        return self

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, (tensor, storage, version, copy) in self._before.items():
                assigned = tensor.data_ptr() != storage.data_ptr() or tensor.shape != storage.shape
                changed = copy is not None and not _equal(storage, copy)
                if assigned or changed or _version(tensor) != version:
                    self.found.add(name)
                if assigned:
                    tensor.data = storage
                if changed and copy is not None:
                    storage.copy_(copy)
        self._before = {}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit; NaN equals itself."""
    if torch.equal(a, b):
        return True
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # finds NaN


def uninitialized(module: nn.Module) -> list[nn.Module]:
    """Return the lazy layers whose parameters the first forward pass will create."""
    return [p for p in module.modules() if isinstance(p, LazyModuleMixin) and p.has_uninitialized_params()]


def needs_graph(evaluate: Callable[[], object]) -> bool:
    """Evaluate without a graph, or with one if the step computes gradients itself; return whether it does."""
    try:
        with torch.no_grad():
            evaluate()
    except RuntimeError as error:
        if "does not require grad" not in str(error) and "requires_grad" not in str(error):
            raise
    else:
        return False
    with torch.enable_grad():
        evaluate()
    return True


@contextlib.contextmanager
def flags_kept(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield a list of the parameters that a step freezes or unfreezes; they stay as the step leaves them."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    changed: list[nn.Parameter] = []
    yield changed
    changed += [parameter for parameter, flag in before if parameter.requires_grad != flag]
