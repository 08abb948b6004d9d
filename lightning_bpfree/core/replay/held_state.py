"""Saving and restoring the state that modules hold outside parameters, buffers and tensors."""

from __future__ import annotations

import operator
import random
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_bpfree.core.replay.object_graph import HOOKS, Found, attributes_of

_SIMPLE = (int, float, complex, str, bytes, bool, type(None))

_MISSING = object()
_VALUES = operator.methodcaller("values")


def _same(now: Mapping[Any, Any], then: Mapping[Any, Any]) -> bool:
    """Whether two mappings have the same keys in the same order and hold the same objects."""
    return len(now) == len(then) and all(map(operator.is_, now.values(), then.values())) and list(now) == list(then)


class SavedAttributes(NamedTuple):
    """Attributes of several objects: the number per object, one list of names, one of values, and hooks."""

    sizes: list[int]
    keys: list[str]
    values: list[Any]
    hooks: list[dict[Any, Any]] | None

    def named(self) -> dict[tuple[int, str], Any]:
        """Return the values by owner index and name."""
        owners = chain.from_iterable(map(repeat, range(len(self.sizes)), self.sizes))
        return dict(zip(zip(owners, self.keys, strict=True), self.values, strict=True))


class Attributes:
    """The attributes of modules and objects (hidden states, counters, anything a step assigns), and modules' hooks.

    Hooks and attributes are restored together: libraries that register hooks at the first forward pass also set a flag
    on the module. Restoring only the flag would register the hooks again.

    Args:
        modules: the modules whose attributes are saved.
        objects: further objects whose attributes are saved.
    """

    def __init__(self, modules: Sequence[nn.Module], objects: Sequence[Any] = ()) -> None:
        self.modules = list(modules)
        self.owners: list[Any] = [module.__dict__ for module in modules]
        self.owners += [own for own in map(attributes_of, objects) if own is not None]
        self.hooks: list[dict[Any, Any]] = [m.__dict__[key] for m in modules for key in HOOKS if key in m.__dict__]

    def save(self) -> SavedAttributes:
        """Return every owner's attributes, and every module's hooks."""
        hooks = [hooks.copy() for hooks in self.hooks] if any(self.hooks) else None
        return SavedAttributes(*self._now(), hooks)

    def _now(self) -> tuple[list[int], list[str], list[Any]]:
        # Flat lists: comparing them takes a third of the time of comparing dict by dict.
        owners = self.owners
        return list(map(len, owners)), list(chain(*owners)), list(chain(*map(_VALUES, owners)))

    def load(self, state: SavedAttributes) -> None:
        """Restore attributes and hooks."""
        sizes, keys, values = self._now()
        if sizes != state.sizes or keys != state.keys or not all(map(operator.is_, values, state.values)):
            named = zip(state.keys, state.values, strict=True)
            for own, size in zip(self.owners, state.sizes, strict=True):
                _refill(own, dict(islice(named, size)))
        if any(self.hooks) or state.hooks:
            self._load_hooks(state.hooks or [{}] * len(self.hooks))

    def _load_hooks(self, state: list[dict[Any, Any]]) -> None:
        # Of now and of then: a hook's marks have its key, and stand in a dict of their own.
        own = {key for hooks in (*self.hooks, *state) for key, hook in hooks.items() if _is_a_rules(hook)}
        for hooks, kept in zip(self.hooks, state, strict=True):
            if hooks or kept:
                _refill(hooks, _besides(own, hooks, kept))

    @staticmethod
    def differs(a: SavedAttributes, b: SavedAttributes) -> bool:
        """Whether anything other than numbers and strings was assigned or registered between two states."""
        if a.sizes == b.sizes and a.keys == b.keys:
            if all(map(operator.is_, a.values, b.values)):
                return False
            pairs: Iterable[tuple[Any, Any]] = zip(a.values, b.values, strict=True)
        else:
            then = b.named()
            pairs = ((value, then.get(name, _MISSING)) for name, value in a.named().items())
        return any(now is not then and not isinstance(now, _SIMPLE) for now, then in pairs)


def _is_a_rules(hook: Any) -> bool:
    function = getattr(hook, "func", hook)
    return str(getattr(function, "__module__", "")).startswith("lightning_bpfree.")


