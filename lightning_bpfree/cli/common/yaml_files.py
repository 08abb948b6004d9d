"""Checks of configuration files before parsing: errors with file and line, and the location of a key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_bpfree.cli.common.preconditions import CommandError


def check_yaml(path: Path) -> None:
    """Raise CommandError, with file and line, unless a file is a YAML mapping with each key once."""
    root = _composed(path)
    if root is None:
        raise CommandError(
            f"{path} is empty. A configuration has the keys model, data and trainer; an overlay has some of them."
        )
    if not hasattr(root, "value") or root.id != "mapping":
        found = "a list" if root.id == "sequence" else "a single value"
        raise CommandError(
            f"{path}, line {root.start_mark.line + 1}: give a mapping such as 'trainer: {{max_epochs: 5}}', "
            f"not {found}."
        )
    lines: dict[tuple[str, ...], int] = {}
    for key, line in _keys(root):
        if key in lines:
            raise CommandError(
                f"{path}, line {line}: the key {'.'.join(key)} is given twice, first in line {lines[key]}. Merge them."
            )
        lines[key] = line


def place_of(key: str, paths: Sequence[Path]) -> str:
    """Return the location of a key, such as ``"mine.yaml, line 3: "``, in the last file that has it; empty if none has.

    Args:
        key: with dots, such as ``trainer.max_epochs``; list elements do not count.
        paths: configuration files.
    """
    for path in reversed(paths):
        for found, line in _keys(_composed(path)):
            plain = [part.rstrip("+") for part in found if part not in ("init_args", "dict_kwargs")]
            wanted = [part for part in key.split(".") if part not in ("init_args", "dict_kwargs")]
            if plain == wanted:
                return f"{path}, line {line}: "
    return ""


def _composed(path: Path) -> Any:
    """Return the nodes of a file; None if it is empty."""
    import yaml

    try:
        return yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not a text file in UTF-8; a configuration is YAML.") from error
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror or error}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise CommandError(f"{path}{line}: this is not YAML: {what}. Correct this line or the one above.") from error


def _keys(node: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the keys of mappings, from the top, with their lines; those within lists come without an index."""
    if node is None:
        return
    if node.id == "mapping":
        for key, value in node.value:
            path = (*above, str(key.value))
            yield path, key.start_mark.line + 1
            if value.id == "mapping":
                yield from _keys(value, path)
