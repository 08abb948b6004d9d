"""The estimate of TeamReinforce from real draws; expectations are in `test_team_identities.py`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from enumerated import configurations, gradient_of, log_probs, network
from team_problems import (
    EXACT,
    ByHand,
    Plain,
    advantages,
    assert_same,
    estimate,
    flat,
    problem,
    rewards_of_classes,
    vectors,
)
from torch import Tensor, nn

import lightning_bpfree as bpf
from lightning_bpfree.methods.team_reinforce.baselines import leave_one_out


def exact(net: nn.Sequential, x: Tensor, label: int) -> Tensor:
    """The gradient of the expected reward of a network 3-3-2-3, by its 96 configurations."""
    hidden, action = configurations(3, 2, actions=3)
    chances = log_probs(net, bpf.Bernoulli(), x, hidden, action).exp()
    return flat(gradient_of((chances * (2 * action[:, label] - 1)).sum(), net))


@pytest.mark.parametrize(
    "settings",
    [{}, {"baseline": "none", "num_samples": 1}, {"credit": bpf.WeightMax(exact=True)}],
    ids=["leave_one_out", "none", "exact_weight_max"],
)
def test_the_error_falls_with_the_root_of_the_rows_and_has_no_floor(settings):
    """Rows are independent (or independent in fours), so that 64 times as many have an eighth of the error.

    The error of one draw has about five degrees of freedom, and a spread of a third; means over 16 draws have one of a
    tenth, and their ratio lies within a factor of two of 8 by more than four standard errors. A bias would be a floor.
    """
    net = network(3, 3, 2, 3, spread=0.8)
    x = torch.tensor([[0.3, -1.2, 0.7]], dtype=torch.float64)
    true, module = exact(net, x, 1), Plain(net)
    rule, errors = bpf.TeamReinforce(**settings), {}
    for rows in (64, 64 * 64):
        inputs = rows // rule.num_samples
        batch = x.expand(inputs, -1), torch.ones(inputs, dtype=torch.int64)
        found = [flat(estimate(rule, module, batch, seed)) for seed in range(16)]
        errors[rows] = sum(float((one - true).norm()) for one in found) / len(found)
    assert 4 < errors[64] / errors[64 * 64] < 16
    cosine = F.cosine_similarity(torch.stack(found).mean(0), true, dim=0)  # 65,536 rows
    assert float(cosine) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["boltzmann", "whole_network", "recurrent"])
def test_coordinated_units_point_along_the_exact_gradient(kind):
    """One hidden layer of three units with lateral weights, against a sum over all that it can do."""
    net, unit = network(3, 3, 3, spread=0.8), bpf.Bernoulli()
    x = torch.tensor([[0.3, -1.2, 0.7]], dtype=torch.float64)
    machine = bpf.Boltzmann(20, 3, whole_network=kind == "whole_network")
    u = torch.randn(3, 3, dtype=torch.float64)
    u = (u if kind == "recurrent" else machine.connected(2 * u)).requires_grad_()
    hidden, action = configurations(*[3] * (2 if kind == "recurrent" else 1), actions=3)
    potential = net[0](x)
    if kind == "recurrent":
        chance = unit.log_prob(potential.expand(len(action), -1), hidden[0])
        chance = chance + unit.log_prob(potential + hidden[0] @ u.T, hidden[1])
        chance = (chance + bpf.Softmax().log_prob(net[2](hidden[1]), action)).exp()
    else:
        energy = (hidden[0] * potential).sum(1) + 0.5 * ((hidden[0] @ u) * hidden[0]).sum(1)
        if kind == "boltzmann":  # the output is drawn given the layer
            every, _ = configurations(3, actions=1)
            alone = (every[0] * potential).sum(1) + 0.5 * ((every[0] @ u) * every[0]).sum(1)
            chance = energy - alone.logsumexp(0) + bpf.Softmax().log_prob(net[2](hidden[0]), action)
            chance = chance.exp()
        else:
            chance = torch.softmax(energy + (action * net[2](hidden[0])).sum(1), 0)
    assert float(chance.sum().detach()) == pytest.approx(1, abs=1e-9)
    *true, true_u = torch.autograd.grad((chance * (2 * action[:, 1] - 1)).sum(), [*net.parameters(), u])

    exploration = bpf.Recurrent(2) if kind == "recurrent" else machine
    rule = bpf.TeamReinforce(exploration=exploration, negative_phase=kind == "recurrent")
    saved = {"module": {"weight": u.detach()}, "optimizer": None}
    rule.load_rule_state({"lateral": {"lateral/net.1": saved}, "critics": {}, "traces": {}})
    batch = x.expand(50_000, -1), torch.ones(50_000, dtype=torch.int64)
    found = estimate(rule, Plain(net), batch)
    ((lateral,), times) = rule._lateral._sums["lateral/net.1"]
    assert times == 1
    # 200,000 rows: an error of about 1 / sqrt(200,000) in a gradient of size 0.1, a hundredth.
    assert float(F.cosine_similarity(flat(found), flat(true), dim=0)) > 0.99
    if kind != "recurrent":
        true_u = 2 * machine.connected(true_u)  # of a pair, whose two weights are one
    assert float(F.cosine_similarity(-lateral.flatten(), true_u.flatten(), dim=0)) > 0.99
    assert float(lateral.norm()) == pytest.approx(float(true_u.norm()), rel=0.1)


def test_leave_one_out_advantages_of_an_input_sum_to_zero():
    rewards = torch.randn(5, 7, dtype=torch.float64)
    found = leave_one_out(rewards)
    torch.testing.assert_close(found.sum(0), torch.zeros(7, dtype=torch.float64), rtol=0, atol=EXACT)
    torch.testing.assert_close(found.flatten(), advantages(rewards.flatten(), 5), rtol=EXACT, atol=EXACT)


def test_so_that_the_other_draws_are_the_negative_phase_of_a_value():
    advantage = leave_one_out(torch.randn(6, 5, dtype=torch.float64))
    h = (torch.rand(6, 5) < 0.4).double()
    mean = torch.rand(5, dtype=torch.float64)  # of the input: any function of it
    with_mean, without = (advantage * (h - mean)).sum(0), (advantage * h).sum(0)
    torch.testing.assert_close(with_mean, without, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("baseline", ["leave_one_out", "none"])
@pytest.mark.parametrize("unit", ["bernoulli", "sign", "gaussian"])
def test_the_estimate_is_that_of_a_plain_implementation(unit, baseline):
    module, (x, y) = Plain(network(6, 5, 4, 3)), vectors()
    rule = bpf.TeamReinforce(unit=unit, baseline=baseline)
    found = estimate(rule, module, (x, y))
    rule.uninstall()
    net, units = module.net, rule._team.units * 2
    hand = ByHand([net[0], net[2], net[4]], units).run(x)
    rewards = rewards_of_classes(hand, y)
    advantage = advantages(rewards, 4) if baseline == "leave_one_out" else rewards
    expected = hand.gradients(list(module.parameters()), advantage)
    assert_same(found, dict(zip([n for n, _ in module.named_parameters()], expected, strict=True)))


def test_rows_are_draws_of_the_whole_batch_one_behind_the_other():
    """A network that is certain of what it does says which input each row is of."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    with torch.no_grad():
        for linear in (net[0], net[2]):
            linear.weight.copy_(200 * torch.eye(3))
            linear.bias.fill_(-100)  # exp(-100) is the chance of an error
    y = torch.tensor([2, 0, 1, 1, 2])
    seen = []

    def reward(batch, action):
        seen.append((batch, action))
        assert action.shape == (4 * 5,)
        assert torch.equal(action.view(4, 5), y.expand(4, 5))
        return torch.arange(20.0)

    batch = F.one_hot(y, 3).float(), y
    estimate(bpf.TeamReinforce(reward=reward), Plain(net), batch)
    assert len(seen) == 1
    assert all(
        got is given for got, given in zip(seen[0][0], batch, strict=True)
    )  # as the loader gave it, not repeated


def test_draws_are_a_function_of_seed_and_batch_alone():
    module, batch = problem(), vectors(dtype=torch.float32)
    one, again, other = (estimate(bpf.TeamReinforce(), Plain(module.net), batch, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(flat(one), flat(other))


def test_the_users_step_sees_the_average_of_the_draws_without_a_graph():
    seen = []

    class Looks(Plain):
        def training_step(self, batch, batch_idx):
            seen.append(self.net(batch[0]))
            return F.cross_entropy(seen[-1], batch[1])

    module, (x, y) = Looks(network(6, 5, 3)), vectors()
    rule = bpf.TeamReinforce(output=bpf.Softmax(1.7))
    estimate(rule, module, (x, y))
    rule.uninstall()
    hand = ByHand([module.net[0], module.net[2]], [bpf.Bernoulli()], bpf.Softmax(1.7)).run(x)
    expected = torch.softmax(hand.last / 1.7, 1).view(4, 8, 3).mean(0)
    assert not seen[0].requires_grad
    torch.testing.assert_close(torch.softmax(seen[0] / 1.7, 1), expected, rtol=1e-10, atol=1e-10)  # in another order
    assert seen[0].shape == (8, 3)
