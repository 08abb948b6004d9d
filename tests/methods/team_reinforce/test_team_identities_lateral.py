"""Coordinated exploration and MAP propagation in expectation: every configuration of a small team is run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from enumerated import configurations, expectation, gradient_of, network, run, worst
from team_expectations import EXACT, REWARD, X, enumerated
from torch import nn

import lightning_bpfree as bpf
from lightning_bpfree.methods.team_reinforce.credit import GlobalReward
from lightning_bpfree.methods.team_reinforce.network import TeamNetwork
from lightning_bpfree.methods.team_reinforce.training_pass import TeamPass
from lightning_bpfree.methods.team_reinforce.units.boltzmann_machine import Machine
from lightning_bpfree.methods.team_reinforce.units.lateral import Boltzmann

# --- coordinated exploration -----------------------------------------------------------------------------------------


def lateral(n: int, machine: Boltzmann, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return machine.connected(torch.randn(n, n, dtype=torch.float64))


def boltzmann_chances(unit, potentials, values, u_true):
    """Probabilities of the rows of ``values`` given each row's potentials; u_true may have a graph."""
    scale = 1 / (unit.step * unit.temperature)
    every = torch.unique(values, dim=0)

    def energy(v, x):
        return scale * ((v * x).sum(-1) + 0.5 * ((v @ u_true) * v).sum(-1))

    normalizer = torch.logsumexp(energy(every[None], potentials[:, None]), 1)
    return energy(values, potentials) - normalizer


def boltzmann_layer(unit, negative_phase, monkeypatch, machine=None):
    """One Boltzmann layer of four units below the output: pass, probabilities, rewards, true gradients."""
    machine = machine or Boltzmann(colors=4)
    net = network(3, 4, 2, spread=0.8)
    u_true = lateral(4, machine).requires_grad_()
    hidden, action = configurations(4, low=unit.low)
    values, others = hidden[0], hidden[0]
    if negative_phase:  # all pairs of draws
        every = torch.unique(values, dim=0)
        others = every.repeat(len(values), 1)
        values, action = values.repeat_interleave(16, 0), action.repeat_interleave(16, 0)
    chances = boltzmann_chances(unit, net[0](X).expand(len(values), -1), values, u_true)
    chances = chances + bpf.Softmax().log_prob(net[2](values), action)
    second = boltzmann_chances(unit, net[0](X).expand(len(values), -1), others, u_true).detach().exp()
    rewards = action @ REWARD
    weights = chances.exp().detach() * (second if negative_phase else 1.0)
    rule = bpf.TeamReinforce(unit=unit, exploration=machine, negative_phase=negative_phase)
    waiting = [values, others] if negative_phase else [values]
    monkeypatch.setattr(Boltzmann, "chain", lambda *_: waiting.pop(0))
    monkeypatch.setattr(
        "lightning_bpfree.methods.team_reinforce.network.TeamNetwork.lateral_weight", lambda *_: u_true.detach()
    )
    work = run(rule, net, X, [values], action, exploration=machine)
    # the same sum, each configuration once
    once = weights / chances.exp().detach()
    objective = (chances.exp() * once * rewards).sum()
    true = torch.autograd.grad(objective, [*net.parameters(), u_true])
    return net, work, weights, rewards, list(true[:-1]), machine.connected(true[-1])


@pytest.mark.parametrize("negative_phase", [True, False])
@pytest.mark.parametrize("baseline", ["none", "state"])
def test_the_negative_phase_can_be_dropped_with_a_baseline_of_the_state(unit, negative_phase, baseline, monkeypatch):
    net, work, weights, rewards, true, true_u = boltzmann_layer(unit, negative_phase, monkeypatch)
    assert abs(float(weights.sum()) - 1) < EXACT
    advantage = rewards - ((weights * rewards).sum() if baseline == "state" else 0.0)
    found = expectation(work, GlobalReward(), weights, advantage, net)
    # The objective's derivative by the whole matrix counts each pair twice, at half: connected() takes the mean of the
    # two, and a pair's own derivative is their sum.
    u = work.layers[0].drawn.lateral(weights * advantage)
    if negative_phase or baseline == "state":
        assert worst(found, true) < EXACT
        assert worst([u], [2 * true_u]) < EXACT
    else:
        assert worst(found, true) > 0.01
        assert worst([u], [2 * true_u]) > 0.01


