"""Objects that a training step can change, found by walking the attributes of modules."""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import random
import sys
import types
import weakref
from collections.abc import Iterable, Iterator, MutableMapping
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LARGEST = 10_000  # elements of a container: what larger ones hold is not looked into

# Kept by torch and Lightning for themselves: a training step changes none of it, or Lightning takes care.
_INTERNAL = frozenset(
    {
        "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_trainer", "_fabric", "_hparams_initial",
        "_metric_attributes", "_param_requires_grad_state", "_device_mesh", "_compiler_ctx", "_flat_weights",
        "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    }
)  # fmt: skip
HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_OPAQUE_PACKAGES = frozenset(
    {
        "torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_bpfree", "numpy", "logging",
        "threading", "wandb", "matplotlib", "tensorboard", "multiprocessing", "concurrent", "asyncio", "queue",
        "jsonargparse", "re", "inspect", "typing", "functools", "pathlib", "datetime", "decimal", "fractions", "uuid",
    }
)  # fmt: skip
_PLAIN = (int, float, complex, str, bytes, bool, type(None), type, types.FunctionType, types.BuiltinFunctionType,
          types.MethodType, types.ModuleType, torch.dtype, torch.device, torch.Size, Enum, functools.partial,
          weakref.ReferenceType, range, slice)  # fmt: skip


class Place(NamedTuple):
    """A place that holds a tensor, an array or an iterator: ``holder[key]``.

    Args:
        holder: the attributes of an object, a dict, or a list.
        key: name, key or index.
        path: indices into nested tuples, outermost first; empty for the value itself.
    """

    holder: Any
    key: Any
    path: tuple[int, ...] = ()

    def get(self) -> Any:
        """Return the value."""
        value = self.holder[self.key]
        for index in self.path:
            value = value[index]
        return value

    def put(self, value: Any) -> None:
        """Set the value; a tuple around it is rebuilt."""
        self.holder[self.key] = _with(self.holder[self.key], self.path, value)


def _with(around: Any, path: tuple[int, ...], value: Any) -> Any:
    if not path:
        return value
    items = list(around)
    items[path[0]] = _with(items[path[0]], path[1:], value)
    return type(around)(*items) if hasattr(around, "_fields") else tuple(items)


class Found(NamedTuple):
    """The result of a walk; every object once."""

    modules: list[nn.Module]
    objects: list[Any]
    containers: list[Any]
    generators: list[Any]
    tensors: list[Place]
    arrays: list[Place]
    parameters: list[Place]
    iterators: list[Place]


def is_container(value: object) -> bool:
    """Whether a value is a built-in mutable container or an instance of a subclass."""
    return isinstance(value, list | dict | set | collections.deque | bytearray)


def is_generator(value: object) -> bool:
    """Whether a value is a random generator with its own state."""
    if isinstance(value, torch.Generator):
        return True
    if isinstance(value, random.Random):
        return not isinstance(value, random.SystemRandom)
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    return numpy_random is not None and isinstance(
        value, numpy_random.Generator | numpy_random.RandomState | numpy_random.BitGenerator
    )


def is_array(value: object) -> bool:
    """Whether a value is a NumPy array of numbers."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.dtype != object


def is_iterator(value: object) -> bool:
    """Whether a value is an iterator; open files do not count."""
    return hasattr(type(value), "__next__") and not isinstance(value, io.IOBase)


def _is_helper(value: object) -> bool:
    package = type(value).__module__.partition(".")[0]
    return package not in _OPAQUE_PACKAGES and not isinstance(value, BaseException)


def attributes_of(value: Any) -> MutableMapping[str, Any] | None:
    """Return the attributes of an object as a writable mapping; None if it has none."""
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict):
        return own
    names = [n for kind in type(value).__mro__ for n in _slots(kind) if n not in ("__dict__", "__weakref__")]
    return _Slots(value, names) if names else None


def _slots(kind: type) -> Iterable[str]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else slots


class _Slots(MutableMapping[str, Any]):
    """The attributes of an object with ``__slots__``, as a mapping."""

    def __init__(self, owner: Any, names: list[str]) -> None:
        self.owner, self.names = owner, names

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self.owner, name)
        except AttributeError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self.owner, name, value)  # also of a frozen dataclass

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self.owner, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.names if hasattr(self.owner, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def copy(self) -> dict[str, Any]:
        """Return the attributes as a dict."""
        return dict(self)


def walk(module: nn.Module, others: Iterable[Any] = ()) -> Found:
    """Return everything in ``module`` and ``others`` that a training step can change.

    The walk inspects attributes of modules (including unregistered modules), containers, tuples, and objects of the
    user's own classes. It skips objects of torch, Lightning, NumPy and the standard library, datasets, and containers
    of more than :data:`LARGEST` elements.
    """
    return _Walk().run([module], others)


def held_by_hooks(module: nn.Module) -> list[Any]:
    """Return what the hooks of a module and its submodules refer to: owners of methods, closure variables.

    Examples:
        >>> seen: list[int] = []
        >>> net = nn.Linear(2, 2)
        >>> _ = net.register_forward_hook(lambda *_: seen.append(1))
        >>> held_by_hooks(net)
        []
        >>> def watched(net, seen):
        ...     return net.register_forward_hook(lambda *_: seen.append(1))
        >>> _ = watched(net, seen)
        >>> held_by_hooks(net)
        [[]]
    """
    found = []
    for hook in (h for part in module.modules() for key in HOOKS for h in part.__dict__.get(key, {}).values()):
        if isinstance(hook, types.MethodType):
            found.append(hook.__self__)
        for cell in getattr(hook, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                found.append(cell.cell_contents)
    return [value for value in found if not isinstance(value, _PLAIN)]


class _Walk:
    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.classes: set[type] = set()
        self.found = Found([], [], [], [], [], [], [], [])
        self.waiting: list[Any] = []

    def run(self, modules: Iterable[nn.Module], others: Iterable[Any]) -> Found:
        self.waiting = [*modules, *others]
        for other in others:  # a datamodule is Lightning's own kind, and may hold what the step draws from
            self._attributes(other)
        while self.waiting:
            value = self.waiting.pop()
            if id(value) in self.seen:
                continue
            self.seen.add(id(value))
            self._visit(value)
        return self.found

    def _visit(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            self.found.modules.append(value)
            self.waiting += [child for child in value._modules.values() if child is not None]
            self._within(value.__dict__, [key for key in value.__dict__ if key not in _INTERNAL and key not in HOOKS])
            self._of_classes(type(value))
        elif is_container(value):
            self.found.containers.append(value)
            if len(value) <= LARGEST and not isinstance(value, bytearray):
                self._elements(value)
        elif is_generator(value):
            self.found.generators.append(value)
        elif _is_helper(value):
            self._attributes(value)

    def _attributes(self, value: Any) -> None:
        own = attributes_of(value)
        if own is not None and not (isinstance(value, torch.utils.data.Dataset | torch.utils.data.DataLoader)):
            self.found.objects.append(value)
            self._of_classes(type(value))
            self._within(own, [key for key in own if key not in ("trainer", "_trainer")])

    def _of_classes(self, kind: type) -> None:
        """Look into what the user's classes hold themselves, such as a list that all instances fill."""
        for base in kind.__mro__:
            if base in self.classes or base.__module__.partition(".")[0] in (*_OPAQUE_PACKAGES, "builtins"):
                continue
            self.classes.add(base)
            for name, value in vars(base).items():
                if not name.startswith("__") and (is_container(value) or is_generator(value)):
                    self.waiting.append(value)

    def _elements(self, container: Any) -> None:
        if isinstance(container, set):
            self.waiting += [value for value in container if not isinstance(value, _PLAIN)]
        else:
            self._within(container, container if isinstance(container, dict) else range(len(container)))

    def _within(self, holder: Any, keys: Iterable[Any]) -> None:
        for key in keys:
            self._place(Place(holder, key), holder[key])

    def _place(self, place: Place, value: Any) -> None:
        if isinstance(value, _PLAIN):
            return
        if isinstance(value, nn.Parameter):
            self.found.parameters.append(place)
        elif isinstance(value, Tensor):
            self.found.tensors.append(place)
        elif is_array(value):
            self.found.arrays.append(place)
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                self._place(place._replace(path=(*place.path, index)), item)
        elif is_iterator(value) and not is_container(value) and not isinstance(value, nn.Module):
            self.found.iterators.append(place)
        else:
            self.waiting.append(value)
