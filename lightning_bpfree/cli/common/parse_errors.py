"""Errors of the configuration's parser, in one line that names file, line and fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_bpfree.cli.common.errors import in_one_line
from lightning_bpfree.cli.common.preconditions import did_you_mean
from lightning_bpfree.cli.common.yaml_files import place_of
from lightning_bpfree.core.arguments import argument_types, cure, keywords

_PLACE = re.compile(
    r"Problem with given class_path '(?P<path>[\w.]+)':\s+"
    r"(?:Parser key \"(?P<key>\w+)\":|Option '(?P<option>\w+)' is not accepted)"
)
_VALUE = re.compile(r"(?:Got|Given) value: (?P<value>.*)")
_KEY = re.compile(r'Parser key "(?P<key>[\w.]+)":')
_NOT_FOUND = re.compile(
    r"Problem with given class_path '(?P<path>[\w.]+)':\s+(?P<why>(?:No module|module|cannot)[^\n]+)"
)
_NO_PATH = re.compile(r"Expected a dot import path string: (?P<name>\S+)")
_UNKNOWN_KEY = re.compile(
    r"(?:Group '(?P<group>[\w.]+)' )?does not accept option '(?P<key>[\w.]+)'"
    r"|^Option '(?P<other>[\w.]+)' is not accepted"
)
_EXPECTED = re.compile(r"Expected an? (?P<type>[^\n]+?)\.?(?: Got value[^\n]*)?(?:\n|$)")
_TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a string",
    "<class 'NoneType'>": "null",
}


def parse_error(
    message: str, options: Sequence[str] = (), files: Sequence[Path] = (), given: Sequence[str] = ()
) -> str:
    """Return the parser's message in one line: what was given, where, and what to give instead.

    Args:
        message: the parser's message.
        options: all options of the command, to suggest one for a misspelled option.
        files: the configuration files, to locate a mistake.
        given: the options of the command line, such as ``--trainer.max_epochs``, whose values are in no file.

    Examples:
        >>> print(parse_error('''Errors:
        ...   - Problem with given class_path 'lightning_bpfree.ZerothOrder':
        ...       Parser key "num_directions":
        ...         Expected a <class 'int'>. Got value: many'''))
        ZerothOrder: num_directions='many': give a whole number of at least 1.
        >>> print(parse_error("unrecognized arguments: --trainer.max_epoch=3", ["--trainer.max_epochs"]))
        there is no option --trainer.max_epoch. Did you mean --trainer.max_epochs?
    """
    _, found, rest = message.partition("nrecognized arguments: ")
    if found:
        return _unknown_option(rest.split()[0], options)
    if re.search(r"arguments are required: (\w+\.)?model$", message.strip()):
        return "there is no model. Give a configuration that has one, such as -c quickstart or -c mine.yaml."
    unknown = _UNKNOWN_KEY.search(message)
    if unknown:
        key = ".".join(filter(None, (unknown["group"], unknown["key"] or unknown["other"])))
        known = [option.removeprefix("--") for option in options]
        return f"{place_of(key, files)}there is no key {key}.{did_you_mean(key, known)}"
    argument = _of_argument(message)
    found_key = _KEY.search(message)
    if found_key is None:
        return argument or in_one_line(message)
    key = found_key["key"]
    place = place_of(key, files) if f"--{key}" not in given else ""
    value = _VALUE.search(message)
    shown = value["value"].strip() if value else ""
    return place + (argument or _of_class(message, key) or _of_value(message, key, shown))


def _unknown_option(argument: str, options: Sequence[str]) -> str:
    name = argument.partition("=")[0]
    if not name.startswith("-"):
        return f"{argument!r} belongs to no option. A configuration file is given by -c {argument}."
    return f"there is no option {name}.{did_you_mean(name, options)}"


def _of_argument(message: str) -> str:
    """Return what is wrong with an argument of a class; empty if the message is about something else."""
    places = list(_PLACE.finditer(message))
    if not places:
        return ""
    module, _, name = places[-1]["path"].rpartition(".")
    kind: Any = getattr(import_module(module), name, None)
    if kind is None:
        return ""
    if option := places[-1]["option"]:
        known = [word for word in keywords(kind) if word != "self"]
        near = difflib.get_close_matches(option, known, n=3, cutoff=0.0)
        return f"{name}: {option}: there is no such argument; nearest: {', '.join(near) or 'none'}."
    key, value = places[-1]["key"], _VALUE.search(message, places[-1].end())
    if value is None:
        return ""
    given = value["value"].strip()
    if not kind.__module__.startswith("lightning_bpfree.") or key not in argument_types(kind):
        return f"{name}: {_of_value(message[places[-1].end() :], key, given)}"
    return f"{name}: {key}={given!r}: {cure(argument_types(kind)[key])}."


def _of_class(message: str, key: str) -> str:
    """Return what is wrong with the name of a class; empty if the message is about something else."""
    if missing := _NOT_FOUND.search(message):
        return f"{key}: cannot import {missing['path']}: {missing['why'].strip()}.{_like(missing['path'])}"
    if named := _NO_PATH.search(message):
        return (
            f"{key}: {named['name']} is not a known class.{_like(named['name'])} Give the class of a module "
            "of your own by its path, such as my_module.MyClass."
        )
    return ""


def _like(path: str) -> str:
    """Return the public classes, or those of the module of ``path``, with the most similar names."""
    import lightning_bpfree

    module, _, name = path.rpartition(".")
    try:
        place = import_module(module) if module else lightning_bpfree
    except ImportError as error:
        return (
            ""
            if module.split(".")[0] != getattr(error, "name", "")
            else " Run the command in the folder that contains it."
        )
    return did_you_mean(name, [known for known in dir(place) if known[:1].isupper()])


def _of_value(message: str, key: str, given: str) -> str:
    """Return which values a key takes, from the types that the parser has tried."""
    wanted = dict.fromkeys(_in_words(found["type"].strip()) for found in _EXPECTED.finditer(message))
    if not wanted:
        return in_one_line(message)
    return f"{key}={given!r}: give {' or '.join(wanted)}."


def _in_words(kind: str) -> str:
    if kind.startswith("typing.Literal["):
        return kind.removeprefix("typing.Literal[").rstrip("]").replace(", ", " or ")
    return _TYPES.get(kind, re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"a \1", kind))
