"""Files of results: their provenance, and atomic writes."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning
import torch

import lightning_bpfree


def provenance(command: str, argv: Sequence[str]) -> dict[str, Any]:
    """Return command line, date, versions and machine.

    Args:
        command: the command, such as ``compare``.
        argv: the arguments after it.
    """
    return {
        "command": ["bpfree", command, *argv],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def versions() -> dict[str, str]:
    """Return the versions on which results depend."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "lightning_bpfree": lightning_bpfree.__version__,
    }


def finite(found: Any) -> Any:
    """Return a result with None for NaN and infinity, which JSON does not have.

    Examples:
        >>> finite({"loss": float("nan"), "steps": [1, 2.5]})
        {'loss': None, 'steps': [1, 2.5]}
    """
    if isinstance(found, dict):
        return {key: finite(value) for key, value in found.items()}
    if isinstance(found, list):
        return [finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def write_json(found: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_csv(fields: Sequence[str], lines: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write a CSV file with these columns atomically; further entries of a line are left out."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
    temporary.replace(path)
