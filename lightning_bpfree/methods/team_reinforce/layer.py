"""One layer of units in one forward pass, and the inputs and outputs of the network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bpfree.methods.team_reinforce.units.exploration import Drawn
from lightning_bpfree.methods.team_reinforce.units.stochastic import Softmax, StochasticUnit


@dataclass
class Layer:
    """One layer of units in one forward pass.

    Args:
        name: name of the module in whose place the units are; with a number from its second call on.
        unit: what the units are.
        potential: what enters them, ``(rows, ...)``, with the graph of the segment below and no more.
        value: what they gave, cut off from the graph.
        drawn: how it was drawn; None for values that were set.
        linear: the ``nn.Linear`` that made the potentials, ``(rows, n)``, if they come straight from one.
        below: what entered it.
        chained: whether that was the value of the layer before.
        returned: of the output, what the network returned around the potential.
    """

    name: str
    unit: StochasticUnit
    potential: Tensor
    value: Tensor = field(default_factory=lambda: torch.empty(0))
    drawn: Drawn | None = None
    linear: nn.Linear | None = None
    below: Tensor | None = None
    chained: bool = False
    returned: Any = None

    def score(self) -> Tensor:
        """Return the derivative of the log probability of the value by the potential."""
        if self.drawn is not None:
            return self.drawn.score
        return self.unit.score(self.potential.detach(), self.value.detach())


def as_input(layer: Layer, value: Tensor) -> Tensor:
    """Return values as the network takes them: cut off, and of its type unless autocast sees to that."""
    value = value.detach()
    cast = value.dtype != layer.potential.dtype and not torch.is_autocast_enabled(value.device.type)
    return value.to(layer.potential.dtype) if cast else value


def averaged(output: Tensor, copies: int, unit: StochasticUnit | None) -> Tensor:
    """Return the output for the network's callers: the mean action over ``copies`` concatenated batches.

    For a softmax these are scores: the logarithm of the mean probability, and the logits as they are for one copy.
    """
    if isinstance(unit, Softmax):
        if copies == 1:
            return output
        chances = unit.mean(output.view(copies, -1, *output.shape[1:])).mean(0)
        return unit.temperature * chances.clamp(min=torch.finfo(chances.dtype).tiny).log()
    seen = output if unit is None else unit.mean(output)
    return seen if copies == 1 else seen.view(copies, -1, *seen.shape[1:]).mean(0)
