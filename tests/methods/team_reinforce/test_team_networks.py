"""Convolutions, residual streams, transformers, tied and frozen layers train by TeamReinforce."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from enumerated import network
from problems import Problem, fitted
from team_problems import EXACT, ByHand, Plain, advantages, assert_same, estimate, images, rewards_of_classes, vectors
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.demos.modules import SmallCNN, SmallTransformer

# --- other networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["bernoulli", "gaussian"])
def test_units_of_a_convolution_are_agents_each(unit):
    torch.manual_seed(0)
    module, (x, y) = Plain(SmallCNN((1, 8, 8), [3, 4], 3).double()), images(torch.float64)
    rule = bpf.TeamReinforce(unit=unit)
    found = estimate(rule, module, (x, y))
    rule.uninstall()
    features, head = module.net.features, module.net.head
    segments = [features[0], features[2], lambda h: head(features[4](h).flatten(1))]
    hand = ByHand(segments, rule._team.units * 2).run(x)
    assert hand.values[0].shape == (4 * 6, 3, 8, 8)
    expected = hand.gradients(list(module.parameters()), advantages(rewards_of_classes(hand, y), 4))
    assert_same(found, dict(zip(found, expected, strict=True)))


@pytest.mark.parametrize("settings", [{}, {"credit": "weight_max"}, {"credit": "ste"}, {"baseline": "per_layer"}])
def test_convolutions_train_in_every_layer(settings):
    torch.manual_seed(0)
    module = Problem(SmallCNN((1, 8, 8), [3, 4], 3, norm="batch"), lr=0.1)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    fitted(module, DataLoader(TensorDataset(*images()), batch_size=6), bpf.TeamReinforce(**settings))
    for name, parameter in module.named_parameters():
        assert bool(torch.isfinite(parameter).all())
        assert not torch.equal(parameter, before[name]) or name.endswith("bias")  # BatchNorm takes those out again
    assert module.net(images()[0]).shape == (6, 3)


class Residual(nn.Module):
    """A stream with a branch: what is above an activation also sees what was before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 5), nn.LayerNorm(5)
        self.first, self.branch, self.second, self.head = nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)

    def forward(self, x):
        x = self.norm(self.embed(x))
        x = x + self.branch(self.first(x))
        return self.head(self.second(x))


@pytest.mark.parametrize("credit", ["reward", "weight_max"])
def test_layers_that_share_a_stream_learn(credit):
    module, (x, y) = Plain(Residual().double()), vectors()
    found = estimate(bpf.TeamReinforce(credit=credit), module, (x, y))
    if credit == "weight_max":
        return
    net, generator = module.net, torch.Generator().manual_seed(mix(3, 0))
    stream = net.norm(net.embed(x.repeat(4, 1)))
    unit = bpf.Bernoulli()
    h = unit.sample(stream.detach(), generator)
    above = stream + net.branch(h)
    k = unit.sample(above.detach(), generator)
    scores = net.head(k)
    action = bpf.Softmax().sample(scores.detach(), generator)
    total = unit.log_prob(stream, h) + unit.log_prob(above, k) + bpf.Softmax().log_prob(scores, action)
    advantage = advantages(2 * (action.argmax(1) == y.repeat(4)).double() - 1, 4)
    expected = torch.autograd.grad((advantage * total).mean(), list(net.parameters()))
    assert_same(found, dict(zip(found, expected, strict=True)))


class Altered(nn.Module):
    """The potentials are what a linear layer returned, and something else since."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.a, self.b, self.act, self.c = nn.Linear(6, 5), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
        self.in_place = in_place

    def forward(self, x):
        h = self.a(x)
        if self.in_place:
            h *= 2
            h += self.b(x)
        else:
            h = 2 * h + self.b(x)
        return self.c(self.act(h))


def test_potentials_that_were_changed_in_place_are_seen():
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        found.append(estimate(bpf.TeamReinforce(), Plain(Altered(in_place).double()), vectors()))
    assert_same(found[1], found[0])


def test_a_layer_may_be_called_by_keyword():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(self.act(self.a(input=x)))

    estimate(bpf.TeamReinforce(), Plain(Named().double()), vectors())


def test_functions_cannot_be_replaced():
    module = Problem(SmallTransformer((1, 8, 8), 3, dim=8, heads=2))
    with pytest.raises(ValueError, match=r"that is a module, and functions.*activation=nn\.GELU\(\)"):
        fitted(module, DataLoader(TensorDataset(*images()), batch_size=6), bpf.TeamReinforce())


class Attends(nn.Module):
    """An encoder whose activations are modules."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation=nn.GELU(), batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x.flatten(1, 2)).mean(1))


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_transformer_of_modules_trains(norm_first):
    torch.manual_seed(0)
    module, (x, y) = Plain(Attends(norm_first)), images()
    found = estimate(bpf.TeamReinforce(), module, (x, y))
    assert all(bool(gradient.any()) or "in_proj_bias" in name for name, gradient in found.items())


