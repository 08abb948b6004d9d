"""Stochastic units: random activations with a score in closed form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bpfree.core.arguments import PositiveFloat, checked
from lightning_bpfree.core.params import widen


class StochasticUnit(nn.Module, ABC):
    """A layer of units that draw their values given potentials ``(B, ...)``, each unit an agent with a policy.

    As a module in a network it returns a draw in training and the mean in evaluation. Under plain backprop, gradients
    pass by the derivative of the mean: exact for :class:`Gaussian` (reparameterization), the straight-through estimator
    for the others. :class:`~lightning_bpfree.TeamReinforce` trains such networks by a reward instead.

    Args:
        temperature: divides the potentials, > 0.

    Raises:
        ValueError: for a temperature that is not positive.
    """

    discrete: ClassVar[bool] = True

    @checked
    def __init__(self, temperature: PositiveFloat = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def logits(self, potential: Tensor) -> Tensor:
        """Return potentials over the temperature, in at least single precision."""
        potential = widen(potential)
        return potential if self.temperature == 1.0 else potential / self.temperature

    @property
    def scale(self) -> float:
        """What a value minus its mean is multiplied by in the score of units with an energy: see :class:`Bernoulli`."""
        return 1 / self.temperature

    @abstractmethod
    def mean(self, potential: Tensor) -> Tensor:
        """Return the mean of what is drawn, shaped like ``potential``."""

    @abstractmethod
    def sample(self, potential: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a draw, shaped like ``potential``, without a graph.

        Args:
            potential: what the layer before the units gives.
            generator: where random numbers come from; None for torch's global stream.
        """

    @torch.no_grad()
    def draw(self, potential: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return a draw and its score."""
        value = self.sample(potential, generator)
        return value, self.score(potential, value)

    @abstractmethod
    def score(self, potential: Tensor, value: Tensor) -> Tensor:
        """Return the derivative of ``log_prob(potential, value)`` by the potential, shaped like it."""

    @abstractmethod
    def log_prob(self, potential: Tensor, value: Tensor) -> Tensor:
        """Return the log probability (density) of drawing ``value``, summed over units: shape ``(B,)``."""

    @abstractmethod
    def derivative(self, potential: Tensor) -> Tensor:
        """Return the derivative of each unit's mean by its own potential, shaped like ``potential``."""

    def forward(self, potential: Tensor) -> Tensor:
        """Return a draw in training, the mean in evaluation."""
        mean = self.mean(potential)
        return self.sample(potential) + (mean - mean.detach()) if self.training else mean

    def extra_repr(self) -> str:
        """Return the settings that the module's representation shows."""
        return f"temperature={self.temperature}"


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _per_row(terms: Tensor) -> Tensor:
    return terms.flatten(1).sum(1)


class Bernoulli(StochasticUnit):
    """Units with two values; the upper one has probability ``sigmoid(potential / temperature)``.

    Args:
        values: ``"zero_one"`` or ``"plus_minus_one"``.
        temperature: > 0.

    Examples:
        >>> unit = Bernoulli("plus_minus_one")
        >>> unit.mean(torch.zeros(1, 2)), unit.score(torch.zeros(1, 1), torch.ones(1, 1))
        (tensor([[0., 0.]]), tensor([[0.5000]]))

    References:
        R. J. Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning",
        1992.
    """

    @checked
    def __init__(
        self, values: Literal["zero_one", "plus_minus_one"] = "zero_one", temperature: PositiveFloat = 1.0
    ) -> None:
        super().__init__(temperature)
        self.values = values

    @property
    def step(self) -> float:
        """Distance between the two values."""
        return 1.0 if self.values == "zero_one" else 2.0

    @property
    def low(self) -> float:
        """The lower value."""
        return 0.0 if self.values == "zero_one" else -1.0

    @property
    def scale(self) -> float:
        """The factor of a value's score: one over the product of the temperature and the distance of the two values."""
        return 1 / (self.step * self.temperature)

    def probability(self, potential: Tensor) -> Tensor:
        """Return the probability of the upper value."""
        return torch.sigmoid(self.logits(potential))

    def valued(self, upper: Tensor) -> Tensor:
        """Return the units' values, given in ``upper`` (in [0, 1]) whether the upper one was drawn."""
        return upper if self.values == "zero_one" else 2 * upper - 1

    def mean(self, potential: Tensor) -> Tensor:
        """Return the probability, or for -1 and 1 the hyperbolic tangent of half the potential."""
        return self.valued(self.probability(potential))

    @torch.no_grad()
    def sample(self, potential: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return values drawn independently."""
        probability = self.probability(potential)
        return self.valued((_uniform(probability, generator) < probability).to(probability.dtype))

    @torch.no_grad()
    def draw(self, potential: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return values drawn independently, and their scores."""
        probability = self.probability(potential)  # once for both
        upper = (_uniform(probability, generator) < probability).to(probability.dtype)
        score = upper - probability
        return self.valued(upper), score if self.temperature == 1.0 else score / self.temperature

    def score(self, potential: Tensor, value: Tensor) -> Tensor:
        """Return the values minus their means, divided by the temperature and the distance of the two values."""
        return (value - self.mean(potential)) * self.scale

    def log_prob(self, potential: Tensor, value: Tensor) -> Tensor:
        """Return the log probability of the values of each row."""
        logits = self.logits(potential)
        return _per_row((value - self.low) / self.step * logits - F.softplus(logits))

    def derivative(self, potential: Tensor) -> Tensor:
        """Return p (1 - p) times the distance of the values, divided by the temperature."""
        p = self.probability(potential)
        return p * (1 - p) * (self.step / self.temperature)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.values!r}, {super().extra_repr()}"


# Functions that give means, and their slopes.
_MEANS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "softplus": (F.softplus, torch.sigmoid),
    "relu": (torch.relu, lambda x: (x > 0).to(x.dtype)),
    "tanh": (torch.tanh, lambda x: 1 - torch.tanh(x).square()),
    "linear": (lambda x: x, torch.ones_like),
}


