"""MAP propagation: hidden values climb before they learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_bpfree.nn.map_propagation import ascend_chain, ascent_direction
from lightning_bpfree.nn.stochastic import Gaussian, StochasticUnit
from lightning_bpfree.rules.team.credit import Credit
from lightning_bpfree.rules.team.layer import Layer
from lightning_bpfree.rules.team.sums import Gradients, by_signals, over_units
from lightning_bpfree.rules.team.training_pass import TeamPass


class MapPropagation(Credit):
    """Hidden values move to where they are most probable given what was done, before REINFORCE: MAP propagation.

    With the action held, hidden layers climb the log probability of all draws, all at once from their old values, each
    by what it and the next layer say. At the maximum the update is that of backprop through the reparametrised network.

    Args:
        steps: of the ascent, >= 0; 0 is REINFORCE.
        step_size: times the variance of each layer, > 0; the paper: 0.5.
        gate: for one real output and a known target: the output learns by the delta rule, and hidden layers by their
            deviation times the ratio of the target's deviation from the mean and the draw's (regression).
        guard: least size of the draw's deviation that the gate divides by, in standard deviations.

    Raises:
        ValueError: for arguments out of range.

    References:
        S. Chung, "MAP Propagation Algorithm: Faster Learning with a Team of Reinforcement Learning Agents", 2020,
        arXiv 2010.07893.
    """

    def __init__(self, steps: int = 20, step_size: float = 0.5, gate: bool = False, guard: float = 0.1) -> None:
        if steps < 0:
            raise ValueError(f"steps={steps}: give at least 0, which is REINFORCE.")
        if not 0 < step_size < float("inf"):
            raise ValueError(f"step_size={step_size!r}: give a positive number; the paper's is 0.5.")
        if not guard > 0:
            raise ValueError(f"guard={guard!r}: give a positive number of standard deviations.")
        self.steps, self.step_size, self.gate, self.guard = steps, step_size, gate, guard
        self.backward_cost = 1.0 + 2.0 * steps

    def check(self, units: Sequence[StochasticUnit], output: StochasticUnit | None) -> None:
        """Refuse hidden units without a density to climb, and an output without an action."""
        if not all(isinstance(unit, Gaussian) for unit in units):
            raise ValueError("credit='map_propagation': hidden values climb a density; use unit='gaussian'.")
        if output is None:
            raise ValueError("credit='map_propagation': the action is held while values climb; output=None draws none.")
        if self.gate and not isinstance(output, Gaussian):
            raise ValueError("credit=MapPropagation(gate=True): the gate is for regression, output='gaussian'.")

    def ascend(self, work: TeamPass) -> None:
        """Move the hidden values of a pass."""
        values = [layer.value.detach() for layer in work.layers[:-1]]
        if self.steps and work.is_chain:
            with torch.autocast(values[0].device.type, enabled=False):
                values = ascend_chain(work.layers, self.steps, self.step_size)
            work.set_values(values)
            return
        for _ in range(self.steps):
            values = [value.detach().requires_grad_() for value in values]
            work.set_leaves(values)
            directions = ascent_direction(work.layers, values)
            moved = []
            for layer, value, direction in zip(work.layers, values, directions, strict=False):
                moved.append(value.detach() + self.step_size * _variance(layer) * direction)
            values = moved
        work.set_values(values)

    def gradients(
        self, work: TeamPass, advantages: Sequence[Tensor], parameters: Sequence[Tensor], by_output: Tensor | None
    ) -> Gradients:
        """Return REINFORCE's gradients at the values that the ascent leads to."""
        self.ascend(work)
        *hidden, last = work.layers
        target = self._target(work) if self.gate else last.value
        weights = [self._gated(last, target)] * len(hidden) if self.gate else advantages
        signals: list[Tensor] = []
        for layer, weight in zip(hidden, weights, strict=False):
            score = layer.score()
            signals.append(over_units(weight, score) * score)
        score = last.unit.score(last.potential.detach(), target)
        signals.append(score if self.gate else over_units(advantages[-1], score) * score)
        return by_signals(signals, work.layers, parameters)

    def _target(self, work: TeamPass) -> Tensor:
        batch, rows = work.step.args[0] if work.step.args else None, len(work.layers[-1].potential)
        target = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
        if not isinstance(target, Tensor) or target.numel() * work.num_samples != rows:
            found = f"a target of shape {tuple(target.shape)}" if isinstance(target, Tensor) else "no pair"
            raise ValueError(
                f"credit=MapPropagation(gate=True): the batch has {found}; give pairs (inputs, targets) with one "
                "number a sample."
            )
        value: Tensor = target.reshape(-1).repeat(work.num_samples).view(rows, 1)
        return value.to(work.layers[-1].value.dtype)

    def _gated(self, last: Layer, target: Tensor) -> Tensor:
        """Return what takes the advantage's place: deviation of the target over that of the draw."""
        assert isinstance(last.unit, Gaussian)
        if last.potential.dim() != 2 or last.potential.shape[1] != 1:
            raise ValueError(
                f"credit=MapPropagation(gate=True): the output has shape {tuple(last.potential.shape)}; the gate is "
                "defined for one number a sample."
            )
        with torch.no_grad():
            mean = last.unit.mean(last.potential)
            drawn, least = last.value - mean, self.guard * last.unit.variance**0.5
            guarded = torch.where(drawn < 0, -1.0, 1.0) * drawn.abs().clamp(min=least)
            return ((target - mean) / guarded).flatten()


def _variance(layer: Layer) -> float:
    assert isinstance(layer.unit, Gaussian)
    return layer.unit.variance
