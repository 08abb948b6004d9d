"""All pairs of cases and variants are tested; the fast set has each case in it, the variants taking turns."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def in_turn(
    cases: Iterable[Any], variants: Iterable[str], fast: int, always: Collection[tuple[str, str]] = ()
) -> list[Any]:
    """Return parameters for ``"case,variant"``: of each case, ``fast`` variants are not marked slow.

    Args:
        cases: the cases, classes or functions.
        variants: their variants.
        fast: how many of each case are in the fast set, beside those of ``always``.
        always: names of cases and variants that nothing else in the fast set stands for.
    """
    variants = list(variants)
    return [
        pytest.param(
            case,
            variant,
            id=f"{getattr(case, '__name__', case)}-{variant}",
            marks=[]
            if (j - i) % len(variants) < fast or (getattr(case, "__name__", case), variant) in always
            else pytest.mark.slow,
        )
        for i, case in enumerate(cases)
        for j, variant in enumerate(variants)
    ]
