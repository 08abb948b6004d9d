"""Refusals of a reversible stack, as Lightning's error for invalid configurations."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException


class RefusedStackError(MisconfigurationException, ValueError, RuntimeError):
    """A reversible stack cannot recompute its layers, or its inputs; the message says how to fix it."""
