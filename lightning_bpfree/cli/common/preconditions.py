"""Preconditions of a command: optional packages, and a folder to write to."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path


class CommandError(Exception):
    """An error that the user can correct; the message says how."""


def require(*packages: str, extra: str = "recipes") -> None:
    """Raise CommandError if one of the optional packages (by import name) is not installed.

    Args:
        *packages: import names.
        extra: the extra of this package that installs them.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise CommandError(f'{", ".join(missing)} not installed: pip install "lightning-bpfree[{extra}]"')


def require_writable(folder: str | Path, option: str) -> None:
    """Raise CommandError if no file can be written to ``folder``, which is created if it does not exist.

    Args:
        folder: the folder; addresses such as ``s3://...`` are not checked.
        option: the option that the user can change to write elsewhere.
    """
    if "://" in str(folder):
        return
    try:
        # By trying, since permission bits tell little on network drives, and nothing to root.
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise CommandError(
            f"cannot write to the output folder {Path(folder).absolute()} ({reason}). Nothing has been trained. Choose "
            f"another folder by {option}."
        ) from error


def nearest(name: str, names: Sequence[str]) -> str:
    """Return ``": 'name'. Did you mean ...?"``, with the names most like the given one, best first.

    Examples:
        >>> nearest("ft", ["fit", "check"])
        ": 'ft'. Did you mean fit?"
    """
    return f": {name!r}.{did_you_mean(name, names)}"


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """Return ``" Did you mean ...?"``, with up to three names most like the given one; empty if none is similar.

    Examples:
        >>> did_you_mean("--sedes", ["--seeds", "--out"]), did_you_mean("x", ["--out"])
        (' Did you mean --seeds?', '')
    """
    close = difflib.get_close_matches(name, dict.fromkeys(names), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""
