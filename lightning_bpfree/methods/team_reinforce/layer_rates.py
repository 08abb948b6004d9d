"""Learning rates of a team's layers, which are identified when they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bpfree.core.autograd_graph import reached
from lightning_bpfree.core.learning_rates import BlockRates
from lightning_bpfree.core.network.network_call import RefusedError


class LayerRates:
    """Factors on the optimizer's learning rate: one for the segment below each layer of units, and the output's.

    Args:
        factors: >= 0, from the first layer to the output; or one number, the factor from each layer to the next.

    Raises:
        ValueError: for a negative factor.
    """

    def __init__(self, factors: Sequence[float] | float) -> None:
        self.given = factors
        self.ratio = float(factors) if isinstance(factors, int | float) else None
        self.factors = [float(factor) for factor in ([factors] if isinstance(factors, int | float) else factors)]
        BlockRates([([], factor) for factor in self.factors])  # looks at the numbers
        self._rates: BlockRates | None = None
        self._optimizers: Sequence[torch.optim.Optimizer] = []
        self._before: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def forget(self) -> None:
        """Start again: the module may be another one."""
        self.detach()
        self._rates, self._before = None, {}

    def attach(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Listen to the steps of ``optimizers``; until the layers are known, all parameters are remembered."""
        self.detach()
        self._optimizers = list(optimizers)
        if self._rates is not None:
            self._rates.attach(self._optimizers)
            return
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._remember))

    def _remember(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._before.update({id(parameter): parameter.detach().clone() for parameter in own})

    def find(self, potentials: Sequence[Tensor]) -> None:
        """Find the parameters of each segment in the graph of its potentials, at the first call.

        That call comes from within a step of the optimizer, which is scaled too.
        """
        if self._rates is not None:
            return
        if self.ratio is not None:
            self.factors = [self.ratio**index for index in range(len(potentials))]
        if len(potentials) != len(self.factors):
            raise RefusedError(
                f"learning_rates={self.factors}: give one factor for each of the {len(potentials) - 1} layers of "
                "units, and one for the output."
            )
        pairs = [(_leaves(potential), f) for potential, f in zip(potentials, self.factors, strict=True)]
        self._rates = BlockRates(pairs)
        self.attach(self._optimizers)
        self._rates.begin(self._before)
        self._before = {}

    def detach(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._rates is not None:
            self._rates.detach()


def _leaves(potential: Tensor) -> list[nn.Parameter]:
    leaves: list[Any] = reached(potential)
    return [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]
