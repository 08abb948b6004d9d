"""Finished runs of a comparison on disk, so that the same command continues; and protection of earlier results."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_bpfree.cli.common.preconditions import CommandError
from lightning_bpfree.cli.common.records import versions, write_json

Result = dict[str, Any]
EXACT = {"metric": "--metric", "curve": "--curve or --reach", "vary": "--vary", "tuning": "--tune-by or the seeds"}


def digest(*parts: Any) -> str:
    """Return a short hash of plain values.

    Examples:
        >>> digest("a", 1) == digest("a", 1) != digest("a", 2)
        True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


class KeptRuns:
    """Results of finished runs, one file each, named after a hash of the run's configuration.

    The hash covers the configuration with the rule, seed and limits, and the versions of Python, torch, Lightning and
    this package. It does not cover the user's own code.

    Args:
        folder: folder of the files; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, train: Callable[[], Result], *what: Any) -> tuple[Result, bool]:
        """Return the result of a run and whether it was already kept; otherwise train, and keep the result.

        Args:
            train: returns the result, in plain values. An error is not kept.
            *what: plain values that identify the run.
        """
        if self.folder is None:
            return train(), False
        file = self.folder / f"{digest(versions(), *what)}.json"
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))), True
        except (OSError, ValueError):  # not there, or damaged
            found = train()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(found, file)
            return found, False


def identity(settings: Mapping[str, Any], configs: Mapping[str, str], vary: Any) -> dict[str, Any]:
    """Return the identity of a comparison: an earlier one can be continued if its identity is the same.

    Args:
        settings: settings of the comparison.
        configs: the whole configuration of each rule, by label.
        vary: the key that is varied, and its values.
    """
    return {
        "metric": settings["metric"],
        "curve": settings.get("curve"),
        "vary": vary,
        "tuning": [settings["tuned_by"], settings["tuning_seed"]],
        "budgets": settings["budgets"],
        "seeds": settings["seeds"],
        "rules": {label: digest(config, settings["grids"].get(label)) for label, config in configs.items()},
    }


def protect(out: Path, wanted: Mapping[str, Any], overwrite: bool) -> None:
    """Delete earlier results with ``overwrite``; else raise CommandError if this comparison would replace them.

    A comparison that contains the earlier one, with more seeds, rules or budgets, continues it.

    Args:
        out: folder of the results.
        wanted: see :func:`identity`.
        overwrite: whether to delete earlier results.
    """
    file = out / "comparison.json"
    if overwrite:
        for path in out.glob("comparison*.*"):
            path.unlink()
        for folder in ("rules", "runs"):
            shutil.rmtree(out / folder, ignore_errors=True)
        return
    if not file.exists():
        return
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if not any(_results(earlier)):
            return
        known, command = earlier.get("identity"), " ".join(earlier.get("command", []))
    except (ValueError, AttributeError) as error:
        raise CommandError(f"{file} is damaged. Give another --out, or --overwrite to delete it.") from error
    difference = _difference(known, wanted)
    if difference:
        raise CommandError(
            f"{out} holds the results of another comparison ({difference}): '{command}'. Give another --out, or "
            "--overwrite to delete them."
        )


def _results(comparison: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the runs that have given a result."""
    for part in comparison.get("conditions", [comparison]):
        for rule in part.get("rules", []):
            yield from (run for run in rule["runs"] if run["error"] is None)


def _difference(known: Any, wanted: Mapping[str, Any]) -> str:
    """Return in what an earlier comparison is not a part of this one; empty if it is."""
    if not isinstance(known, dict):
        return "written by another version"
    for key, option in EXACT.items():
        if known.get(key) != wanted[key]:
            return f"{option} differs"
    for key in ("seeds", "budgets"):
        missing = [str(value) for value in known[key] if value not in wanted[key]]
        if missing:
            return f"{key} {', '.join(missing)} are not in this one"
    for label, config in known["rules"].items():
        if label not in wanted["rules"]:
            return f"the rule {label} is not in this one"
        if config != wanted["rules"][label]:
            return f"the configuration or the grid of {label} differs"
    return ""
