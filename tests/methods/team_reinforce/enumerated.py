"""Small stochastic networks of which every configuration is run at once, so that expectations are exact sums.

A pass of a team with one row for each configuration, and advantages multiplied by the configuration's probability (and
by the number of rows, over which the rule takes the mean), gives the exact expectation of the rule's update.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import torch
from torch import Tensor, nn

import lightning_bpfree as bpf
from lightning_bpfree.core.auxiliary_modules import AuxiliaryModules
from lightning_bpfree.core.forward_override import override_of
from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.core.step import Step
from lightning_bpfree.methods.team_reinforce.activations import find_sites
from lightning_bpfree.methods.team_reinforce.network import TeamNetwork
from lightning_bpfree.methods.team_reinforce.training_pass import TeamPass
from lightning_bpfree.methods.team_reinforce.units.exploration import Drawn, Independent


class Scripted(Independent):
    """Draws what it was told to, in the order of the layers."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        self.waiting = list(values)

    def draw(self, unit, potential, weight=None, *, negative_phase=True, generator=None) -> Drawn:
        value = self.waiting.pop(0)
        return Drawn(value, unit.score(potential.detach(), value))


class ScriptedSoftmax(bpf.Softmax):
    """Acts as it was told to."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def sample(self, potential: Tensor, generator=None) -> Tensor:
        return self.value


def network(*widths: int, seed: int = 0, spread: float = 1.0) -> nn.Sequential:
    """Linear layers with an activation between two of them, in double precision."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    net = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(spread * torch.randn_like(parameter))
    return net


def configurations(*widths: int, low: float = 0.0, actions: int = 2) -> tuple[list[Tensor], Tensor]:
    """All joint values of hidden layers of these widths, and of a one-hot action: a row for each."""
    units = sum(widths)
    bits = torch.tensor(list(product((low, 1.0), repeat=units)), dtype=torch.float64)
    hidden = bits.repeat_interleave(actions, 0)
    chosen = torch.eye(actions, dtype=torch.float64).repeat(len(bits), 1)
    return list(hidden.split(list(widths), 1)), chosen


def run(rule: bpf.TeamReinforce, net: nn.Module, x: Tensor, hidden: Sequence[Tensor], action: Tensor | None, **changes):
    """Run a pass of the rule's team with the given draws; ``x`` is one input, or one a row. Returns the pass."""
    settings = rule._team._replace(exploration=Scripted(hidden))
    if action is not None:
        settings = settings._replace(output=ScriptedSoftmax(action))
    settings = settings._replace(**changes)
    rows = x if len(x) > 1 else x.expand(len(hidden[0]), -1)
    before = override_of(net)
    if before is not None:
        before.remove()
    team = TeamNetwork(net, find_sites(net, "", None), settings, AuxiliaryModules())
    step = Step(net, lambda: net(rows).sum(), ParameterSlots(net), 0)
    leaves = type(rule._team.credit).leaves
    work = TeamPass(step, 1, torch.Generator(), negative_phase=rule.negative_phase, leaves=leaves)
    team.training_pass = work
    team.install()
    step.loss()
    return work


def log_probs(net: nn.Sequential, unit: bpf.Bernoulli, x: Tensor, hidden: Sequence[Tensor], action: Tensor) -> Tensor:
    """Log probability of every configuration of independent units, with a graph to the parameters."""
    linears = [part for part in net if isinstance(part, nn.Linear)]
    below, total = x.expand(len(action), -1), torch.zeros(len(action), dtype=torch.float64)
    for linear, value in zip(linears[:-1], hidden, strict=True):
        total = total + unit.log_prob(linear(below), value)
        below = value
    return total + bpf.Softmax().log_prob(linears[-1](below), action)


def expectation(work: TeamPass, credit, weights: Tensor, advantages: Tensor | Sequence[Tensor], net: nn.Module):
    """Exact expectation of the update, in the order of the parameters."""
    if isinstance(advantages, Tensor):
        advantages = [advantages] * len(work.layers)
    rows = len(weights)
    scaled = [rows * weights.detach() * advantage for advantage in advantages]
    return credit.gradients(work, scaled, list(net.parameters()), None)


def gradient_of(value: Tensor, net: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(net.parameters()), retain_graph=True))


def worst(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((p - q).abs().max()) for p, q in zip(a, b, strict=True))