def stacked(unit, monkeypatch):
    """Two Boltzmann layers one above the other, without negative phase."""
    machine = Boltzmann(colors=3)
    net = network(3, 3, 3, 2, spread=1.2)
    laterals = [lateral(3, machine, seed) for seed in (1, 2)]
    hidden, action = configurations(3, 3, low=unit.low)
    potentials = net[0](X).expand(len(action), -1)
    first = boltzmann_chances(unit, potentials, hidden[0], laterals[0])
    second = boltzmann_chances(unit, net[2](hidden[0]), hidden[1], laterals[1])
    chances = (first + second + bpf.Softmax().log_prob(net[4](hidden[1]), action)).exp()
    rule = bpf.TeamReinforce(unit=unit, exploration=machine)
    waiting = list(hidden)
    monkeypatch.setattr(Boltzmann, "chain", lambda *_: waiting.pop(0))
    monkeypatch.setattr(
        "lightning_bpfree.methods.team_reinforce.network.TeamNetwork.lateral_weight",
        lambda self, layer: laterals[len(self._layers) - 1],
    )
    work = run(rule, net, X, hidden, action, exploration=machine)
    rewards = action @ REWARD
    return net, work, chances.detach(), rewards, gradient_of((chances * rewards).sum(), net), hidden


def given(values, chances, rewards):
    """Expected reward given each row's values."""
    same = (values[:, None] == values[None]).all(-1).double()
    return (same @ (chances * rewards)) / (same @ chances)


def test_stacked_layers_need_a_baseline_of_their_own(unit, monkeypatch):
    net, work, chances, rewards, true, hidden = stacked(unit, monkeypatch)
    of_input = (chances * rewards).sum()
    found = expectation(work, GlobalReward(), chances, rewards - of_input, net)
    assert worst(found[:2], true[:2]) < EXACT  # the first layer's input is the state
    assert worst(found[2:4], true[2:4]) > 1e-3  # the second layer's is not
    assert worst(found[4:], true[4:]) < EXACT  # softmax: its mean is subtracted exactly
    net, work, *_ = stacked(unit, monkeypatch)
    own = [rewards - of_input, *(rewards - given(h, chances, rewards) for h in hidden)]
    found = expectation(work, GlobalReward(), chances, own, net)
    assert worst(found, true) < EXACT


@pytest.mark.parametrize("baseline", ["none", "state"])
def test_one_machine_over_the_whole_network_needs_one_baseline(unit, baseline, monkeypatch):
    settings = Boltzmann(colors=3, whole_network=True)
    net = network(3, 3, 2, 2, spread=0.8)
    laterals = [lateral(3, settings, 1).requires_grad_(), lateral(2, settings, 2).requires_grad_()]
    hidden, action = configurations(3, 2, low=unit.low)
    scale = 1 / (unit.step * unit.temperature)
    energy = scale * (hidden[0] * net[0](X)).sum(1) + scale * (hidden[1] * net[2](hidden[0])).sum(1)
    for h, u_true in zip(hidden, laterals, strict=True):
        energy = energy + 0.5 * scale * ((h @ u_true) * h).sum(1)
    chances = torch.softmax(energy + (action * net[4](hidden[1])).sum(1), 0)
    monkeypatch.setattr(Machine, "draw", lambda *_: [*hidden, action])
    monkeypatch.setattr(
        "lightning_bpfree.methods.team_reinforce.network.TeamNetwork.lateral_weight",
        lambda self, layer: laterals[0 if layer.name == "1" else 1].detach(),
    )
    rule = bpf.TeamReinforce(unit=unit, exploration=settings)
    monkeypatch.setattr(Boltzmann, "chain", lambda self, unit, potential, *_: torch.zeros_like(potential))
    work = run(rule, net, X, hidden, action, exploration=settings)
    rewards = action @ REWARD
    everything = [*net.parameters(), *laterals]
    *true, first, second = torch.autograd.grad((chances * rewards).sum(), everything)
    weights = chances.detach()
    advantage = rewards - ((weights * rewards).sum() if baseline == "state" else 0.0)
    found = expectation(work, GlobalReward(), weights, advantage, net)
    u = [layer.drawn.lateral(weights * advantage) for layer in work.layers[:-1]]
    true_u = [2 * settings.connected(first), 2 * settings.connected(second)]
    if baseline == "state":
        assert worst(found, true) < EXACT
        assert worst(u, true_u) < EXACT
    else:
        assert worst(found, true) > 0.01


