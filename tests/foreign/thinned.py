"""All pairs of cases and variants are tested; the fast set has each case in it, the variants taking turns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def in_turn(cases: Iterable[Any], variants: Iterable[str], fast: int) -> list[Any]:
    """Return parameters for ``"case,variant"``: of each case, ``fast`` variants are not marked slow."""
    variants = list(variants)
    return [
        pytest.param(
            case,
            variant,
            id=f"{getattr(case, '__name__', case)}-{variant}",
            marks=[] if (j - i) % len(variants) < fast else pytest.mark.slow,
        )
        for i, case in enumerate(cases)
        for j, variant in enumerate(variants)
    ]
