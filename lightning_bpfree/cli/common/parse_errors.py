"""Errors of the configuration's parser, in one line where they are about an argument of this package."""

from __future__ import annotations

import difflib
import re
from importlib import import_module

from lightning_bpfree.core.arguments import argument_types, cure, keywords

_PLACE = re.compile(
    r"Problem with given class_path '(?P<path>[\w.]+)':\s+"
    r"(?:Parser key \"(?P<key>\w+)\":|Option '(?P<option>\w+)' is not accepted)"
)
_VALUE = re.compile(r"(?:Got|Given) value: (?P<value>.*)")


def in_one_line(message: str) -> str:
    """Return what the parser says of an argument of this package's classes as the class would say it itself.

    Messages about anything else stay as they are: the parser lists the types that it has tried, one below the other.

    Examples:
        >>> print(in_one_line('''Errors:
        ...   - Problem with given class_path 'lightning_bpfree.ZerothOrder':
        ...       Parser key "num_directions":
        ...         Expected a <class 'int'>. Got value: many'''))
        ZerothOrder: num_directions='many': give a whole number of at least 1.
    """
    places = list(_PLACE.finditer(message))
    if not places or not places[-1]["path"].startswith("lightning_bpfree."):
        return message
    module, _, name = places[-1]["path"].rpartition(".")
    kind = getattr(import_module(module), name)
    if option := places[-1]["option"]:
        near = difflib.get_close_matches(option, keywords(kind), n=3, cutoff=0.0)
        return f"{name}: {option}: there is no such argument; nearest: {', '.join(near)}."
    key, value = places[-1]["key"], _VALUE.search(message, places[-1].end())
    if key not in argument_types(kind) or value is None:
        return message
    return f"{name}: {key}={value['value'].strip()!r}: {cure(argument_types(kind)[key])}."
