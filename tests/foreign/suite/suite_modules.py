"""All modules of the suite, by name."""

# ruff: noqa: F401
import suite_batches
import suite_hooks
import suite_layers
import suite_lightning
import suite_state
import suite_steps
import suite_transformers
from suite_base import CASES

__all__ = ["CASES"]
