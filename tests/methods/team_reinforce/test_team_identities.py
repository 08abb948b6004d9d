"""What the rules of a team are in expectation: every configuration of a small network is run, nothing is sampled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from enumerated import configurations, expectation, gradient_of, log_probs, network, run, worst
from torch import nn

import lightning_bpfree as bpf
from lightning_bpfree.methods.team_reinforce.credit import GlobalReward, WeightMax, without
from lightning_bpfree.methods.team_reinforce.network import TeamNetwork
from lightning_bpfree.methods.team_reinforce.training_pass import TeamPass
from lightning_bpfree.methods.team_reinforce.units.boltzmann_machine import Machine
from lightning_bpfree.methods.team_reinforce.units.lateral import Boltzmann

EXACT = 1e-12  # sums of a few hundred doubles of size 1
X = torch.tensor([[0.3, -1.2, 0.7]], dtype=torch.float64)
REWARD = torch.tensor([2.3, 0.6], dtype=torch.float64)  # of the two actions


@pytest.fixture(params=["bernoulli", "sign"])
def unit(request):
    return bpf.Bernoulli("zero_one" if request.param == "bernoulli" else "plus_minus_one", temperature=1.5)


def enumerated(credit, unit, widths=(3, 2), exact_of_linear=False):
    """A pass over all configurations, their probabilities, rewards, and the true gradient."""
    net = network(3, *widths, 2, spread=0.8)
    hidden, action = configurations(*widths, low=unit.low)
    rule = bpf.TeamReinforce(unit=unit, credit=credit, num_samples=2)
    work = run(rule, net, X, hidden, action)
    chances = log_probs(net, unit, X, hidden, action).exp()
    rewards = action @ REWARD
    true = gradient_of((chances * rewards).sum(), net)
    return net, work, chances.detach(), rewards, true, rule._team.credit


def test_probabilities_sum_to_one(unit):
    _, _, chances, *_ = enumerated("reward", unit)
    assert abs(float(chances.sum()) - 1) < EXACT


@pytest.mark.parametrize("baseline", [0.0, 3.7, "state"])
def test_reinforce_is_the_gradient_for_any_baseline_of_the_state(unit, baseline):
    net, work, chances, rewards, true, credit = enumerated("reward", unit)
    b = (chances * rewards).sum() if baseline == "state" else baseline
    assert worst(expectation(work, credit, chances, rewards - b, net), true) < EXACT


def test_exact_weight_maximization_is_the_gradient(unit):
    net, work, chances, rewards, true, credit = enumerated(WeightMax(exact=True), unit)
    assert worst(expectation(work, credit, chances, rewards - 0.4, net), true) < EXACT


def test_weight_maximization_is_biased_below_the_last_layer_and_less_noisy(unit):
    net, work, chances, rewards, true, credit = enumerated("weight_max", unit)
    found = expectation(work, credit, chances, rewards, net)
    assert worst(found[-2:], true[-2:]) < EXACT  # the output is REINFORCE
    first = F.cosine_similarity(found[0].flatten(), true[0].flatten(), dim=0)
    assert 0.8 < float(first) < 1 - 1e-6
    plain = spread(net, work, chances, rewards, GlobalReward())
    assert spread(net, work, chances, rewards, credit) < plain
    assert spread(net, work, chances, rewards, WeightMax(exact=True)) < plain


def spread(net, work, chances, rewards, credit):
    """Variance of the update of the first layer's weights, summed over them."""
    alone = []
    for row in range(len(chances)):
        advantage = torch.zeros_like(rewards)
        advantage[row] = rewards[row] * len(rewards)
        again = again_with_graph(net, work)
        alone.append(credit.gradients(again, [advantage] * 3, list(net.parameters()), None)[0])
    samples = torch.stack(alone)
    mean = (chances[:, None, None] * samples).sum(0)
    return float((chances[:, None, None] * (samples - mean).square()).sum())


def again_with_graph(net, work):
    hidden, action = [layer.value.detach() for layer in work.layers[:-1]], work.layers[-1].value
    rule = bpf.TeamReinforce(unit=work.layers[0].unit, credit=WeightMax(exact=True))
    return run(rule, net, X, hidden, action)


def test_the_published_sum_of_ratios_would_be_biased():
    """The product over downstream units, not a sum of one ratio for each, is what makes the exact form exact."""
    unit = bpf.Bernoulli()
    net, work, chances, rewards, true, _ = enumerated(WeightMax(exact=True), unit)

    class SumOfRatios(WeightMax):
        def signal(self, layer, said, above, reward):
            value = layer.value.detach()
            silent = above.potential.detach()[:, None, :] - value[:, :, None] * above.linear.weight.detach().T
            drawn = above.value.detach()[:, None, :].expand_as(silent)

            def log(z, v):
                return (
                    v * z - F.softplus(z) if not isinstance(above.unit, bpf.Softmax) else (v * torch.log_softmax(z, -1))
                )

            now = log(above.potential.detach(), above.value.detach())[:, None, :]
            ratios = (1 - (log(silent, drawn) - now).exp()).sum(-1)
            return reward[:, None] / len(reward) * ratios * layer.score()

    found = expectation(work, SumOfRatios(exact=True), chances, rewards, net)
    assert worst(found[:2], true[:2]) > 1e-4


