"""The type in which a loss is computed, and the smallest perturbation that it resolves."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

# A difference quotient loses its digits where sigma nears the rounding of the weights: this bound lets sigma = 1e-4
# through in float32 and stops 1e-3 in bfloat16, where the quotient is 20 % off.
_SAFETY = 0.1


def smallest_sigma(dtype: torch.dtype) -> float:
    """Return the smallest perturbation that survives rounding in ``dtype``: ``0.1 sqrt(eps)``.

    Examples:
        >>> round(smallest_sigma(torch.bfloat16), 4)
        0.0088
    """
    return float(_SAFETY * torch.finfo(dtype).eps ** 0.5)


def computed_in(trainer: pl.Trainer, module: pl.LightningModule) -> torch.dtype:
    """Return the floating-point type in which the module computes its loss, including autocast."""
    precision = str(trainer.precision)
    for mark, dtype in (("bf16", torch.bfloat16), ("16", torch.float16), ("64", torch.float64)):
        if precision.startswith(mark):
            return dtype
    return next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.float32)