class Gaussian(StochasticUnit):
    """Units with real values, normally distributed around a function of their potential.

    Args:
        variance: variance of every unit, > 0.
        mean: function that gives the mean: ``"softplus"``, ``"relu"``, ``"tanh"`` or ``"linear"``.
        temperature: > 0; divides the potentials.

    Examples:
        >>> unit = Gaussian(0.25, "linear")
        >>> unit.score(torch.zeros(1, 1), torch.ones(1, 1))
        tensor([[4.]])
    """

    discrete: ClassVar[bool] = False

    @checked
    def __init__(
        self,
        variance: PositiveFloat = 0.3,
        mean: Literal["softplus", "relu", "tanh", "linear"] = "softplus",
        temperature: PositiveFloat = 1.0,
    ) -> None:
        super().__init__(temperature)
        self.variance, self.mean_function = variance, mean  # the name alone, so that units can be pickled

    def mean(self, potential: Tensor) -> Tensor:
        """Return the mean."""
        return _MEANS[self.mean_function][0](self.logits(potential))

    @torch.no_grad()
    def sample(self, potential: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the mean plus noise."""
        mean = self.mean(potential)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean.add(noise, alpha=self.variance**0.5)

    def score(self, potential: Tensor, value: Tensor) -> Tensor:
        """Return the deviation divided by the variance, times the slope of the mean."""
        return (value - self.mean(potential)) * self.derivative(potential) / self.variance

    def log_prob(self, potential: Tensor, value: Tensor) -> Tensor:
        """Return the log density of the values of each row."""
        deviation = value - self.mean(potential)
        constant = torch.log(torch.tensor(2 * torch.pi * self.variance, dtype=deviation.dtype))
        return -0.5 * _per_row(deviation.square() / self.variance + constant.to(deviation.device))

    def derivative(self, potential: Tensor) -> Tensor:
        """Return the slope of the mean."""
        slope = _MEANS[self.mean_function][1](self.logits(potential))
        return slope if self.temperature == 1.0 else slope / self.temperature

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"variance={self.variance}, mean={self.mean_function!r}, {super().extra_repr()}"


class Softmax(StochasticUnit):
    """One agent that chooses among ``C`` actions: a one-hot row drawn from ``softmax(logits / temperature)``.

    Examples:
        >>> unit = Softmax()
        >>> unit.score(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        tensor([[ 0.5000, -0.5000]])
    """

    def mean(self, potential: Tensor) -> Tensor:
        """Return the probabilities, shape ``(B, C)``."""
        return torch.softmax(self.logits(potential), -1)

    @torch.no_grad()
    def sample(self, potential: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return one-hot rows, shape ``(B, C)``."""
        mean = self.mean(potential)
        # Gumbel's trick in one pass: the first of C exponential clocks with these rates.
        clocks = torch.empty_like(mean).exponential_(generator=generator)
        return F.one_hot((mean / clocks).argmax(-1), mean.shape[-1]).to(mean.dtype)

    def score(self, potential: Tensor, value: Tensor) -> Tensor:
        """Return one-hot minus probabilities, divided by the temperature."""
        return (value - self.mean(potential)) * self.scale

    def log_prob(self, potential: Tensor, value: Tensor) -> Tensor:
        """Return the log probability of the chosen actions."""
        logs = torch.log_softmax(self.logits(potential), -1)
        return _per_row(torch.where(value > 0, value * logs, 0.0))  # others may be ruled out, by minus infinity

    def derivative(self, potential: Tensor) -> Tensor:
        """Return p (1 - p) divided by the temperature: each probability's derivative by its own logit alone."""
        p = self.mean(potential)
        return p * (1 - p) / self.temperature


UNITS: dict[str, Callable[[], StochasticUnit]] = {
    "bernoulli": Bernoulli,
    "sign": lambda: Bernoulli("plus_minus_one"),
    "gaussian": Gaussian,
    "softmax": Softmax,
}


def unit_named(unit: str | StochasticUnit) -> StochasticUnit:
    """Return the unit of that name with default settings, or the unit itself."""
    return unit if isinstance(unit, StochasticUnit) else UNITS[unit]()