@pytest.mark.parametrize("grad", [True, False])
def test_a_fused_encoder_does_not_pass_the_units_by(grad):
    """Without a graph, torch computes a layer of an encoder in one kernel, activation and all, unless it has hooks."""
    torch.manual_seed(0)
    module, (x, _) = Plain(Attends(True)), images()
    bpf.TeamReinforce().install(module)
    expected = module.train().net(x)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(module.eval().net(x), expected, rtol=1e-5, atol=1e-5)  # float32


# --- what is learned elsewhere ---------------------------------------------------------------------------------------


class Tempered(Plain):
    """A temperature and a critic beside the network, trained by the module's own loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.temperature = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.critic = nn.Linear(6, 1).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.scores = self.net(x)
        return F.cross_entropy(self.scores / self.temperature, y) + self.critic(x).square().mean()


def test_parameters_outside_of_the_network_learn_from_the_loss():
    module, (x, y) = Tempered(network(6, 5, 3)), vectors()
    found = estimate(bpf.TeamReinforce(network="net"), module, (x, y))
    alone = Plain(module.net)
    assert_same({n: g for n, g in found.items() if n.startswith("net.")}, estimate(bpf.TeamReinforce(), alone, (x, y)))
    loss = F.cross_entropy(module.scores / module.temperature, y) + module.critic(x).square().mean()
    own = [module.temperature, *module.critic.parameters()]
    expected = torch.autograd.grad(loss, own)
    for name, gradient in zip(("temperature", "critic.weight", "critic.bias"), expected, strict=True):
        assert torch.equal(-found[name], gradient)


def test_frozen_parameters_stay_and_change_nothing_for_the_others():
    batch = vectors()
    plain = estimate(bpf.TeamReinforce(), Plain(network(6, 5, 4, 3)), batch)
    for which in (0, 2, 4):
        net = network(6, 5, 4, 3)
        net[which].requires_grad_(False)
        found = estimate(bpf.TeamReinforce(), Plain(net), batch)
        assert plain.keys() - found.keys() == {f"net.{which}.weight", f"net.{which}.bias"}
        assert all(torch.equal(gradient, plain[name]) for name, gradient in found.items())


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.first, self.second, self.head = nn.Linear(6, 6), nn.Tanh(), nn.Tanh(), nn.Linear(6, 3)
        self.b = self.a if tied else copy.deepcopy(self.a)

    def forward(self, x):
        return self.head(self.second(self.b(self.first(self.a(x)))))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"credit": "weight_max"},
        {"credit": "ste"},
        {"num_samples": 1, "baseline": "none", "trace_decay": 0.0},
    ],
    ids=["reward", "weight_max", "ste", "traces"],
)
def test_tied_layers_get_the_sum_of_what_two_get(settings):
    batch = vectors()
    tied = estimate(bpf.TeamReinforce(**settings), Plain(Tied(True).double()), batch)
    loose = estimate(bpf.TeamReinforce(**settings), Plain(Tied(False).double()), batch)
    for kind in ("weight", "bias"):
        both = loose[f"net.a.{kind}"] + loose[f"net.b.{kind}"]
        torch.testing.assert_close(tied[f"net.a.{kind}"], both, rtol=EXACT, atol=EXACT)


def test_several_draws_of_a_network_that_takes_further_arguments():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.act, self.head = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)

        def forward(self, x, scale, *, shift, number=1.0):
            return self.head(self.act(self.one(x * scale + shift))) * number

    class Passes(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self.net(x, scale, shift=shift, number=0.5), y)

    x, y = vectors()
    scale, shift = torch.rand(8, 1, dtype=torch.float64), torch.ones(6, dtype=torch.float64)  # a row each, and one
    module = Passes(Scaled().double())
    rule = bpf.TeamReinforce(eval_samples=3, evaluation="samples")
    found = estimate(rule, module, (x, y))
    assert module.net(x, scale, shift=shift).shape == (8, 3)
    rule.uninstall()
    net = module.net
    hand = ByHand([lambda z: net.one(z * scale.repeat(4, 1) + shift), lambda h: net.head(h) * 0.5], [bpf.Bernoulli()])
    hand.run(x)
    expected = hand.gradients(list(net.parameters()), advantages(rewards_of_classes(hand, y), 4))
    assert_same(found, dict(zip(found, expected, strict=True)))