def test_a_trajectory_with_negative_phase_is_the_gradient(unit, monkeypatch):
    """A recurrent layer of two units, three steps: all 64 trajectories."""
    steps, n = 3, 2
    exploration = bpf.Recurrent(steps)
    net = network(3, n, 2, spread=0.8)
    torch.manual_seed(1)
    u_true = torch.randn(n, n, dtype=torch.float64, requires_grad=True)
    path, action = configurations(*[n] * steps, low=unit.low)
    rows = len(action)
    chances = torch.zeros(rows, dtype=torch.float64)
    potential, before = net[0](X).expand(rows, -1), torch.zeros(rows, n, dtype=torch.float64)
    for value in path:
        chances = chances + unit.log_prob(potential + before @ u_true.T, value)
        before = value
    chances = (chances + bpf.Softmax().log_prob(net[2](before), action)).exp()
    assert abs(float(chances.detach().sum()) - 1) < EXACT
    rewards = action @ REWARD
    *true, true_u = torch.autograd.grad((chances * rewards).sum(), [*net.parameters(), u_true])

    def script(unit, shape, like, generator):  # fields are above -inf, and not above inf
        upper = torch.stack(path) > 0
        return torch.where(upper, -torch.inf, torch.inf).to(like.dtype)

    monkeypatch.setattr("lightning_bpfree.methods.team_reinforce.units.lateral.thresholds", script)
    monkeypatch.setattr(
        "lightning_bpfree.methods.team_reinforce.network.TeamNetwork.lateral_weight", lambda *_: u_true.detach()
    )
    rule = bpf.TeamReinforce(unit=unit, exploration=exploration, negative_phase=True)
    work = run(rule, net, X, [path[-1]], action, exploration=exploration)
    weights = chances.detach()
    assert worst(expectation(work, GlobalReward(), weights, rewards - 0.3, net), true) < EXACT
    assert worst([work.layers[0].drawn.lateral(weights * (rewards - 0.3))], [true_u]) < EXACT
    hebbian = bpf.TeamReinforce(unit=unit, exploration=exploration)
    work = run(hebbian, net, X, [path[-1]], action, exploration=exploration)
    advantage = rewards - (weights * rewards).sum()
    assert worst(expectation(work, GlobalReward(), weights, advantage, net)[:2], true[:2]) > 1e-3


# --- MAP propagation -------------------------------------------------------------------------------------------------


def gaussian_pass(steps, layers=None, rows=7, spread=0.6):
    """A pass of Gaussian units 6-5-4-3 with sampled values, and its rule."""
    net = network(6, 5, 4, 3, spread=spread) if layers is None else layers
    torch.manual_seed(4)
    x = torch.randn(rows, 6, dtype=torch.float64)
    units = [bpf.Gaussian(0.3), bpf.Gaussian(1.0)]
    rule = bpf.TeamReinforce(unit=units, credit=bpf.MapPropagation(steps))
    hidden = [torch.randn(rows, 5, dtype=torch.float64), torch.randn(rows, 4, dtype=torch.float64)]
    action = F.one_hot(torch.arange(rows) % 3, 3).double()

    work = run(rule, net, x, hidden, action)
    return net, work, rule._team.credit, x


