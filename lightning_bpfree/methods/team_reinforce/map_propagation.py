"""MAP propagation: hidden values ascend their log probability before the update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import NonNegativeInt, PositiveFloat, checked
from lightning_bpfree.core.network.network_call import RefusedError
from lightning_bpfree.methods.team_reinforce.credit import Credit
from lightning_bpfree.methods.team_reinforce.layer import Layer
from lightning_bpfree.methods.team_reinforce.segment_gradients import Gradients, by_signals, over_units
from lightning_bpfree.methods.team_reinforce.training_pass import TeamPass
from lightning_bpfree.methods.team_reinforce.units.stochastic import Gaussian, StochasticUnit


class MapPropagation(Credit):
    """MAP propagation: before REINFORCE, hidden values move to their most probable values given the action.

    With the action fixed, all hidden layers ascend the log probability of all draws at once, using the terms of their
    own and of the next layer. At the maximum, the update equals backprop through the reparameterized network.

    Args:
        steps: steps of the ascent, >= 0; 0 is REINFORCE.
        step_size: step size, multiplied by the variance of each layer, > 0; the paper: 0.5.
        gate: for one real output and a known target (regression): the output learns by the delta rule, and hidden
            layers by their deviation times the ratio of the target's to the draw's deviation from the mean.
        guard: lower bound on the draw's deviation that the gate divides by, in standard deviations.

    Raises:
        ValueError: for arguments out of range.

    References:
        S. Chung, "MAP Propagation Algorithm: Faster Learning with a Team of Reinforcement Learning Agents", 2020,
        arXiv 2010.07893.
    """

    @checked
    def __init__(
        self,
        steps: NonNegativeInt = 20,
        step_size: PositiveFloat = 0.5,
        gate: bool = False,
        guard: PositiveFloat = 0.1,
    ) -> None:
        if guard != 0.1 and not gate:
            raise ValueError(f"MapPropagation: guard={guard} needs gate=True: leave guard out, or pass gate=True.")
        self.steps, self.step_size, self.gate, self.guard = steps, step_size, gate, guard

    @property
    def backward_cost(self) -> float:
        """Additional cost per draw, in forward passes."""
        return 1.0 + 2.0 * self.steps

    def check(self, units: Sequence[StochasticUnit], output: StochasticUnit | None) -> None:
        """Refuse hidden units without a density, and an output without an action."""
        if not all(isinstance(unit, Gaussian) for unit in units):
            raise ValueError("credit='map_propagation': hidden values ascend a density; use unit='gaussian'.")
        if output is None:
            raise ValueError(
                "credit='map_propagation': it needs an action, but output=None draws none. Use output='softmax'."
            )
        if self.gate and not isinstance(output, Gaussian):
            raise ValueError("credit=MapPropagation(gate=True): the gate is for regression, output='gaussian'.")

    def ascend(self, work: TeamPass) -> None:
        """Move the hidden values of a pass by the ascent."""
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
        """Return REINFORCE's gradients at the values after the ascent."""
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
            raise RefusedError(
                f"credit=MapPropagation(gate=True): the batch has {found}; give pairs (inputs, targets) with one "
                "number a sample."
            )
        value: Tensor = target.reshape(-1).repeat(work.num_samples).view(rows, 1)
        return value.to(work.layers[-1].value.dtype)

    def _gated(self, last: Layer, target: Tensor) -> Tensor:
        """Return what takes the advantage's place: deviation of the target over that of the draw."""
        assert isinstance(last.unit, Gaussian)
        if last.potential.dim() != 2 or last.potential.shape[1] != 1:
            raise RefusedError(
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


class Drawable(Protocol):
    """A layer of units, as the ascent sees it: what it is, what enters it, what it gave, what is below."""

    unit: StochasticUnit
    potential: Tensor
    value: Tensor
    linear: nn.Linear | None


def ascent_direction(layers: Sequence[Any], values: Sequence[Tensor]) -> list[Tensor]:
    """Return the derivative of the log probability of all layers by each of ``values``.

    Args:
        layers: layers of units, and the output; their potentials follow from ``values``, by a graph.
        values: values of the layers of units, leaves that require a gradient.
    """
    given = [*values, layers[-1].value]
    terms = [layer.unit.log_prob(layer.potential, value).sum() for layer, value in zip(layers, given, strict=True)]
    total = torch.stack([term.to(terms[0].dtype) for term in terms]).sum()
    return list(torch.autograd.grad(total, list(values)))


@torch.no_grad()
def ascend_chain(layers: Sequence[Drawable], steps: int, step_size: float) -> list[Tensor]:
    """Return hidden values after the ascent, where one linear layer lies between any two layers.

    All layers move at once from their old values: ``h += step_size * variance * derivative``, with the derivative of
    the log probability of the layer itself, ``(mean - h) / variance``, and of the next layer, whose score comes down
    through the weights between them.

    Args:
        layers: Gaussian ones, and the output, whose value is held.
        steps: how many.
        step_size: times the variance of each layer.
    """
    *hidden, last = layers
    values = [layer.value.detach().to(torch.promote_types(layer.value.dtype, torch.float32)) for layer in hidden]
    first = hidden[0].unit.mean(layers[0].potential.detach()).to(values[0].dtype)
    down, up = _scaled_weights(hidden, last, step_size)
    # The mean of the first layer stays, so that its values are linear in what has come down to it. They are not needed
    # before the end: the potentials above them move by a product that has the size of the second layer alone.
    weight, bias = up[0]
    field, kept = torch.addmm(bias, values[0], weight), 1 - step_size
    drift, back = torch.addmm(bias, first, weight).mul_(step_size), down[0] @ weight
    total = torch.zeros_like(field)
    for _ in range(steps):
        said, values = _moved(layers, values, field, down, up, step_size)
        total = torch.add(said, total, alpha=kept)
        field = torch.addmm(drift, said, back).add_(field, alpha=kept)
    left = kept**steps
    start = torch.lerp(first, values[0], left)
    return [torch.addmm(start, total, down[0]), *values[1:]]


def _moved(
    layers: Sequence[Drawable],
    values: list[Tensor],
    field: Tensor,
    down: list[Tensor],
    up: list[tuple[Tensor, Tensor]],
    step_size: float,
) -> tuple[Tensor, list[Tensor]]:
    """Return what the second layer says to the first, and the values after a step, but for the first layer's."""
    moved, to_first = list(values), field
    for index, layer in enumerate(layers[1:], 1):
        if index > 1:
            weight, bias = up[index - 1]
            field = torch.addmm(bias, values[index - 1], weight)
        unit, is_last = layer.unit, index == len(values)
        value = layer.value if is_last else values[index]
        if isinstance(unit, Gaussian):
            deviation = value - unit.mean(field)
            if not is_last:
                moved[index] = torch.sub(value, deviation, alpha=step_size)
            said = deviation.mul_(unit.derivative(field))
        else:
            said = value - unit.mean(field)
        if index == 1:
            to_first = said
        else:
            moved[index - 1] = torch.addmm(moved[index - 1], said, down[index - 1])
    return to_first, moved


def _scaled_weights(
    hidden: Sequence[Drawable], last: Drawable, step_size: float
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Return weights that bring a layer's deviations down, with all factors, and those that make its potentials."""
    down, up = [], []
    for below, above in zip(hidden, [*hidden[1:], last], strict=True):
        assert above.linear is not None
        assert isinstance(below.unit, Gaussian)
        unit, weight = above.unit, above.linear.weight.detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        factor = 1 / unit.variance if isinstance(unit, Gaussian) else unit.scale
        down.append(weight * (step_size * below.unit.variance * factor))
        bias = above.linear.bias
        up.append((weight.T, weight.new_zeros(len(weight)) if bias is None else bias.detach().to(weight.dtype)))
    return down, up
