"""Which activations become units, and what the network keeps while they are installed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from enumerated import network
from problems import fitted, loader
from team_problems import (
    ByHand,
    Plain,
    advantages,
    assert_same,
    estimate,
    problem,
    rewards_of_classes,
    trained,
    untouched,
    validated,
    vectors,
)
from torch import nn

import lightning_bpfree as bpf

# --- which activations -----------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.relu = nn.Linear(6, 5), nn.ReLU()
        self.body = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Dropout(0.0), nn.Linear(5, 5), nn.ReLU())
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(self.relu(self.one(x))))


def sites(module: nn.Module, **settings: Any) -> list[str]:
    rule = bpf.TeamReinforce(**settings)
    rule.install(module)
    return rule.describe()["in place of"].split(", ")


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        (None, ["net.relu", "net.body.1", "net.body.4"]),
        ("net.relu", ["net.relu"]),
        ("net.body.*[14]", ["net.body.1", "net.body.4"]),
        (nn.ReLU, ["net.relu", "net.body.4"]),
        ("ReLU", ["net.relu", "net.body.4"]),
        ("torch.nn.Tanh", ["net.body.1"]),
        (["Tanh", "net.relu"], ["net.relu", "net.body.1"]),
        ((nn.Tanh, nn.ReLU), ["net.relu", "net.body.1", "net.body.4"]),
    ],
)
def test_units_are_found_by_name_by_type_or_by_themselves(units, expected):
    assert sites(Plain(Mixed()), units=units) == expected


def test_units_that_are_not_named_stay_activations():
    module, x = Plain(Mixed()).eval(), vectors(dtype=torch.float32)[0]
    bpf.TeamReinforce("net.body.1").install(module)
    net = module.net
    middle = torch.sigmoid(net.body[0](torch.relu(net.one(x))))  # the mean of Bernoulli units
    expected = net.head(torch.relu(net.body[3](middle)))
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)  # float32, in another order


def test_a_networks_own_stochastic_units_come_first_and_keep_their_settings():
    own = bpf.Bernoulli("plus_minus_one", 1.7)
    net = nn.Sequential(nn.Linear(6, 5), own, nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    module, (x, y) = Plain(net), vectors()
    rule = bpf.TeamReinforce(unit="bernoulli")
    found = estimate(rule, module, (x, y))
    assert rule.describe()["in place of"] == "net.1"
    rule.uninstall()
    hand = ByHand([net[0], lambda h: net[4](torch.relu(net[2](h)))], [own]).run(x)
    expected = hand.gradients(list(module.parameters()), advantages(rewards_of_classes(hand, y), 4))
    assert_same(found, dict(zip(found, expected, strict=True)))


def test_one_activation_that_runs_twice_is_two_layers():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.act = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3), nn.ReLU()

        def forward(self, x):
            return self.c(self.act(self.b(self.act(self.a(x)))))

    module, (x, y) = Plain(Shared().double()), vectors()
    found = estimate(bpf.TeamReinforce(unit=["bernoulli", "sign"]), module, (x, y))
    net = module.net
    hand = ByHand([net.a, net.b, net.c], [bpf.Bernoulli(), bpf.Bernoulli("plus_minus_one")]).run(x)
    expected = hand.gradients(list(net.parameters()), advantages(rewards_of_classes(hand, y), 4))
    assert_same(found, {n: g for (n, _), g in zip(module.named_parameters(), expected, strict=True)})


def test_every_layer_may_have_units_of_its_own():
    module, (x, y) = Plain(network(6, 5, 4, 3)), vectors()
    units = [bpf.Gaussian(0.2, "tanh"), bpf.Bernoulli(temperature=0.5)]
    found = estimate(bpf.TeamReinforce(unit=units), module, (x, y))
    net = module.net
    hand = ByHand([net[0], net[2], net[4]], units).run(x)
    expected = hand.gradients(list(net.parameters()), advantages(rewards_of_classes(hand, y), 4))
    assert_same(found, {n: g for (n, _), g in zip(module.named_parameters(), expected, strict=True)})


# --- in the network's place ------------------------------------------------------------------------------------------


def test_the_state_dict_does_not_notice():
    module = problem(lr=0.05)
    keys = list(module.state_dict())
    rule = bpf.TeamReinforce(exploration="boltzmann", baseline="per_layer")
    fitted(module, loader(), rule)
    assert rule._network.installed
    assert list(module.state_dict()) == keys
    plain = problem(seed=9)
    plain.load_state_dict(module.state_dict(), strict=True)
    x = torch.randn(4, 6)
    with rule.without():
        assert torch.equal(module.net(x), plain.net(x))


def test_the_network_comes_back_bit_for_bit():
    module, x = problem(), torch.randn(5, 6)
    expected = module.net(x)
    rule = bpf.TeamReinforce(exploration="recurrent")
    rule.install(module)
    installed = module.net(x)
    assert not torch.equal(installed, expected)
    twin = copy.deepcopy(module)
    with rule.without():
        assert torch.equal(module.net(x), expected)
        assert untouched(module)
    assert torch.equal(module.net(x), installed)  # and goes again
    rule.uninstall()
    assert untouched(module)
    assert torch.equal(module.net(x), expected)
    assert torch.equal(twin.net(x), installed)  # a copy is another network
    rule.uninstall(twin)
    assert untouched(twin)
    assert torch.equal(twin.net(x), expected)
    rule.uninstall(twin)  # twice does no harm
    with rule.without():  # what was not installed is not installed behind it
        pass
    assert untouched(module)


def test_a_forward_pass_that_someone_else_has_replaced_comes_back():
    module, x = problem(), torch.randn(5, 6)
    own = type(module.net).forward.__get__(module.net)
    module.net.forward = lambda inputs: own(inputs) + 1
    module.net.layers[1].forward = lambda inputs: 2 * torch.relu(inputs)
    forwards = [module.net.forward, module.net.layers[1].forward]
    expected = module.net(x)
    rule = bpf.TeamReinforce()
    rule.install(module)
    other = bpf.TeamReinforce("sign")  # a second rule takes over from the first
    other = bpf.TeamReinforce(unit="sign")
    other.install(module)
    other.uninstall()
    assert [module.net.forward, module.net.layers[1].forward] == forwards
    assert torch.equal(module.net(x), expected)


def test_a_fitted_network_can_be_copied_and_pickled():
    module = problem(lr=0.05)
    fitted(module, loader(), bpf.TeamReinforce(exploration="boltzmann", lateral_lr=0.1))
    module.trainer = None
    x = torch.randn(4, 6)
    for other in (copy.deepcopy(module.net), pickle.loads(pickle.dumps(module.net))):
        assert torch.equal(other(x), module.net(x))
        with torch.no_grad():
            other.layers[0].weight.zero_()  # a copy is its own network
        assert not torch.equal(other(x), module.net(x))


def test_nothing_is_noted_of_calls_after_a_validation():
    module = validated(lr=0.05)
    trained(module, bpf.TeamReinforce(), val=loader())
    module.trainer = None
    module.net(torch.randn(4, 6))
    copy.deepcopy(module.net)  # a tensor with a graph cannot be copied


@pytest.mark.parametrize("unit", ["bernoulli", "sign"])
def test_after_the_fit_the_network_goes_on_giving_means(unit):
    module = problem(lr=0.05)
    fitted(module, loader(), bpf.TeamReinforce(unit=unit))
    x, layers = torch.randn(5, 6), module.net.layers
    mean = torch.sigmoid if unit == "bernoulli" else lambda z: torch.tanh(z / 2)
    by_hand = layers[4](mean(layers[2](mean(layers[0](x)))))
    torch.testing.assert_close(module.net(x), by_hand, rtol=1e-5, atol=1e-6)  # float32
    assert torch.equal(module.net(x), module.net(x))


def test_predictions_follow_the_rule_of_the_last_epoch():
    x = torch.randn(5, 6)
    for window, by_team in (({"start_epoch": 5}, False), ({"stop_epoch": 1}, True), ({}, True)):
        module, rule = validated(lr=0.1), bpf.TeamReinforce(**window)
        trainer = trained(module, rule)
        trainer.test(module, loader(), verbose=False)
        assert rule._network.installed == by_team
        assert untouched(module) != by_team
        assert module.net(x).shape == (5, 3)
    module, rule = validated(lr=0.1), bpf.TeamReinforce(stop_epoch=1)
    trainer = trained(module, rule, max_epochs=2)
    trainer.test(module, loader(), verbose=False)
    assert untouched(module)
