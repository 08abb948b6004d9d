"""Detection of the floating-point types in which an evaluation computes, which may differ from Trainer's precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_HALF = (torch.float16, torch.bfloat16)
# Moving data into another type computes nothing: a batch may be stored in half precision.
_CASTS = {"to", "half", "bfloat16", "type", "type_as", "float", "double", "__get__", "clone", "detach", "view", "empty"}


class ComputedTypes(TorchFunctionMode):
    """Records whether operations return half-precision numbers.

    Attributes:
        coarsest: the coarsest half-precision type among the results, or None.

    Examples:
        >>> with ComputedTypes() as types, torch.autocast("cpu", torch.bfloat16):
        ...     _ = torch.ones(2, 2) @ torch.ones(2, 2)
        >>> types.coarsest
        torch.bfloat16
    """

    def __init__(self) -> None:
        super().__init__()
        self.coarsest: torch.dtype | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        half = isinstance(result, Tensor) and result.dtype in _HALF
        if half and self.coarsest != torch.bfloat16 and getattr(function, "__name__", "") not in _CASTS:
            self.coarsest = result.dtype
        return result
