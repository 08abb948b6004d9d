"""Argument checking: annotations declare types and ranges, and one checker reads them.

    @checked
    def draw(num: PositiveInt = 1, sigma: PositiveFloat | None = None) -> None: ...

Arguments are never converted: ``"3"``, ``3.7`` and True are not whole numbers, and NaN is not a number.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
import types
import typing
from collections import abc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

_F = TypeVar("_F", bound=Callable[..., Any])
_C = TypeVar("_C", bound=type)


@dataclass(frozen=True)
class Range:
    """Bounds of a number, as metadata of an annotated type: ``Annotated[float, Range(gt=0, le=1)]``.

    Args:
        ge: the least value.
        gt: the number must be greater than this.
        le: the largest value.
        lt: the number must be less than this.

    Examples:
        >>> 0.5 in Range(gt=0, le=1), 0 in Range(gt=0)
        (True, False)
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __contains__(self, value: Any) -> bool:
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        low, high = self.gt if self.ge is None else self.ge, self.lt if self.le is None else self.le
        if low is not None and high is not None:
            return f"in {'(' if self.ge is None else '['}{low:.12g}, {high:.12g}{')' if self.le is None else ']'}"
        bounds = {"of at least": self.ge, "above": self.gt, "of at most": self.le, "below": self.lt}
        return " ".join(f"{word} {bound:.12g}" for word, bound in bounds.items() if bound is not None)


@dataclass(frozen=True)
class NonEmpty:
    """Metadata of an annotated sequence or string that must not be empty."""

    def __contains__(self, value: Any) -> bool:
        return len(value) > 0


PositiveInt = Annotated[int, Range(ge=1)]
NonNegativeInt = Annotated[int, Range(ge=0)]
AtLeastTwo = Annotated[int, Range(ge=2)]
Seed32 = Annotated[int, Range(ge=0, le=(1 << 32) - 1)]
"""What NumPy takes as a seed."""
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
Fraction = Annotated[float, Range(ge=0, le=1)]
ImageShape = tuple[PositiveInt, PositiveInt, PositiveInt]
"""Channels, height and width."""
PositiveInts = Annotated[abc.Sequence[PositiveInt], NonEmpty()]
FractionBelowOne = Annotated[float, Range(ge=0, lt=1)]
PositiveFraction = Annotated[float, Range(gt=0, le=1)]
OpenFraction = Annotated[float, Range(gt=0, lt=1)]
Name = Annotated[str, NonEmpty()]
Patterns = Name | Annotated[abc.Sequence[Name], NonEmpty()]
"""Shell-style patterns of names: one, or several."""


def checked(function: _F) -> _F:
    """Return a function, or the constructor of a class, that checks its arguments by their annotations.

    The error is a ValueError that names the owner, the argument, the value and the allowed values. An unknown keyword
    raises a TypeError, as in any call; the message names the nearest keywords.

    Examples:
        >>> @checked
        ... def draw(num: PositiveInt = 1) -> int:
        ...     return num
        >>> draw(0)
        Traceback (most recent call last):
        ValueError: draw: num=0: give a whole number of at least 1.
    """
    parameters = inspect.signature(function).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    is_constructor = function.__name__ == "__init__"
    order = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        owner = type(args[0]).__name__ if is_constructor and args else function.__name__
        hints, takes_any = _hints(function)
        for name, value in [*zip(order, args, strict=False), *kwargs.items()]:
            if name in hints:
                if value is not defaults.get(name, parameters):
                    check(owner, name, value, hints[name])
            elif name not in parameters and not takes_any:
                known = [*hints, *(keywords(type(args[0])) if is_constructor else ())]
                raise TypeError(unknown(owner, name, value, list(dict.fromkeys(known))))
        return function(*args, **kwargs)

    wrapper.__checked__ = True  # type: ignore[attr-defined]
    return typing.cast("_F", wrapper)


def check_arguments(kind: type, given: Mapping[str, Any]) -> None:
    """Check the arguments of a constructor from inside it, for constructors that must not be wrapped.

    Lightning's ``save_hyperparameters`` searches the call stack for constructors, and stops at any other frame.

    Args:
        kind: the class of the constructor.
        given: the arguments, ``locals()``.
    """
    constructor = vars(kind)["__init__"]
    parameters = inspect.signature(constructor).parameters
    for name, hint in _hints(constructor)[0].items():
        if given[name] is not parameters[name].default:
            check(type(given["self"]).__name__, name, given[name], hint)


def checked_class(kind: _C) -> _C:
    """Return a dataclass whose constructor checks its arguments."""
    constructor: Any = checked(vars(kind)["__init__"])
    setattr(kind, "__init__", constructor)  # noqa: B010  # of the class, not of an object
    return kind


