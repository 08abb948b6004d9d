"""Passes over every configuration of a small team, for tests of expectations."""

from __future__ import annotations

import torch
from enumerated import configurations, gradient_of, log_probs, network, run

import lightning_bpfree as bpf
from lightning_bpfree.methods.team_reinforce.credit import WeightMax

EXACT = 1e-12  # sums of a few hundred doubles of size 1
X = torch.tensor([[0.3, -1.2, 0.7]], dtype=torch.float64)
REWARD = torch.tensor([2.3, 0.6], dtype=torch.float64)  # of the two actions


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
