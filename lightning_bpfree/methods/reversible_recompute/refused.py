"""What a reversible stack cannot do, as the error that Lightning raises for configurations."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException


class RefusedStackError(MisconfigurationException, ValueError, RuntimeError):
    """A reversible stack cannot recompute what runs in it, or what it is given; the message names the cure."""