def check(owner: str, name: str, value: Any, hint: Any) -> None:
    """Raise ValueError if a value is not of the annotated type and range.

    Args:
        owner: the function or class that takes the argument.
        name: the name of the argument.
        value: its value.
        hint: its annotation.
    """
    if not accepts(hint, value):
        raise ValueError(f"{owner}: {name}={shown(value)}: {cure(hint)}.")


def cure(hint: Any) -> str:
    """Return advice for a value that an annotation does not allow.

    Examples:
        >>> cure(Literal["sum", "mean"]), cure(PositiveInt)
        ("choose 'sum' or 'mean'", 'give a whole number of at least 1')
    """
    return f"{'choose' if _is_choice(hint) else 'give'} {described(hint)}"


def check_attributes(holder: Any) -> None:
    """Check the attributes that share names with constructor arguments; they may have been assigned since."""
    kind: Any = type(holder)
    for name, hint in argument_types(kind).items():
        if not hasattr(holder, name) or callable(getattr(type(holder), name, None)):  # a method of this name
            continue
        value = getattr(holder, name)
        check(type(holder).__name__, name, value, hint)
        for part in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(part, type) and getattr(type(part).__init__, "__checked__", False):
                check_attributes(part)


def keywords(kind: type) -> list[str]:
    """Return the names of a class's arguments, including those that ``**kwargs`` passes to its bases."""
    found: list[str] = []
    for base in kind.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = [*inspect.signature(vars(base)["__init__"]).parameters.values()][1:]
        found += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(dict.fromkeys(found))


def unknown(owner: str, name: str, value: Any, known: list[str]) -> str:
    """Return the error text for an unknown keyword, with the nearest known ones."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    return f"{owner}: {name}={shown(value)}: there is no such argument; nearest: {', '.join(near) or 'none'}."


# --- types ----------------------------------------------------------------------------------------------------------


def accepts(hint: Any, value: Any) -> bool:
    """Whether a value is of an annotated type; annotations that cannot be checked, such as a TypeVar, accept anything.

    Examples:
        >>> accepts(int, True), accepts(float, 1), accepts(float, float("nan")), accepts(Literal["a"] | None, None)
        (False, True, False, True)
    """
    return _acceptor(hint)(value)


@functools.cache
def _acceptor(hint: Any) -> Callable[[Any], bool]:
    """Return the check of an annotation. It is made once: functions of plain loops are called in every step."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return _anything
    if origin is Annotated:
        kind = _acceptor(args[0])
        limits = [limit for limit in hint.__metadata__ if isinstance(limit, Range | NonEmpty)]
        return lambda value: kind(value) and all(value in limit for limit in limits)
    if origin in (Union, types.UnionType):
        kinds = [_acceptor(kind) for kind in args]
        return lambda value: any(kind(value) for kind in kinds)
    if origin is Literal:
        return lambda value: any(type(value) is type(choice) and value == choice for choice in args)
    if hint is None or hint is type(None):
        return lambda value: value is None
    if hint in (int, float):
        number = Integral if hint is int else Real
        return lambda value: isinstance(value, number) and not isinstance(value, bool) and math.isfinite(value)
    return _of_class(hint) if origin is None else _of_generic(origin, args)


def _anything(_value: Any) -> bool:
    return True


def _of_class(hint: Any) -> Callable[[Any], bool]:
    if hint in (Callable, abc.Callable):
        return callable
    plain = isinstance(hint, type) and not (getattr(hint, "_is_protocol", False) and not _runtime(hint))
    return (lambda value: isinstance(value, hint)) if plain else _anything


def _runtime(hint: Any) -> bool:
    return bool(getattr(hint, "_is_runtime_protocol", False))


def _of_generic(origin: Any, args: tuple[Any, ...]) -> Callable[[Any], bool]:
    if origin is abc.Callable:
        return callable
    if origin is type:
        return lambda value: isinstance(value, type) and (not isinstance(args[0], type) or issubclass(value, args[0]))
    if origin is tuple and args[-1] is not Ellipsis:  # YAML has lists for tuples
        return lambda value: _is_sequence(value) and len(value) == len(args) and all(map(accepts, args, value))
    if origin in (abc.Sequence, list, tuple):
        return lambda value: _is_sequence(value) and _all(args[0], value)
    if origin in (abc.Iterable, abc.Collection):
        return lambda value: (
            isinstance(value, origin)
            and not isinstance(value, str | bytes | torch.Tensor)
            and (not _is_sequence(value) or _all(args[0], value))
        )
    if issubclass(origin, abc.Mapping):
        return lambda value: isinstance(value, abc.Mapping) and _all(args[0], value) and _all(args[1], value.values())
    return lambda value: isinstance(value, origin)


