"""The script that writes results into pages, at work in a folder of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def make_results() -> Any:
    specification = importlib.util.spec_from_file_location("make_results", DOCS / "make_results.py")
    assert specification is not None
    assert specification.loader is not None
    made = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(made)
    return made


def pages_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    """The script with `folder` in the repository's place, and the pages' folder in it."""
    made, docs = make_results(), folder / "docs"
    for name, place in {"DOCS": docs, "RESULTS": docs / "results", "IMAGES": docs / "img"}.items():
        place.mkdir(exist_ok=True)
        monkeypatch.setattr(made, name, place)
    return made, docs
