"""How a reward becomes a gradient for every layer of a team of stochastic units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_bpfree.nn.map_propagation import ascend_chain, ascent_direction
from lightning_bpfree.nn.stochastic import Gaussian, StochasticUnit
from lightning_bpfree.rules.team_network import Layer
from lightning_bpfree.rules.team_pass import TeamPass

Gradients = list[Tensor | None]


class Credit(ABC):
    """How much of the reward every unit is given."""

    leaves: ClassVar[bool] = False
    """Whether values have to collect derivatives by what is above them."""
    backward_cost: float = 1.0
    """What it costs beside the forward pass of every draw, in forward passes."""

    def check(self, units: Sequence[StochasticUnit], output: StochasticUnit | None) -> None:  # noqa: B027  # optional
        """Raise ValueError if it is not defined for such units."""

    @abstractmethod
    def gradients(
        self, work: TeamPass, advantages: Sequence[Tensor], parameters: Sequence[Tensor], by_output: Tensor | None
    ) -> Gradients:
        """Return the gradient of the mean reward, an estimate, by each of ``parameters``; None where it is not reached.

        Args:
            work: the pass that the reward is for.
            advantages: of every layer, the output included, ``(rows,)``.
            parameters: what is trained.
            by_output: derivative of the rewards by the output, if that is not drawn.
        """


def by_signals(signals: Sequence[Tensor], layers: Sequence[Layer], parameters: Sequence[Tensor]) -> Gradients:
    """Return what signals on potentials amount to in parameters; every segment is differentiated by itself."""
    rows, total = len(signals[0]), Sums(parameters)
    for layer, signal in zip(layers, signals, strict=True):
        total.add(layer, signal / rows, [])
    return total.gradients


class Sums:
    """Gradients of parameters, collected segment by segment.

    Args:
        parameters: what is trained.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.places = {id(parameter): place for place, parameter in enumerate(parameters)}
        self.gradients: Gradients = [None] * len(self.parameters)

    def add(self, layer: Layer, signal: Tensor, values: Sequence[Tensor]) -> Gradients:
        """Add what a signal on a layer's potentials amounts to, and return its derivative by ``values``.

        Args:
            layer: the layer.
            signal: shaped like its potentials.
            values: of layers below, in their order; what is asked for.
        """
        if not layer.potential.requires_grad:
            return [None] * len(values)
        if layer.linear is not None and (layer.chained or not layer.below.requires_grad):  # type: ignore[union-attr]
            return self._add_linear(layer, signal, len(values))
        # Segments may share a graph (a residual stream), which ends with the potentials in any case.
        found = torch.autograd.grad(
            layer.potential,
            [*values, *self.parameters],
            signal.to(layer.potential.dtype),
            allow_unused=True,
            retain_graph=True,
        )
        for place, gradient in enumerate(found[len(values) :]):
            self._add(place, gradient)
        return list(found[: len(values)])

    @torch.no_grad()
    def _add_linear(self, layer: Layer, signal: Tensor, num_values: int) -> Gradients:
        """Do the same by products of matrices: autograd takes several times as long for small ones."""
        linear, below = layer.linear, layer.below
        assert linear is not None
        assert below is not None
        signal = signal.to(torch.promote_types(linear.weight.dtype, torch.float32))
        with torch.autocast(signal.device.type, enabled=False):
            return self._products(linear, below, signal, layer.chained, num_values)

    def _products(self, linear: nn.Linear, below: Tensor, signal: Tensor, chained: bool, num_values: int) -> Gradients:
        if id(linear.weight) in self.places:
            self._add(self.places[id(linear.weight)], signal.T @ below.detach().to(signal.dtype))
        if linear.bias is not None and id(linear.bias) in self.places:
            self._add(self.places[id(linear.bias)], signal.sum(0))
        said: Gradients = [None] * num_values
        if chained and num_values:
            said[-1] = signal @ linear.weight.to(signal.dtype)
        return said

    def _add(self, place: int, gradient: Tensor | None) -> None:
        self.gradients[place] = _added(self.gradients[place], gradient)


def over_units(advantage: Tensor, like: Tensor) -> Tensor:
    """Return numbers ``(rows,)`` in a shape that multiplies ``like``, ``(rows, ...)``."""
    return advantage.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def output_signal(last: Layer, advantage: Tensor, by_output: Tensor | None) -> Tensor:
    """Return the derivative of the reward by the output, estimated or, where the output is not drawn, exact."""
    if by_output is not None:
        return by_output
    score = last.score()
    return over_units(advantage, score) * score


class GlobalReward(Credit):
    """Every unit is given the whole reward: REINFORCE, unbiased for any baseline that knows no more than its input.

    References:
        R. J. Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning",
        1992.
    """

    def gradients(
        self, work: TeamPass, advantages: Sequence[Tensor], parameters: Sequence[Tensor], by_output: Tensor | None
    ) -> Gradients:
        """Return advantage times score, per layer."""
        *hidden, last = work.layers
        signals = []
        for layer, advantage in zip(hidden, advantages, strict=False):
            score = layer.score()
            signals.append(over_units(advantage, score) * score)
        signals.append(output_signal(last, advantages[-1], by_output))
        return by_signals(signals, work.layers, parameters)


