"""Traces of a team are decaying sums of scores times inputs, environment by environment."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from enumerated import network
from team_problems import EXACT, QUIET, Acts, Between, ByHand, Plain, assert_same, estimate, vectors
from torch import Tensor

import lightning_bpfree as bpf
from lightning_bpfree.demos.modules import MLP

DECAY, ENVIRONMENTS = 0.8, 4


def online(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Observations, temporal-difference errors and ends of a step, the same in every test."""
    draws = torch.Generator().manual_seed(100 + step)
    x = torch.randn(ENVIRONMENTS, 3, generator=draws, dtype=torch.float64)
    delta = torch.randn(ENVIRONMENTS, generator=draws, dtype=torch.float64)
    return x, delta, torch.arange(ENVIRONMENTS) == step  # environment 1 ends at step 1, and so on


def traced(credit: str, steps: range, rule: bpf.TeamReinforce, module: Acts) -> list[dict[str, Tensor]]:
    found = []
    for step in steps:
        x, module.rewards, module.done = online(step)
        module.noise.manual_seed(step)
        found.append(estimate(rule, module, (x,), seed=step))
    return found


def traces_by_hand(credit: str, module: Acts, steps: range) -> list[dict[str, Tensor]]:
    """Loops over environments, layers and steps; every weight has a trace in every environment."""
    net = module.net
    layers = [(f"net.{place}", net[place]) for place in (0, 2, 4)]
    traces = {(name, b): (0.0, 0.0) for name, _ in layers for b in range(ENVIRONMENTS)}
    found = []
    for step in steps:
        x, delta, done = online(step)
        hand = ByHand([net[0], net[2], net[4]], [bpf.Bernoulli()] * 2, samples=1, seed=step).run(x)
        values = [x, *hand.values]
        drawn = [*hand.values, bpf.Softmax().sample(hand.last, torch.Generator().manual_seed(step))]
        total = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
        with torch.no_grad():
            for b in range(ENVIRONMENTS):
                reward = torch.full((3,), float(delta[b]), dtype=torch.float64)
                for place in (2, 1, 0):
                    name, linear = layers[place]
                    field = linear(values[place][b])
                    mean = torch.softmax(field, 0) if place == 2 else torch.sigmoid(field)
                    score = drawn[place][b] - mean
                    weight, bias = traces[name, b]
                    weight = DECAY * weight + torch.outer(score, values[place][b])
                    bias = DECAY * bias + score
                    traces[name, b] = (0.0, 0.0) if done[b] else (weight, bias)
                    total[f"{name}.weight"] += reward[:, None] * weight / ENVIRONMENTS
                    total[f"{name}.bias"] += reward * bias / ENVIRONMENTS
                    if credit == "weight_max":
                        below = [
                            sum(linear.weight[o, i] * reward[o] * weight[o, i] for o in range(len(reward)))
                            for i in range(linear.in_features)
                        ]
                        reward = torch.stack(below)
                    elif place:
                        reward = torch.full((linear.in_features,), float(delta[b]), dtype=torch.float64)
        found.append(total)
    return found


def online_rule(credit: str, **settings: Any) -> bpf.TeamReinforce:
    return bpf.TeamReinforce(
        reward="step", num_samples=1, baseline="none", credit=credit, trace_decay=DECAY, **settings
    )


def online_module() -> Acts:
    return Acts(network(3, 4, 3, 3), torch.zeros(ENVIRONMENTS), torch.zeros(ENVIRONMENTS, dtype=torch.bool))


@pytest.mark.parametrize("credit", ["reward", "weight_max"])
def test_traces_are_decaying_sums_of_scores_times_inputs(credit):
    module, rule = online_module(), online_rule(credit)
    found = traced(credit, range(5), rule, module)
    rule.uninstall()
    for one, expected in zip(found, traces_by_hand(credit, module, range(5)), strict=True):
        assert_same(one, expected, EXACT)


@pytest.mark.parametrize("credit", ["reward", "weight_max"])
def test_traces_begin_anew_where_an_environment_does(credit):
    module, rule = online_module(), online_rule(credit)
    traced(credit, range(2), rule, module)  # environment 0 ends with the first step, 1 with the second
    alone = online_rule(credit)
    traced(credit, range(1, 2), alone, module)
    for name, total in rule._traces.sums.items():
        assert not total[1].any()
        assert torch.equal(total[0], alone._traces.sums[name][0])
        assert bool(total[0].any())
        assert not any(torch.equal(total[b], alone._traces.sums[name][b]) for b in (2, 3))


def test_traces_are_saved_and_restored():
    module, whole = online_module(), online_rule("reward")
    expected = traced("reward", range(5), whole, module)
    first = online_rule("reward")
    traced("reward", range(3), first, module)
    state = first.rule_state()
    traced("reward", range(3, 4), first, module)  # what was saved is a copy
    again = online_rule("reward")
    again.load_rule_state(state)
    for one, other in zip(traced("reward", range(3, 5), again, module), expected[3:], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_traces_of_map_propagation_are_of_the_values_it_leads_to():
    module = online_module()
    rule = online_rule(bpf.MapPropagation(3), unit="gaussian")
    plain = bpf.TeamReinforce(
        reward="step", num_samples=1, baseline="none", credit=bpf.MapPropagation(3), unit="gaussian"
    )
    (first,) = traced("map", range(1), rule, module)
    (expected,) = traced("map", range(1), plain, module)
    assert_same(first, expected, EXACT)  # one step has no past


def test_traces_of_map_propagation_score_the_action_where_values_have_moved():
    """Without a past they are the rule without traces, whoever chooses the action."""
    settings = {"unit": "gaussian", "credit": "map_propagation", "num_samples": 1, "baseline": "none"}
    module, batch = Plain(MLP(6, [5, 4], 3).double()), vectors()
    plain = estimate(bpf.TeamReinforce(**settings), module, batch)
    traced_ = estimate(bpf.TeamReinforce(trace_decay=0.5, **settings), module, batch)
    assert_same(traced_, plain, EXACT)


def test_traces_of_weight_maximization_need_outgoing_weights():
    rule = bpf.TeamReinforce(num_samples=1, baseline="none", credit="weight_max", trace_decay=0.5)
    with pytest.raises(ValueError, match="trace_decay"):
        estimate(rule, Plain(Between().double()), vectors())


def test_actor_critic_trains_by_traces():
    from lightning_bpfree.demos.actor_critic import ActorCritic, OnlineSteps

    pytest.importorskip("gymnasium")
    torch.manual_seed(0)
    module = ActorCritic(MLP(4, [8], 2), MLP(4, [8], 1), "CartPole-v1", num_envs=3, lr=0.01)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    rule = online_rule("reward", network="actor")
    trainer = pl.Trainer(callbacks=[rule], max_epochs=2, limit_val_batches=0, **QUIET)
    trainer.fit(module, OnlineSteps(20))
    for name, parameter in module.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert bool(torch.isfinite(parameter).all())


def test_the_number_of_environments_stays():
    module, rule = online_module(), online_rule("reward")
    traced("reward", range(1), rule, module)
    x, rewards, _ = online(1)
    module.rewards, module.done = rewards[:3], None
    with pytest.raises(ValueError, match=r"trace_decay: a batch of 3 rows after one of 4.*Keep the number of rows"):
        estimate(rule, module, (x[:3],))
