"""What tests of `bpfree compare` share: rules that run in this process, and what has been written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_bpfree.cli.compare import command
from lightning_bpfree.cli.compare import worker as compare_worker


def run_in_process(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Run rules in this process, for starting another takes seconds; returns the list of what they are told."""
    specs: list[Any] = []

    def events(plan: dict[str, Any], contender: Any, budgets: Any, folder: Path) -> Iterator[Any]:
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / f"{contender.label}.yaml"
        config.write_text(contender.config)
        specs.append({**plan, "config": str(config), "forward_budgets": budgets})
        reported: list[Any] = []
        compare_worker.work(specs[-1], lambda kind, **fields: reported.append({"kind": kind, **fields}))
        yield from json.loads(json.dumps(reported, allow_nan=False))

    monkeypatch.setattr(command, "rule_events", events)
    return specs


def written(out: str = "out") -> Any:
    """What comparison.json holds."""
    return json.loads((Path(out) / "comparison.json").read_text())
