"""The batch of a step, restored for every evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_bpfree.core.replay.object_graph import attributes_of, is_array


def rebuilt(value: Any, tensors: Callable[[Any], Any], memo: dict[int, Any] | None = None) -> Any:
    """Return a batch in new containers.

    Args:
        value: tensors, arrays and further leaves in lists, tuples, dicts, dataclasses and objects of any depth.
        tensors: applied to every tensor or array.
        memo: objects that are already rebuilt, by id.
    """
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor) or is_array(value):
        made = tensors(value)
    elif isinstance(value, tuple):
        items = [rebuilt(item, tensors, memo) for item in value]
        made = type(value)(*items) if hasattr(value, "_fields") else tuple(items) if type(value) is tuple else value
    elif isinstance(value, list):
        made = copy.copy(value)
        memo[id(value)] = made
        made[:] = [rebuilt(item, tensors, memo) for item in value]
    elif isinstance(value, dict):
        made = copy.copy(value)
        memo[id(value)] = made
        for key, item in value.items():
            made[key] = rebuilt(item, tensors, memo)
    elif isinstance(value, set | bytearray):
        made = copy.copy(value)
    else:
        made = _object(value, tensors, memo)
    memo[id(value)] = made
    return made


def _object(value: Any, tensors: Callable[[Any], Any], memo: dict[int, Any]) -> Any:
    own = attributes_of(value)
    if own is None or isinstance(value, type) or callable(value):
        return value
    try:
        made = copy.copy(value)
    except Exception:  # an object that refuses to be copied is used as it is, as any leaf
        return value
    theirs = attributes_of(made)
    if made is value or theirs is None:
        return value
    memo[id(value)] = made
    for key, item in list(own.items()):
        inner = rebuilt(item, tensors, memo)
        if inner is not theirs.get(key):
            theirs[key] = inner
    return made


class BatchCopies:
    """The arguments of a training step for successive evaluations.

    Containers are rebuilt for each evaluation, so that a step may pop labels from a dict. Tensors are passed without
    copies until an evaluation writes to one; later evaluations get copies of its value at the start of the step. Only
    the recorded evaluation gets the batch itself, and may change it.

    Args:
        args: positional arguments of the training step.
        kwargs: keyword arguments of the training step.
        always: pass copies even if no write is detected: for a step that is known to write to its batch. Writes by
            NumPy are not detected, and torch.func transforms cannot write to tensors from outside.

    Examples:
        >>> import torch
        >>> batch = BatchCopies(({"x": torch.ones(2)},))
        >>> (first,), _ = batch.fresh()
        >>> _ = first.pop("x").zero_()
        >>> batch.fresh()[0][0]["x"]
        tensor([1., 1.])
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, always: bool = False) -> None:
        self.args, self.kwargs, self.always = args, dict(kwargs or {}), always
        self._kept: dict[int, tuple[Any, Any, int]] = {}  # original, its copy, its version
        self._leaves: dict[int, tuple[bool, Any]] = {}  # whether it requires a gradient, and the one that it has
        self._watched: list[tuple[Any, Any, int]] = []  # a copy that was handed out, what it was, its version
        self._as_given = rebuilt((args, self.kwargs), self._keep)  # containers from which evaluations take out nothing

    def _keep(self, tensor: Any) -> Any:
        self._kept[id(tensor)] = (tensor, _copy(tensor), _version(tensor))
        if isinstance(tensor, Tensor) and tensor.is_leaf:
            self._leaves[id(tensor)] = (tensor.requires_grad, tensor.grad)
        return tensor

    def fresh(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the original arguments of the step, for an evaluation other than the recorded one."""
        args, kwargs = rebuilt(self._as_given, self._unchanged)
        return args, kwargs

    def watched(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return copies of the arguments; :meth:`was_written` later reports whether one has changed."""

        def handed_out(tensor: Any) -> Any:
            kept = self._kept[id(tensor)][1]
            copy = _copy(kept)
            self._watched.append((copy, kept, _version(copy)))
            return copy

        args, kwargs = rebuilt(self._as_given, handed_out)
        return args, kwargs

    def original(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments themselves, for the recorded evaluation; writes of other evaluations are undone."""
        for tensor, kept, version in self._kept.values():
            if id(tensor) in self._leaves and self._became_a_leaf(tensor):
                flag, tensor.grad = self._leaves[id(tensor)]
                tensor.requires_grad_(flag)
            if isinstance(tensor, Tensor) and _version(tensor) != version:
                tensor.detach().copy_(kept.detach())
        return self.args, self.kwargs

    def was_written(self) -> bool:
        """Return whether the copies from :meth:`watched` have been written to."""
        return any(_version(copy) != version or not _equal(copy, kept) for copy, kept, version in self._watched)

    def _unchanged(self, tensor: Any) -> Any:
        original, kept, version = self._kept.get(id(tensor), (tensor, tensor, -1))
        if isinstance(original, Tensor):
            same = version in (-1, _version(original)) and not self._became_a_leaf(original)
            return original if same and not self.always else _copy(kept)
        return _copy(kept)

    def _became_a_leaf(self, tensor: Tensor) -> bool:
        """Whether an evaluation has asked for a gradient of the tensor, or left one there."""
        if id(tensor) not in self._leaves:
            return False
        flag, grad = self._leaves[id(tensor)]
        return tensor.requires_grad != flag or tensor.grad is not grad


def _version(tensor: Any) -> int:
    return tensor._version if isinstance(tensor, Tensor) and not tensor.is_inference() else 0


def _copy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value.copy()
    copy = value.detach().clone()
    return copy.requires_grad_() if value.requires_grad else copy


def _equal(now: Any, then: Any) -> bool:
    """Whether two tensors, or arrays, are equal; NaN equals itself. Others than strided ones count as equal."""
    if not isinstance(now, Tensor):
        return bool(now.shape == then.shape and ((now == then) | ((now != now) & (then != then))).all())
    if now.layout is not torch.strided:
        return True
    return torch.equal(now, then) or (
        now.shape == then.shape and bool(((now == then) | ((now != now) & (then != then))).all())
    )