class TopDown(Credit):
    """Signals that go down layer by layer, each made of what the layer above says of its input."""

    leaves: ClassVar[bool] = True
    backward_cost = 2.0

    @abstractmethod
    def signal(self, layer: Layer, said: Tensor, above: Layer, reward: Tensor) -> Tensor:
        """Return the signal on a layer's potentials.

        Args:
            layer: the layer.
            said: derivative by the layer's values of what is above them, given its signals.
            above: the next layer.
            reward: advantages, ``(rows,)``.
        """

    def gradients(
        self, work: TeamPass, advantages: Sequence[Tensor], parameters: Sequence[Tensor], by_output: Tensor | None
    ) -> Gradients:
        """Return gradients of all segments, differentiated one by one from the top."""
        layers, rows, total = work.layers, len(advantages[-1]), Sums(parameters)
        said: Gradients = [None] * len(layers)
        signal: Tensor | None = output_signal(layers[-1], advantages[-1], by_output) / rows
        for index in range(len(layers) - 1, -1, -1):
            layer = layers[index]
            if index < len(layers) - 1:
                above = said[index]
                signal = None if above is None else self.signal(layer, above, layers[index + 1], advantages[-1])
            if signal is None:
                continue
            for place, gradient in enumerate(total.add(layer, signal, [lower.value for lower in layers[:index]])):
                said[place] = _added(said[place], gradient)
        return total.gradients


def _added(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old + new


class WeightMax(TopDown):
    """A hidden unit is rewarded by how much its outgoing weights grow: Weight Maximization.

    The reward of unit ``i`` is ``sum_j W_ji dW_ji`` over its outgoing weights and their present updates: ``h_i`` times
    the derivative of the layer above by it. Exact if the expected reward is affine in every unit, **biased** otherwise,
    with far less variance than :class:`GlobalReward`. (The published rule has a factor 2 a layer, left out here.)

    Args:
        exact: reward a unit by the reward times one minus the ratio of the probabilities of what the next layer drew
            without and with the unit, which is unbiased. Needs one ``nn.Linear`` between layers; costs a number for
            each sample and weight.

    References:
        S. Chung, "Learning by Competition of Self-Interested Reinforcement Learning Agents", 2020, arXiv 2010.09770.
        S. Chung, "Unbiased Weight Maximization", 2023, arXiv 2307.13270 (the exact form here is derived anew).
    """

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact

    def check(self, units: Sequence[StochasticUnit], output: StochasticUnit | None) -> None:
        """Refuse the exact form where the output draws nothing."""
        if self.exact and output is None:
            raise ValueError(
                "credit=WeightMax(exact=True): the ratio is one of probabilities of actions, and output=None draws "
                "none. Use output='softmax', or exact=False."
            )

    def signal(self, layer: Layer, said: Tensor, above: Layer, reward: Tensor) -> Tensor:
        """Return the unit's own reward times its score."""
        value = layer.value.detach()
        own = over_units(reward, value) / len(reward) * without(above, value) if self.exact else value * said
        return own * layer.score()


def without(above: Layer, value: Tensor) -> Tensor:
    """Return ``1 - P(draw above | unit i silent) / P(draw above)`` for every unit below, ``(rows, n)``."""
    if above.linear is None or not above.chained or above.potential.dim() != 2:
        raise ValueError(
            f"credit=WeightMax(exact=True): between {above.name} and the units below must be one nn.Linear and nothing "
            "else. Use exact=False for other networks."
        )
    potential, drawn = above.potential.detach(), above.value.detach()
    with torch.no_grad():
        silent = potential[:, None, :] - value[:, :, None] * above.linear.weight.T  # (rows, n, units above)
        rows, units = value.shape
        many = drawn[:, None, :].expand_as(silent).reshape(rows * units, -1)
        ratio = above.unit.log_prob(silent.reshape(rows * units, -1), many).view(rows, units)
        return -torch.expm1(ratio - above.unit.log_prob(potential, drawn)[:, None])


class StraightThrough(TopDown):
    """Backprop that takes the draw for its mean: the straight-through estimator. **Biased**, and no local rule.

    Args:
        derivative: what a draw counts as differentiated by its potential: ``"mean"``, the slope of the mean
            (``p (1 - p)``), or ``"identity"``, 1.

    References:
        Y. Bengio, N. Leonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for
        Conditional Computation", 2013, arXiv 1308.3432.
    """

    def __init__(self, derivative: Literal["mean", "identity"] = "mean") -> None:
        if derivative not in ("mean", "identity"):
            raise ValueError(f"derivative={derivative!r}: choose 'mean' or 'identity'.")
        self.derivative = derivative

    def check(self, units: Sequence[StochasticUnit], output: StochasticUnit | None) -> None:
        """Refuse units whose draws have a derivative."""
        if not all(unit.discrete for unit in units):
            raise ValueError("credit='ste': draws of Gaussian units have a derivative; use credit='pathwise'.")

    def signal(self, layer: Layer, said: Tensor, above: Layer, reward: Tensor) -> Tensor:
        """Return what backprop says of the values, times the slope."""
        return said if self.derivative == "identity" else said * layer.unit.derivative(layer.potential.detach())


class Pathwise(TopDown):
    """Backprop through the draws of Gaussian units, by reparametrisation: exact, and no local rule."""

    def check(self, units: Sequence[StochasticUnit], output: StochasticUnit | None) -> None:
        """Refuse units whose draws have no derivative."""
        if not all(isinstance(unit, Gaussian) for unit in units):
            raise ValueError("credit='pathwise': draws of discrete units have no derivative; use credit='ste'.")

    def signal(self, layer: Layer, said: Tensor, above: Layer, reward: Tensor) -> Tensor:
        """Return what backprop says of the values, times the slope of the mean."""
        return said * layer.unit.derivative(layer.potential.detach())


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
                moved.append(value.detach() + self.step_size * layer.unit.variance * direction)  # type: ignore[operator]
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
            score = layer.unit.score(layer.potential.detach(), layer.value.detach())
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


CREDITS: dict[str, Any] = {
    "reward": GlobalReward,
    "weight_max": WeightMax,
    "map_propagation": MapPropagation,
    "ste": StraightThrough,
    "pathwise": Pathwise,
}