def test_map_propagation_without_steps_is_reinforce():
    net, work, credit, _ = gaussian_pass(0)
    rewards = torch.linspace(-1, 1, 7, dtype=torch.float64)
    plain = GlobalReward().gradients(work, [rewards] * 3, list(net.parameters()), None)
    net, work, credit, _ = gaussian_pass(0)
    found = credit.gradients(work, [rewards] * 3, list(net.parameters()), None)
    assert worst(found, plain) < EXACT


def through_the_draws(net, work, x, rewards):
    """Backprop of the action's log probability through the network with its noise held, where the values are now."""
    linears = [part for part in net if isinstance(part, nn.Linear)]
    below = x
    for linear, layer in zip(linears[:-1], work.layers, strict=False):
        mean = layer.unit.mean(linear(below))
        noise = layer.value.detach() - mean.detach()
        below = mean + noise
    scored = work.layers[-1].unit.log_prob(linears[-1](below), work.layers[-1].value)
    return gradient_of((rewards * scored).mean(), net)


@pytest.mark.parametrize("chain", [True, False])
def test_map_propagation_ends_at_backprop_through_the_draws(chain, monkeypatch):
    if not chain:
        monkeypatch.setattr(TeamPass, "is_chain", False)
    rewards = torch.linspace(-1, 1, 7, dtype=torch.float64)
    errors = []
    for steps in (20, 400):
        net, work, credit, x = gaussian_pass(steps)
        found = credit.gradients(work, [rewards] * 3, list(net.parameters()), None)
        true = through_the_draws(net, work, x, rewards)
        size = torch.cat([g.flatten() for g in true[:4]]).norm()
        errors.append(worst(found[:4], true[:4]) / float(size))
        assert worst(found[4:], true[4:]) < EXACT  # the output's is exact at every step
    assert errors[1] < 1e-10 < errors[0] < 0.1


def test_the_chain_of_linear_layers_is_climbed_as_by_autograd(monkeypatch):
    rewards = torch.linspace(-1, 1, 7, dtype=torch.float64)
    found = []
    for chain in (True, False):
        net, work, credit, _ = gaussian_pass(5)
        assert work.is_chain
        if not chain:
            monkeypatch.setattr(TeamPass, "is_chain", False)
        found.append(credit.gradients(work, [rewards] * 3, list(net.parameters()), None))
    assert worst(*found) < EXACT


def test_map_propagation_climbs_and_holds_the_action():
    heights, action = [], None
    for steps in range(12):
        _, work, credit, _ = gaussian_pass(steps)
        action = work.layers[-1].value if action is None else action
        credit.ascend(work)
        terms = [layer.unit.log_prob(layer.potential.detach(), layer.value.detach()) for layer in work.layers]
        heights.append(torch.stack(terms).sum(0))
        assert torch.equal(work.layers[-1].value, action)
    rises = torch.stack(heights).diff(dim=0)
    assert bool((rises > -1e-9).all())


def test_pathwise_is_backprop_through_the_draws():
    net = network(6, 5, 4, 3, spread=0.6)
    torch.manual_seed(4)
    x = torch.randn(7, 6, dtype=torch.float64)
    rule = bpf.TeamReinforce(unit="gaussian", credit="pathwise")
    hidden = [torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)]
    action = F.one_hot(torch.arange(7) % 3, 3).double()
    work = run(rule, net, x, hidden, action)
    rewards = torch.linspace(-1, 1, 7, dtype=torch.float64)
    found = rule._team.credit.gradients(work, [rewards] * 3, list(net.parameters()), None)
    assert worst(found, through_the_draws(net, work, x, rewards)) < EXACT


@pytest.mark.parametrize("credit", ["reward", "weight_max", "ste"])
def test_products_of_matrices_are_what_autograd_gives(unit, credit, monkeypatch):
    found = []
    for seen in (True, False):
        net, work, chances, rewards, _, how = enumerated(credit, unit)
        assert all(layer.linear is not None for layer in work.layers) == seen
        found.append(expectation(work, how, chances, rewards, net))
        monkeypatch.setattr(TeamNetwork, "_notice_linear", lambda *_: None)
    assert worst(*found) < EXACT