def _all(hint: Any, values: Iterable[Any]) -> bool:
    if hint in (str, torch.Tensor, torch.nn.Parameter):  # named parameters, in every step of a plain loop
        return all(isinstance(value, hint) for value in values)
    return all(map(_acceptor(hint), values))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, abc.Sequence) and not isinstance(value, str | bytes)


# --- words ----------------------------------------------------------------------------------------------------------

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    None: "None",
    type(None): "None",
    torch.Tensor: "a tensor",
    Any: "anything",
}


def described(hint: Any) -> str:
    """Return what an annotation allows, in words.

    Examples:
        >>> described(PositiveInt | Literal["auto", "fastest"]), described(PositiveFloat | None)
        ("a whole number of at least 1, 'auto' or 'fastest'", 'a positive number or None')
    """
    said = list(dict.fromkeys(_alternatives(hint)))
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} or {said[-1]}"


def _alternatives(hint: Any) -> Iterator[str]:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for kind in args:
            yield from _alternatives(kind)
    elif origin is Literal:
        yield from map(repr, args)
    elif origin is Annotated:
        said = described(args[0])
        if any(isinstance(limit, NonEmpty) for limit in hint.__metadata__):
            said = "a non-empty string" if args[0] is str else f"{said} (at least one)"
        limits = [str(limit) for limit in hint.__metadata__ if isinstance(limit, Range)]
        yield "a positive number" if (said, limits) == ("a number", ["above 0"]) else " ".join([said, *limits])
    else:
        yield _word(hint, origin, args)


def _word(hint: Any, origin: Any, args: tuple[Any, ...]) -> str:
    if hint in _WORDS:
        return _WORDS[hint]
    if abc.Callable in (hint, origin):
        return "a function"
    if origin is type:
        return f"a class of {getattr(args[0], '__name__', args[0])}"
    if origin is tuple and args[-1] is not Ellipsis:
        kinds = list(dict.fromkeys(map(_several, args)))
        return f"a list of {len(args)} {' and '.join(kinds)}"
    if origin in (abc.Sequence, abc.Iterable, abc.Collection, list, tuple):
        return f"a list of {_several(args[0])}"
    if origin is not None and issubclass(origin, abc.Mapping):
        return f"a dict of {_several(args[1])} by name"
    name = getattr(hint, "__name__", str(hint))
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _several(hint: Any) -> str:
    kinds = [re.sub(r"^an? (non-empty |whole )?([\w.]+)", r"\1\2s", said) for said in _alternatives(hint)]
    return " or ".join(dict.fromkeys(kinds))


def _is_choice(hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return all(_is_choice(kind) for kind in get_args(hint))
    return get_origin(hint) is Literal or hint in (None, type(None))


def shown(value: Any) -> str:
    """Return a value as messages show it: long values are truncated, tensors and modules are summarized.

    Examples:
        >>> shown("forwrad"), shown(torch.zeros(2, 3))
        ("'forwrad'", 'Tensor(2, 3)')
    """
    if isinstance(value, torch.Tensor):
        return f"{type(value).__name__}{tuple(value.shape)}"
    if isinstance(value, torch.nn.Module):
        return f"{type(value).__name__}(...)"
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        text = ", ".join(map(shown, value))
        text = f"[{text}]" if isinstance(value, list) else f"({text}{',' * (len(value) == 1)})"
    else:
        text = " ".join((getattr(value, "__qualname__", None) or repr(value)).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


# --- annotations of functions ---------------------------------------------------------------------------------------


@functools.cache
def _hints(function: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """Return the annotations of a function's arguments by name, and whether it takes other keywords as well.

    Keywords that are typed by a ``TypedDict``, as in ``**options: Unpack[Options]``, are arguments like the others.
    """
    hints = get_type_hints(function, include_extras=True)
    takes_any = False
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            options = getattr(hints.pop(name, None), "__args__", (None,))[0]
            takes_any = not typing.is_typeddict(options)
            hints.update({} if takes_any else get_type_hints(options, include_extras=True))
        elif parameter.kind is parameter.VAR_POSITIONAL:
            hints.pop(name, None)
    hints.pop("return", None)
    return hints, takes_any


@functools.cache
def argument_types(kind: type) -> dict[str, Any]:
    """Return the annotations of a class's arguments by name, including bases that are checked or in this package."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        constructor: Any = vars(base).get("__init__")
        ours = base.__module__.startswith("lightning_bpfree.") or hasattr(constructor, "__checked__")
        if constructor is not None and ours:
            found = {**_hints(inspect.unwrap(constructor))[0], **found}
    return found