@pytest.mark.parametrize("credit", ["weight_max", "ste"])
def test_exact_where_what_is_above_is_affine(unit, credit):
    """One hidden layer, and a reward that is linear in the output: each unit's worth does not depend on the others."""
    net = network(3, 4, 2, spread=0.8)
    hidden, _ = configurations(4, low=unit.low, actions=1)
    rule = bpf.TeamReinforce(unit=unit, credit=credit, output=None, reward=lambda _, out: out @ REWARD)
    work = run(rule, net, X, hidden, None)
    linear = net[0]
    chances = unit.log_prob(linear(X.expand(16, -1)), hidden[0]).exp()
    outputs = net[2](hidden[0])
    true = gradient_of((chances * (outputs @ REWARD)).sum(), net)
    rows, weights = len(chances), chances.detach()
    by_output = rows * weights[:, None] * REWARD.expand(rows, -1)
    rewards = rows * weights * (outputs @ REWARD).detach()
    found = rule._team.credit.gradients(work, [rewards] * 2, list(net.parameters()), by_output)
    assert worst(found, true) < EXACT


def test_straight_through_is_biased_but_for_the_output(unit):
    net, work, chances, rewards, true, credit = enumerated("ste", unit)
    found = expectation(work, credit, chances, rewards, net)
    assert worst(found[-2:], true[-2:]) < EXACT
    assert worst(found[:2], true[:2]) > 1e-5


@pytest.mark.parametrize("derivative", ["mean", "identity"])
def test_straight_through_at_the_means_is_backprop(unit, derivative):
    net = network(3, 3, 2, 2)
    x = torch.randn(5, 3, dtype=torch.float64)
    first = unit.mean(net[0](x)).detach()
    hidden = [first, unit.mean(net[2](first)).detach()]
    action = F.one_hot(torch.tensor([0, 1, 1, 0, 1]), 2).double()
    rule = bpf.TeamReinforce(unit=unit, credit=bpf.StraightThrough(derivative))
    rows = [run(rule, net, x[i : i + 1], [h[i : i + 1] for h in hidden], action[i : i + 1]) for i in range(5)]

    class Smooth(torch.autograd.Function):
        @staticmethod
        def forward(ctx, potential):
            return unit.mean(potential)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    act = unit.mean if derivative == "mean" else Smooth.apply
    for i, work in enumerate(rows):
        scored = bpf.Softmax().log_prob(net[4](act(net[2](act(net[0](x[i : i + 1]))))), action[i : i + 1]).sum()
        one = torch.ones(1, dtype=torch.float64)
        found = rule._team.credit.gradients(work, [one] * 3, list(net.parameters()), None)
        assert worst(found, gradient_of(scored, net)) < EXACT


# --- coordinated exploration ---------------------------------------------------------------------------------------


def lateral(n: int, machine: Boltzmann, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return machine.connected(torch.randn(n, n, dtype=torch.float64))


def boltzmann_chances(unit, potentials, values, u_true):
    """Probabilities of the rows of ``values`` given each row's potentials; u_true may have a graph."""
    scale = 1 / (unit.step * unit.temperature)
    every = torch.unique(values, dim=0)

    def energy(v, x):
        return scale * ((v * x).sum(-1) + 0.5 * ((v @ u_true) * v).sum(-1))

    normaliser = torch.logsumexp(energy(every[None], potentials[:, None]), 1)
    return energy(values, potentials) - normaliser


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


# --- MAP propagation -----------------------------------------------------------------------------------------------


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


# --- locality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("credit", [GlobalReward(), WeightMax(exact=True), bpf.MapPropagation(1)])
def test_a_layer_does_not_see_beyond_the_next_one(credit):
    def update(scale):
        net = network(3, 3, 3, 3, 2, spread=0.7)
        with torch.no_grad():
            net[4].weight.mul_(scale)
            net[6].weight.mul_(scale)
        unit = "gaussian" if isinstance(credit, bpf.MapPropagation) else "bernoulli"
        rule = bpf.TeamReinforce(unit=unit, credit=credit)
        hidden, action = configurations(3, 3, 3)
        work = run(rule, net, X, hidden, action)
        rewards = action @ REWARD
        return credit.gradients(work, [rewards] * 4, list(net.parameters()), None)

    one, other = update(1.0), update(30.0)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert not torch.equal(one[4], other[4]) or isinstance(credit, GlobalReward)


def test_without_a_unit_is_one_minus_a_ratio():
    unit = bpf.Bernoulli()
    _, work, *_ = enumerated(WeightMax(exact=True), unit)
    layer, above = work.layers[0], work.layers[1]
    value = layer.value.detach()
    found = without(above, value)
    assert torch.equal(found[value == 0], torch.zeros_like(found[value == 0]))
    changed = value.clone()
    changed[:, 1] = 0.0
    potential = F.linear(changed, above.linear.weight, above.linear.bias).detach()
    ratio = (unit.log_prob(potential, above.value) - unit.log_prob(above.potential.detach(), above.value)).exp()
    torch.testing.assert_close(found[:, 1], 1 - ratio)
