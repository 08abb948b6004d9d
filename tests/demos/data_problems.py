"""Numbered samples and IDX files for the tests of data modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_bpfree.demos.in_memory import InMemoryDataModule


def ready(kind: Callable[..., InMemoryDataModule], **kwargs: Any) -> InMemoryDataModule:
    data = kind(**kwargs)
    data.prepare_data()
    data.setup()
    return data
