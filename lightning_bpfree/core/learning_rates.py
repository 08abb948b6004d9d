"""Learning rates of blocks, as factors on the step of any optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


class BlockRates:
    """Scales the change that an optimizer step makes to each parameter.

    For optimizers whose step is proportional to the learning rate (SGD with momentum, Adam, AdamW), this is equivalent
    to a separate learning rate, which follows the scheduler of the common one.

    Args:
        factors: parameters with the factor on their learning rate, >= 0.

    Raises:
        ValueError: for a negative factor.

    Examples:
        >>> w = nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([w], lr=1.0)
        >>> BlockRates([([w], 0.5)]).attach([optimizer])
        >>> w.grad = torch.ones(1)
        >>> optimizer.step()
        >>> w.item()
        -0.5
    """

    def __init__(self, factors: Sequence[tuple[Sequence[nn.Parameter], float]]) -> None:
        for _, factor in factors:
            if not 0 <= factor < float("inf"):
                raise ValueError(f"learning_rates: a factor of {factor}; give numbers of at least 0.")
        found: dict[int, tuple[nn.Parameter, float]] = {}
        for listed, factor in factors:
            for parameter in listed:
                if found.setdefault(id(parameter), (parameter, factor))[1] != factor:
                    raise ValueError("learning_rates: a weight that two blocks share has two factors; give them one.")
        self.factors = [(parameter, factor) for parameter, factor in found.values() if factor != 1]
        self._before: list[torch.Tensor] = []
        self._handles: list[Any] = []

    def attach(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Scale the steps of ``optimizers``, and of no others."""
        self.detach()
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._remember))
            self._handles.append(optimizer.register_step_post_hook(self._scale))

    def detach(self) -> None:
        """Stop scaling."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin(self, before: Mapping[int, torch.Tensor]) -> None:
        """Also scale the step in progress, given the parameters before it by their ids."""
        self._before = [before[id(parameter)] for parameter, _ in self.factors if id(parameter) in before]
        if len(self._before) != len(self.factors):  # no step is under way
            self._before = []

    def _remember(self, *_: Any) -> None:
        self._before = [parameter.detach().clone() for parameter, _ in self.factors]

    @torch.no_grad()
    def _scale(self, *_: Any) -> None:
        if not self._before:
            return
        for (parameter, factor), before in zip(self.factors, self._before, strict=True):
            parameter.copy_(before + factor * (parameter - before))
        self._before = []
