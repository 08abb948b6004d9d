"""Credit assignment: the gradient of every layer of a team of stochastic units, from a reward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import checked
from lightning_bpfree.core.network.network_call import RefusedError
from lightning_bpfree.core.params import added
from lightning_bpfree.methods.team_reinforce.layer import Layer
from lightning_bpfree.methods.team_reinforce.segment_gradients import Gradients, Sums, by_signals, over_units
from lightning_bpfree.methods.team_reinforce.training_pass import TeamPass
from lightning_bpfree.methods.team_reinforce.units.stochastic import Gaussian, StochasticUnit


class Credit(ABC):
    """Assigns a reward to every unit."""

    leaves: ClassVar[bool] = False
    """Whether values need derivatives of the layers above."""

    @property
    def backward_cost(self) -> float:
        """Additional cost per draw, in forward passes."""
        return 1.0

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
            parameters: the trained parameters.
            by_output: derivative of the rewards by the output, if that is not drawn.
        """


def output_signal(last: Layer, advantage: Tensor, by_output: Tensor | None) -> Tensor:
    """Return the derivative of the reward by the output, estimated or, where the output is not drawn, exact."""
    if by_output is not None:
        return by_output
    score = last.score()
    return over_units(advantage, score) * score


class GlobalReward(Credit):
    """Every unit gets the whole reward: REINFORCE, unbiased for any baseline that depends only on the unit's input.

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
    """Signals that are passed down layer by layer, each computed by the layer above."""

    leaves: ClassVar[bool] = True

    @property
    def backward_cost(self) -> float:
        """Additional cost per draw, in forward passes."""
        return 2.0

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
                said[place] = added(said[place], gradient)
        return total.gradients


class WeightMax(TopDown):
    """Weight Maximization: a hidden unit is rewarded for the growth of its outgoing weights.

    The reward of unit ``i`` is ``sum_j W_ji dW_ji`` over its outgoing weights and their current updates: ``h_i`` times
    the derivative of the layer above with respect to it. It is exact if the expected reward is affine in every unit and
    **biased** otherwise, with far less variance than :class:`GlobalReward`. (The published rule has a factor 2 per
    layer, which is omitted here.)

    Args:
        exact: reward a unit with the reward times ``1 - p0 / p1``, where ``p1`` and ``p0`` are the probabilities of the
            next layer's draw with and without the unit. This is unbiased. Needs one ``nn.Linear`` between layers;
            costs one number per sample and weight.

    References:
        S. Chung, "Learning by Competition of Self-Interested Reinforcement Learning Agents", 2020, arXiv 2010.09770.
        S. Chung, "Unbiased Weight Maximization", 2023, arXiv 2307.13270 (the exact form here is a new derivation).
    """

    @checked
    def __init__(self, exact: bool = False) -> None:
        self.exact = exact

    def check(self, units: Sequence[StochasticUnit], output: StochasticUnit | None) -> None:
        """Refuse the exact form if the output draws nothing."""
        if self.exact and output is None:
            raise RefusedError(
                "credit=WeightMax(exact=True): it needs probabilities of actions, but output=None draws "
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
        raise RefusedError(
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
    """The straight-through estimator: backprop that treats a draw as its mean. **Biased**, and not a local rule.

    Args:
        derivative: the derivative of a draw with respect to its potential: ``"mean"``, the slope of the mean
            (``p (1 - p)``), or ``"identity"``, 1.

    References:
        Y. Bengio, N. Leonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for
        Conditional Computation", 2013, arXiv 1308.3432.
    """

    @checked
    def __init__(self, derivative: Literal["mean", "identity"] = "mean") -> None:
        self.derivative = derivative

    def check(self, units: Sequence[StochasticUnit], output: StochasticUnit | None) -> None:
        """Refuse units whose draws have a derivative."""
        if not all(unit.discrete for unit in units):
            raise ValueError("credit='ste': draws of Gaussian units have a derivative; use credit='pathwise'.")

    def signal(self, layer: Layer, said: Tensor, above: Layer, reward: Tensor) -> Tensor:
        """Return backprop's derivative of the values, times the slope."""
        return said if self.derivative == "identity" else said * layer.unit.derivative(layer.potential.detach())


class Pathwise(TopDown):
    """Backprop through the draws of Gaussian units, by reparameterization: exact, and no local rule."""

    def check(self, units: Sequence[StochasticUnit], output: StochasticUnit | None) -> None:
        """Refuse units whose draws have no derivative."""
        if not all(isinstance(unit, Gaussian) for unit in units):
            raise ValueError("credit='pathwise': draws of discrete units have no derivative; use credit='ste'.")

    def signal(self, layer: Layer, said: Tensor, above: Layer, reward: Tensor) -> Tensor:
        """Return backprop's derivative of the values, times the slope of the mean."""
        return said * layer.unit.derivative(layer.potential.detach())
