"""Training rules for any LightningModule: with, around and without backprop.

>>> import lightning_bpfree as bpf
>>> bpf.ForwardGradient(num_directions=4).num_directions
4
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_bpfree.public import *  # noqa: F403

__version__ = "0.1.0"

if not TYPE_CHECKING:  # type checkers would take any name for granted

    def __getattr__(name: str) -> Any:
        """Return a public name.

        The first use imports all of them, with torch and Lightning. A bare import of the package takes milliseconds, so
        that ``bpfree --version`` and ``bpfree recipes list`` answer at once.
        """
        if not name.startswith("_"):
            exported = _exported()
            globals().update(exported)
            if name in exported:
                return exported[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """Return all public names."""
        return sorted([*_exported(), "__version__"])

    def _exported() -> dict[str, Any]:
        public = import_module(f"{__name__}.public")
        return {name: value for name, value in vars(public).items() if not name.startswith("_")}
