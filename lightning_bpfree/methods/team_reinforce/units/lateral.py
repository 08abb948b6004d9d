"""Coordinated exploration: units of a layer with correlated draws, through lateral weights."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import AtLeastTwo, PositiveInt, checked
from lightning_bpfree.methods.team_reinforce.units.exploration import Drawn, Exploration
from lightning_bpfree.methods.team_reinforce.units.stochastic import Bernoulli, StochasticUnit


class LateralWeights(nn.Module):
    """The lateral weights of one layer, from 0: units begin as independent ones.

    Args:
        num_units: number of units, ``n``.

    Examples:
        >>> LateralWeights(3).weight.shape
        torch.Size([3, 3])
    """

    def __init__(self, num_units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_units, num_units))


class Boltzmann(Exploration):
    """A Boltzmann machine in every layer: symmetric lateral weights, and Gibbs sweeps that start at independent draws.

    With potentials ``x``, lateral weights ``U`` and values 0 and 1, ``P(h | x)`` is proportional to
    ``exp((h.x + h.U h / 2) / temperature)``. The units have colors, and weights connect only units of different
    colors, so that all units of a color draw at once and the sweep is a valid Gibbs sampler.

    Without the negative phase, the update is reward-modulated Hebbian learning, the advantage times the product of two
    activities. It is exact if the advantage is a reward minus its mean **given the layer's input**, and biased
    otherwise.

    Args:
        sweeps: Gibbs sweeps over all colors, >= 1.
        colors: number of colors, >= 2; 2 gives bipartite lateral weights, one color per unit gives all-to-all weights.
        whole_network: one machine over all hidden units and the output, drawn jointly given the input; a baseline that
            depends only on the input is then enough for every weight. Needs one ``nn.Linear`` between layers of units.

    Raises:
        ValueError: for numbers out of range.

    Examples:
        >>> U = torch.tensor([[0.0, 40.0], [40.0, 0.0]])  # the two units agree, whatever they do
        >>> h = Boltzmann(sweeps=3).draw(Bernoulli(), torch.full((100, 2), -20.0), U).value
        >>> bool((h[:, 0] == h[:, 1]).all())
        True

    References:
        S. Chung, "Structural Credit Assignment with Coordinated Exploration", 2023, arXiv 2307.13256 (a reconstruction
        from the abstract: the sampler, the colors and the baseline are ours).
    """

    @checked
    def __init__(self, sweeps: PositiveInt = 4, colors: AtLeastTwo = 2, whole_network: bool = False) -> None:
        self.sweeps, self.colors, self.whole_network = sweeps, colors, whole_network

    def groups(self, num_units: int) -> list[slice]:
        """Return the units of every color."""
        edges = [num_units * c // self.colors for c in range(self.colors + 1)]
        return [slice(a, b) for a, b in pairwise(edges) if b > a]

    def connected(self, gradient: Tensor) -> Tensor:
        """Return a symmetric matrix that is 0 between units of one color: an allowed update of lateral weights."""
        symmetric = (gradient + gradient.T) / 2
        for group in self.groups(len(gradient)):
            symmetric[group, group] = 0.0
        return symmetric

    @torch.no_grad()
    def chain(self, unit: Bernoulli, potential: Tensor, weight: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return values after the sweeps, starting at independent ones."""
        potential = potential.detach().to(weight.dtype)
        noise = thresholds(unit, (self.sweeps + 1, *potential.shape), potential, generator)
        value = unit.valued((potential > noise[0]).to(weight.dtype))
        groups = self.groups(potential.shape[1])
        columns = [weight[:, group] for group in groups]
        fields = [potential[:, group] for group in groups]
        for sweep in range(1, self.sweeps + 1):
            for group, column, field in zip(groups, columns, fields, strict=True):
                drawn = torch.addmm(field, value, column) > noise[sweep][:, group]
                value[:, group] = unit.valued(drawn.to(weight.dtype))
        return value

    def draw(
        self,
        unit: StochasticUnit,
        potential: Tensor,
        weight: Tensor | None = None,
        *,
        negative_phase: bool = True,
        generator: torch.Generator | None = None,
    ) -> Drawn:
        """Draw; the negative phase takes a second, independent chain."""
        assert isinstance(unit, Bernoulli)
        assert weight is not None
        value = self.chain(unit, potential, weight, generator)
        other = self.chain(unit, potential, weight, generator) if negative_phase else None
        return self.drawn(unit, value, other)

    def drawn(self, unit: StochasticUnit, value: Tensor, other: Tensor | None, *, lateral: bool = True) -> Drawn:
        """Return the draw with its score and the update of lateral weights.

        Args:
            unit: the kind of the units.
            value: the draw, ``(B, n)``.
            other: a second draw, independent given the input, for the negative phase; None for none.
            lateral: whether there are lateral weights between the units.
        """

        def learned(advantage: Tensor) -> Tensor:
            return unit.scale * self.connected(pairs(value, advantage, other))

        score = unit.scale * (value if other is None else value - other)
        return Drawn(value, score, learned if lateral else None)

    def mean(self, unit: StochasticUnit, potential: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the mean field after the same number of sweeps."""
        assert isinstance(unit, Bernoulli)
        assert weight is not None
        mean = unit.mean(potential).to(weight.dtype)
        for _ in range(self.sweeps):
            for group in self.groups(potential.shape[1]):
                field = unit.mean(potential[:, group] + mean @ weight[:, group])
                mean = torch.cat([mean[:, : group.start], field, mean[:, group.stop :]], 1)
        return mean


class Recurrent(Exploration):
    """A recurrent network in every layer: ``steps`` successive draws, each conditioned on the previous one.

    ``h_t`` is drawn from potentials ``x + U h_(t-1)``, with ``h_0 = 0`` and any square ``U``; the last is the output.
    With the negative phase, the update is the exact gradient of the log probability of the whole trajectory. Without it
    (the Hebbian form), it is **biased** for two or more steps, unless the advantage's baseline depends on
    ``h_(t-1)``.

    Args:
        steps: number of draws, >= 1; 1 is the independent draw.

    Raises:
        ValueError: for fewer than one step.

    Examples:
        >>> Recurrent(1).draw(Bernoulli(), torch.tensor([[50.0, -50.0]]), torch.zeros(2, 2)).value
        tensor([[1., 0.]])

    References:
        S. Chung, "Structural Credit Assignment with Coordinated Exploration", 2023, arXiv 2307.13256 (a reconstruction
        from the abstract).
    """

    @checked
    def __init__(self, steps: PositiveInt = 3) -> None:
        self.steps = steps

    def draw(
        self,
        unit: StochasticUnit,
        potential: Tensor,
        weight: Tensor | None = None,
        *,
        negative_phase: bool = True,
        generator: torch.Generator | None = None,
    ) -> Drawn:
        """Draw a trajectory; its last values are the output."""
        assert isinstance(unit, Bernoulli)
        assert weight is not None
        values, scores, inputs = self._trajectory(unit, potential, weight, negative_phase, generator)
        stacked, before = torch.stack(scores[1:]) if self.steps > 1 else None, torch.stack(inputs) if inputs else None

        def lateral(advantage: Tensor) -> Tensor:
            if stacked is None or before is None:
                return torch.zeros_like(weight)
            return torch.einsum("tbj,b,tbi->ji", stacked, advantage.to(stacked.dtype), before)

        return Drawn(values, torch.stack(scores).sum(0), lateral)

    @torch.no_grad()
    def _trajectory(
        self,
        unit: Bernoulli,
        potential: Tensor,
        weight: Tensor,
        negative_phase: bool,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the last values, the score of every step, and what each step but the first saw."""
        potential = potential.detach().to(weight.dtype)
        noise = thresholds(unit, (self.steps, *potential.shape), potential, generator)
        field, scale = potential, unit.scale
        scores, inputs, values = [], [], potential
        for step in range(self.steps):
            if step:
                inputs.append(values)
                field = torch.addmm(potential, values, weight.T)
            values = unit.valued((field > noise[step]).to(weight.dtype))
            scores.append(unit.score(field, values) if negative_phase else scale * values)
        return values, scores, inputs

    def mean(self, unit: StochasticUnit, potential: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the mean of the last step, each step given the mean of the previous one."""
        assert weight is not None
        mean = unit.mean(potential)
        for _ in range(self.steps - 1):
            mean = unit.mean(potential + mean.to(weight.dtype) @ weight.T)
        return mean


def thresholds(unit: Bernoulli, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return numbers that potentials are above with the units' probabilities: logistic noise times the temperature."""
    uniform = torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype)
    return torch.logit(uniform).mul_(unit.temperature)


def pairs(value: Tensor, advantage: Tensor, other: Tensor | None = None) -> Tensor:
    """Return the sum over rows of advantage times the products of two units' values, minus those of a second draw.

    Args:
        value: shape ``(B, n)``.
        advantage: shape ``(B,)``.
        other: the second draw, shaped like ``value``; None for none.

    Returns:
        shape ``(n, n)``.
    """
    weighted = advantage.to(value.dtype)[:, None]
    total = value.T @ (weighted * value)
    return total if other is None else total - other.T @ (weighted * other)
