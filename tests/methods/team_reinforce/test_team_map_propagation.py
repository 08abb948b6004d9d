"""MAP propagation in a fit: the gate, the guard, and a network that runs again."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from enumerated import network
from problems import Problem, fitted, loader
from team_problems import EXACT, QUIET, ByHand, Plain, Regresses, assert_same, estimate, targets, vectors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.demos.modules import MLP
from lightning_bpfree.demos.regression import Regressor
from lightning_bpfree.methods.team_reinforce.layer import Layer


def climbed(net: nn.Sequential, x: Tensor, unit: bpf.Gaussian, output: bpf.Gaussian, steps: int, seed: int = 3):
    """Hidden values after the ascent, and the action: a loop, with autograd of the log probability."""
    hand = ByHand([net[0], net[2], net[4]], [unit] * 2, output, samples=2, seed=seed).run(x)
    values, below = [value.detach() for value in hand.values], x.repeat(2, 1)
    for _ in range(steps):
        one, two = (value.requires_grad_() for value in values)
        total = unit.log_prob(net[0](below), one) + unit.log_prob(net[2](one), two)
        total = total + output.log_prob(net[4](two), hand.action)
        moves = torch.autograd.grad(total.sum(), [one, two])
        values = [(v + 0.5 * unit.variance * move).detach() for v, move in zip((one, two), moves, strict=True)]
    return values, hand.action


@pytest.mark.parametrize("steps", [0, 3])
def test_with_a_gate_the_output_learns_by_the_delta_rule(steps):
    """And hidden units by their deviation times the target's over the draw's, wherever the ascent has led."""
    (x, _), unit, output = vectors(), bpf.Gaussian(0.3), bpf.Gaussian(0.1, "linear")
    module, y, guard = Regresses(network(6, 5, 4, 1, spread=0.5)), targets(vectors()[0]), 0.4
    credit = bpf.MapPropagation(steps, gate=True, guard=guard)
    rule = bpf.TeamReinforce(unit=unit, output=output, credit=credit, reward="module", num_samples=2)
    found = estimate(rule, module, (x, y))
    rule.uninstall()
    net = module.net
    values, action = climbed(net, x, unit, output, steps)
    with torch.no_grad():
        mean, target = net[4](values[1]), y.repeat(2, 1)
        delta = (target - mean) / output.variance
        assert_same(
            {name: found[name] for name in ("net.4.weight", "net.4.bias")},
            {"net.4.weight": delta.T @ values[1] / 16, "net.4.bias": delta.mean(0)},
        )
        deviation = action - mean
        least = guard * output.variance**0.5
        assert bool((deviation.abs() < least).any())  # the guard matters
        guarded = torch.where(deviation.abs() < least, least * deviation.sign(), deviation)
        ratio = (target - mean) / guarded
        for place, below, value in ((0, x.repeat(2, 1), values[0]), (2, values[0], values[1])):
            signal = ratio * unit.score(net[place](below), value)
            expected = {f"net.{place}.weight": signal.T @ below / 16, f"net.{place}.bias": signal.mean(0)}
            assert_same({name: found[name] for name in expected}, expected)


@pytest.mark.parametrize("guard", [0.1, 1.0, 100.0])
def test_the_guard_bounds_what_the_gate_multiplies_by(guard):
    unit = bpf.Gaussian(0.25, "linear")
    mean = torch.zeros(5, 1, dtype=torch.float64)
    drawn = torch.tensor([[0.0], [1e-9], [-1e-9], [0.3], [-2.0]], dtype=torch.float64)
    layer, target = Layer("output", unit, mean, drawn), torch.full((5, 1), 0.7, dtype=torch.float64)
    found = bpf.MapPropagation(gate=True, guard=guard)._gated(layer, target)
    assert bool((found.abs() <= 0.7 / (guard * 0.5) + EXACT).all())
    assert torch.equal(found > 0, torch.tensor([True, True, False, True, False]))
    free = drawn[:, 0].abs() > guard * 0.5
    torch.testing.assert_close(found[free], 0.7 / drawn[free, 0], rtol=EXACT, atol=EXACT)


def test_the_gate_trains_a_regressor():
    torch.manual_seed(0)
    x, _ = vectors(rows=32, dtype=torch.float32)
    data = DataLoader(TensorDataset(x, targets(x)), batch_size=16)
    module = Regressor(MLP(6, [8, 8], 1), lr=1e-3)
    before = [parameter.clone() for parameter in module.parameters()]
    output = bpf.Gaussian(0.1, "linear")
    credit = bpf.MapPropagation(gate=True)
    rule = bpf.TeamReinforce(unit="gaussian", output=output, credit=credit, reward="module")
    pl.Trainer(callbacks=[rule], max_epochs=1, **QUIET).fit(module, data, data)
    assert not any(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


class Drops(nn.Module):
    """Not a chain of linear layers, and its forward pass draws a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.drop, self.two = nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)

    def forward(self, x):
        return self.two(self.drop(self.act(self.one(x))))


def test_a_network_that_runs_again_has_the_same_dropout():
    """No step of ascent: REINFORCE, at the values that were drawn, under the mask under which the action was drawn."""

    class Augments(Plain):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return super().training_step((x + 0.1 * torch.randn_like(x), y), batch_idx)  # moves the stream before

    module = Augments(Drops().double())
    found = []
    for credit in (bpf.MapPropagation(0), "reward"):
        torch.manual_seed(6)
        found.append(estimate(bpf.TeamReinforce(unit="gaussian", credit=credit), module, vectors()))
    assert_same(found[0], found[1])


def test_running_again_moves_no_stream_and_no_buffer():
    streams, averages = [], []
    for credit in (bpf.MapPropagation(2), "reward"):
        torch.manual_seed(6)
        net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
        module = Problem(net, lr=0.0)
        fitted(module, loader(rows=32), bpf.TeamReinforce(unit="gaussian", credit=credit))
        streams.append(torch.get_rng_state())
        averages.append(net[2].running_mean)
        assert int(net[2].num_batches_tracked) == 2
    assert torch.equal(*streams)
    assert torch.equal(*averages)
