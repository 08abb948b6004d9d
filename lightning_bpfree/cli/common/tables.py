"""Human-readable output: one console, and numbers of sensible length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 120  # columns where there is no terminal to ask: 80, the usual guess, breaks the tables


def console() -> Console:
    """Return a console that writes to the standard output."""
    from rich.console import Console

    made = Console()
    return made if made.is_terminal else Console(width=PIPED_WIDTH)


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with ``digits`` significant digits, thousands separated; a dash for None and NaN.

    Examples:
        >>> number(0.91234), number(1234567.0), number(None)
        ('0.912', '1,234,567', '-')
    """
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1.

    Examples:
        >>> counted(1, "seed"), counted(3, "seed")
        ('1 seed', '3 seeds')
    """
    return f"{count} {noun}" + "s" * (count != 1)
