"""What the rules of a team are in expectation: all configurations are run, none is sampled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from enumerated import configurations, expectation, gradient_of, network, run, worst
from team_expectations import EXACT, REWARD, X, enumerated, spread

import lightning_bpfree as bpf
from lightning_bpfree.methods.team_reinforce.credit import GlobalReward, WeightMax, without


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


# --- locality --------------------------------------------------------------------------------------------------------


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