def _besides(own: set[Any], hooks: Mapping[Any, Any], kept: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return ``kept`` with the hooks that rules have now: they come and go between evaluations, not within one."""
    now = {key: hook for key, hook in hooks.items() if key in own}
    then = {key: hook for key, hook in kept.items() if key not in own}
    return {**then, **now} if now or len(then) < len(kept) else kept


def _refill(mapping: Any, saved: Mapping[Any, Any]) -> None:
    if _same(mapping, saved):
        return
    # Of the kind that Python brings: a class of the user's own may do more in these methods, as Counter.update does.
    kind: Any = next((kind for kind in (OrderedDict, dict) if isinstance(mapping, kind)), type(mapping))
    kind.clear(mapping)
    for key, value in saved.items():
        kind.__setitem__(mapping, key, value)


class Registries:
    """The registered parameters, buffers and children of modules; those that an evaluation adds are removed.

    Args:
        modules: the modules whose registries are saved.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.registries: list[dict[str, Any]] = [
            m.__dict__[key] for m in modules for key in ("_parameters", "_buffers", "_modules")
        ]
        self.sizes = list(map(len, self.registries))

    def save(self) -> dict[int, dict[str, Any]]:
        """Return what was added since the start, by registry index."""
        sizes = list(map(len, self.registries))
        if sizes == self.sizes:
            return {}
        grown = [i for i, size in enumerate(sizes) if size > self.sizes[i]]
        return {i: dict(list(self.registries[i].items())[self.sizes[i] :]) for i in grown}

    def load(self, state: dict[int, dict[str, Any]]) -> None:
        """Remove what was added since, and add what is in ``state``."""
        if not state and list(map(len, self.registries)) == self.sizes:
            return
        for i, registry in enumerate(self.registries):
            while len(registry) > self.sizes[i]:
                registry.popitem()
            registry.update(state.get(i, {}))


class Containers:
    """The contents of lists, dicts, sets and deques (and of their subclasses)."""

    def __init__(self, containers: Sequence[Any]) -> None:
        self.containers = list(containers)

    def save(self) -> list[Any]:
        """Return shallow copies of the contents."""
        return [_contents(container) for container in self.containers]

    def load(self, state: list[Any]) -> None:
        """Restore the contents of the same objects."""
        for container, saved in zip(self.containers, state, strict=True):
            if isinstance(container, dict):
                _refill(container, saved)
            elif isinstance(container, list | bytearray):
                if len(container) != len(saved) or not all(map(operator.is_, container, saved)):
                    kind: Any = list if isinstance(container, list) else bytearray
                    kind.__setitem__(container, slice(None), saved)
            elif isinstance(container, deque):
                if len(container) != len(saved) or not all(map(operator.is_, container, saved)):
                    deque.clear(container)
                    deque.extend(container, saved)
            elif container != saved:
                set.clear(container)
                set.update(container, saved)

    @staticmethod
    def differs(a: list[Any], b: list[Any]) -> bool:
        """Whether anything other than numbers and strings was added to a container between two states."""
        return any(_news(now, then) for now, then in zip(a, b, strict=True))


def _contents(container: Any) -> Any:
    if isinstance(container, dict):
        return dict(container)
    if isinstance(container, bytearray):
        return bytes(container)
    return set(container) if isinstance(container, set) else list(container)


def _news(now: Any, then: Any) -> bool:
    if isinstance(now, dict):
        now, then = list(now.values()), list(then.values())
    if isinstance(now, bytes):
        return False
    if len(now) == len(then) and all(map(operator.is_, now, then)):
        return False
    old = set(map(id, then))
    return any(id(value) not in old and not isinstance(value, _SIMPLE) for value in now)


class Generators:
    """Random generators of torch, NumPy and Python that modules hold."""

    def __init__(self, generators: Sequence[Any]) -> None:
        self.generators = list(generators)

    def save(self) -> list[Any]:
        """Return the state of every generator."""
        return [_state_of(generator) for generator in self.generators]

    def load(self, state: list[Any]) -> None:
        """Set every generator to its state."""
        for generator, saved in zip(self.generators, state, strict=True):
            if isinstance(generator, torch.Generator):
                generator.set_state(saved)
            elif isinstance(generator, random.Random):
                generator.setstate(saved)
            else:
                _bits(generator).state = saved


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else _bits(generator).state


def _bits(generator: Any) -> Any:
    """Return NumPy's bit generator, which has the state of a Generator; a RandomState keeps a normal number beside."""
    if hasattr(generator, "get_state") and hasattr(generator, "bit_generator") is False:
        return _Legacy(generator)
    return getattr(generator, "bit_generator", generator)


class _Legacy:
    """A ``numpy.random.RandomState`` with a property ``state``, as bit generators have."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    @property
    def state(self) -> Any:
        return self.generator.get_state(legacy=False)

    @state.setter
    def state(self, value: Any) -> None:
        self.generator.set_state(value)


class HeldState:
    """State that modules hold outside parameters, buffers and tensors, saved and restored together.

    Args:
        found: the result of a walk.
    """

    def __init__(self, found: Found) -> None:
        self.parts: tuple[Any, ...] = (
            Attributes(found.modules, found.objects),
            Containers(found.containers),
            Generators(found.generators),
            Registries(found.modules),
        )

    def save(self) -> list[Any]:
        """Return the current state."""
        return [part.save() for part in self.parts]

    def load(self, state: list[Any]) -> None:
        """Restore ``state``."""
        for part, saved in zip(self.parts, state, strict=True):
            part.load(saved)

    def differs(self, a: list[Any], b: list[Any]) -> bool:
        """Whether a new object appeared between two states that a walk should inspect."""
        return bool(self.parts[0].differs(a[0], b[0]) or self.parts[1].differs(a[1], b[1]))
