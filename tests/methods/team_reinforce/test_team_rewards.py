"""Rewards of the module, of a function and of the step itself, and critics that expect them."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from enumerated import network
from problems import fitted, loader
from team_problems import (
    EXACT,
    QUIET,
    Acts,
    ByHand,
    Plain,
    Regresses,
    advantages,
    assert_same,
    estimate,
    flat,
    problem,
    rewards_of_classes,
    targets,
    vectors,
)
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.demos.modules import MLP
from lightning_bpfree.demos.regression import Regressor


def test_a_loss_is_differentiated_where_nothing_is_drawn():
    module, (x, y) = Plain(network(6, 5, 4, 3)), vectors()
    rule = bpf.TeamReinforce(output=None, reward="loss")
    found = estimate(rule, module, (x, y))
    rule.uninstall()
    net = module.net
    hand = ByHand([net[0], net[2], net[4]], [bpf.Bernoulli()] * 2).run(x)
    losses = F.cross_entropy(hand.last, y.repeat(4), reduction="none")
    expected = torch.autograd.grad(-losses.mean(), list(net[4].parameters()), retain_graph=True)
    advantage = advantages(-losses.detach(), 4)
    hidden = torch.autograd.grad((advantage * hand.log_prob).mean(), [*net[0].parameters(), *net[2].parameters()])
    assert_same(found, dict(zip(found, [*hidden, *expected], strict=True)))


@pytest.mark.parametrize("how", ["module", "function"])
def test_rewards_may_be_the_modules_own_or_a_function(how):
    """A real output, drawn from a Gaussian unit; minus the squared error of each draw."""
    module, (x, _) = Regresses(network(6, 5, 1)), vectors()
    batch = x, targets(x)
    output = bpf.Gaussian(0.1, "linear")
    reward = "module" if how == "module" else lambda b, action: -(action - b[1].repeat(4, 1)).square()  # (rows, 1)
    rule = bpf.TeamReinforce(output=output, reward=reward)
    found = estimate(rule, module, batch)
    rule.uninstall()
    hand = ByHand([module.net[0], module.net[2]], [bpf.Bernoulli()], output).run(x)
    assert hand.action.shape == (32, 1)
    rewards = -(hand.action - batch[1].repeat(4, 1)).square()[:, 0]
    expected = hand.gradients(list(module.parameters()), advantages(rewards, 4))
    assert_same(found, dict(zip(found, expected, strict=True)))


def test_the_regressor_moves_along_the_estimate_through_the_trainer():
    torch.manual_seed(0)
    x, _ = vectors(dtype=torch.float32)
    data = DataLoader(TensorDataset(x, targets(x)), batch_size=8)
    module = Regressor(MLP(6, [5], 1), lr=0.1)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    output, rule = bpf.Gaussian(0.1, "linear"), bpf.TeamReinforce(output=bpf.Gaussian(0.1, "linear"), reward="module")
    trainer = pl.Trainer(callbacks=[rule], max_epochs=1, log_every_n_steps=1, **QUIET)
    trainer.fit(module, data, data)
    assert {"train_loss", "bpfree/team_reinforce/reward"} <= trainer.callback_metrics.keys()
    layers = MLP(6, [5], 1).layers
    with torch.no_grad():
        for parameter, value in zip(layers.parameters(), before, strict=True):
            parameter.copy_(value)
    seed = mix(rule.record.seed, 1)  # of the first batch
    hand = ByHand([layers[0], layers[2]], [bpf.Bernoulli()], output, seed=seed).run(x)
    rewards = -(hand.action - targets(x).repeat(4, 1)).square()[:, 0]
    ascent = hand.gradients(list(layers.parameters()), advantages(rewards, 4))
    for parameter, start, gradient in zip(module.parameters(), before, ascent, strict=True):
        torch.testing.assert_close(parameter, start + 0.1 * gradient, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("output", [bpf.Softmax(), bpf.Gaussian(0.3, "linear")])
def test_the_step_may_act_by_itself(output):
    (x, _), rewards = vectors(), torch.linspace(-1, 2, 8, dtype=torch.float64)
    module = Acts(network(6, 5, 3), rewards, output=output)
    rule = bpf.TeamReinforce(reward="step", num_samples=1, baseline="none", output=output)
    found = estimate(rule, module, (x,))
    rule.uninstall()
    hand = ByHand([module.net[0], module.net[2]], [bpf.Bernoulli()], output, samples=1).run(x)
    hand.action = module.actions[0]
    assert len(module.actions) == 1
    expected = hand.gradients(list(module.parameters()), rewards)
    assert_same(found, dict(zip(found, expected, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["critic", "per_layer"])
def test_critics_learn_the_expected_reward_of_what_they_read(baseline):
    """A reward that does not depend on the draws: the critic that reads the input comes to know it, and it alone."""
    torch.manual_seed(0)
    data = loader(rows=64, batch_size=64)
    module = problem()

    def reward(batch, action):
        return (2 * (batch[0][:, 0] > 0) - 1).float().repeat(len(action) // len(batch[0]))

    rule = bpf.TeamReinforce(reward=reward, baseline=baseline, critic_lr=0.02)
    fitted(module, data, rule, max_epochs=60)
    critics = rule._baselines.own._modules
    names = {"critic"} if baseline == "critic" else {f"critic/{n}" for n in ("net.layers.1", "net.layers.3", "output")}
    assert critics.keys() == names
    x, _ = next(iter(data))
    first = critics["critic" if baseline == "critic" else "critic/net.layers.1"]
    error = (first(x)[:, 0] - (2 * (x[:, 0] > 0) - 1)).square().mean()
    assert float(error.detach()) < 0.3  # of a variance of 1
    sizes = {name: critic[0].in_features for name, critic in critics.items()}
    assert sizes == dict.fromkeys(names, 6) | {
        name: 8 for name in names if name in ("critic/net.layers.3", "critic/output")
    }


def test_advantages_are_of_what_critics_expected_before_they_learned():
    """At first they expect what their seed says; the same batch twice tells that they have learned between."""
    module, batch = Plain(network(6, 5, 3)), vectors()
    rule = bpf.TeamReinforce(baseline="critic", critic_lr=0.5)
    estimate(rule, module, batch)
    critic = copy.deepcopy(rule._baselines.own["critic"])
    with torch.no_grad():
        expected = critic(batch[0])[:, 0]
    rule.uninstall()
    hand = ByHand([module.net[0], module.net[2]], [bpf.Bernoulli()]).run(batch[0])
    rewards = rewards_of_classes(hand, batch[1])
    advantage = rewards - expected.repeat(4)
    found = estimate(rule, module, batch)
    assert_same(found, dict(zip(found, hand.gradients(list(module.parameters()), advantage), strict=True)))
    error = 0.5 * (rewards.view(4, 8).mean(0) - critic(batch[0])[:, 0]).square().mean()
    gradients, times = rule._baselines.own._sums["critic"]
    assert times == 2  # micro-batches of one step
    for total, gradient in zip(gradients, torch.autograd.grad(error, list(critic.parameters())), strict=True):
        torch.testing.assert_close(total, 2 * gradient, rtol=1e-10, atol=EXACT)
    rule._baselines.own.step()
    rule.install(module)
    assert not torch.equal(flat(estimate(rule, module, batch)), flat(found))
