"""A configuration that trains in a fraction of a second, and a place where the commands may write."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from base_files import DIGITS, MODEL
from ticket_problems import write_parts

Overlay = Callable[..., str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the test; commands put it on the path, from which it must go again."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def base(folder: Path) -> str:
    """A base configuration without a rule."""
    (folder / "base.yaml").write_text(MODEL + DIGITS)
    return "base.yaml"


@pytest.fixture
def digits(folder: Path) -> str:
    """A base configuration without a rule and without a model."""
    (folder / "digits.yaml").write_text(DIGITS)
    return "digits.yaml"


@pytest.fixture
def overlay(folder: Path) -> Overlay:
    """Writes overlays that add callbacks, and returns their names."""

    def write(name: str, class_path: str, **init_args: object) -> str:
        arguments = ", ".join(f"{key}: {value}" for key, value in init_args.items())
        text = f"trainer: {{callbacks+: [{{class_path: {class_path}, init_args: {{{arguments}}}}}]}}\n"
        (folder / name).write_text(text)
        return name

    return write


@pytest.fixture
def parts(folder: Path) -> None:
    """A study of tickets and an overlay in the current folder."""
    write_parts()
