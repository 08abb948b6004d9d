"""What is true of TeamReinforce with real draws, through the Trainer; expectations are in `test_team_identities.py`."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from enumerated import configurations, gradient_of, log_probs, network
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from problems import Problem, fitted, loader
from resume_worker import Batches, Net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.core.replay import Replay
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.core.step import Step
from lightning_bpfree.demos.modules import MLP, SmallCNN, SmallTransformer
from lightning_bpfree.demos.regression import Regressor
from lightning_bpfree.methods.team_reinforce.baselines import leave_one_out
from lightning_bpfree.methods.team_reinforce.layer import Layer
from lightning_bpfree.methods.team_reinforce.settings import CREDITS
from lightning_bpfree.training.module_state import ModuleState

EXACT = 1e-12  # float64, sums of some dozens of numbers of size 1
ERRORS = 5.0  # standard errors

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Plain(pl.LightningModule):
    """Cross-entropy of a network; logs nothing, so that a step can be made without a Trainer."""

    def __init__(self, net: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Validated(Problem):
    """Validates too."""

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    test_step = validation_step


def problem(*widths: int, lr: float = 0.0, seed: int = 0, kind: type[Problem] = Problem) -> Any:
    torch.manual_seed(seed)
    return kind(MLP(6, widths or (8, 8), 3), lr=lr)


def validated(**settings: Any) -> Validated:
    module: Validated = problem(kind=Validated, **settings)
    return module


def trained(module: pl.LightningModule, *callbacks: pl.Callback, val: Any = None, **settings: Any) -> pl.Trainer:
    """Fit with a loader for validation."""
    options = {"max_epochs": 1, "limit_val_batches": 0 if val is None else 1.0}
    trainer = pl.Trainer(callbacks=list(callbacks), **{**QUIET, **options, **settings})
    trainer.fit(module, loader(), loader() if val is None else val)
    return trainer


def vectors(rows: int = 8, features: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(rows, features, generator=generator, dtype=dtype), torch.arange(rows) % 3


def estimate(rule: bpf.TeamReinforce, module: pl.LightningModule, batch: Any, seed: int = 3) -> dict[str, Tensor]:
    """Return what the rule makes of a batch: ascent directions by name."""
    rule.install(module)
    view = ModuleState(module, None)
    replay = Replay([view.streams, view.attributes, view.metrics], view.buffers)
    step = Step(
        module, lambda: module.training_step(batch, 0), view.slots, seed, args=(batch,), replay=replay, quiet=view.quiet
    )
    try:
        made = rule.estimate(step).resolved()
        rule.on_batch_settled(True)  # as in a fit, when no rank has failed
        return {name: -gradient for name, gradient in made.items()}
    finally:
        step.finish()


def flat(gradients: Any) -> Tensor:
    several = gradients.values() if isinstance(gradients, dict) else gradients
    return torch.cat([gradient.flatten() for gradient in several])


class ByHand:
    """REINFORCE written down plainly: draws in the order of the layers, and autograd of the weighted log probability.

    Args:
        segments: what leads to the potentials of every layer of units, and to the output.
        units: of the layers.
        output: what acts.
        samples: draws of each input.
        seed: of the step.
    """

    def __init__(
        self,
        segments: Sequence[Callable[[Tensor], Tensor]],
        units: Sequence[bpf.Bernoulli | bpf.Gaussian],
        output: Any = None,
        samples: int = 4,
        seed: int = 3,
    ) -> None:
        self.segments, self.units, self.samples, self.seed = segments, units, samples, seed
        self.output = bpf.Softmax() if output is None else output

    def run(self, x: Tensor) -> ByHand:
        generator = torch.Generator().manual_seed(mix(self.seed, 0))
        below = x.repeat(self.samples, *[1] * (x.dim() - 1))
        self.log_prob, self.values = torch.zeros(len(below), dtype=x.dtype), []
        for segment, unit in zip(self.segments, self.units, strict=False):
            potential = segment(below)
            below = unit.sample(potential.detach(), generator)
            self.values.append(below)
            self.log_prob = self.log_prob + unit.log_prob(potential, below)
        self.last = self.segments[-1](below)
        self.action = self.output.sample(self.last.detach(), generator)
        return self

    def gradients(self, parameters: Sequence[Tensor], advantage: Tensor) -> list[Tensor]:
        total = self.log_prob + self.output.log_prob(self.last, self.action)
        return list(torch.autograd.grad((advantage * total).mean(), list(parameters)))


def rewards_of_classes(hand: ByHand, labels: Tensor) -> Tensor:
    return 2 * (hand.action.argmax(1) == labels.repeat(hand.samples)).double() - 1


def advantages(rewards: Tensor, samples: int) -> Tensor:
    """Each reward minus the mean of the others of its input, written as a loop."""
    table = rewards.view(samples, -1)
    rows = []
    for m in range(samples):
        others = [table[n] for n in range(samples) if n != m]
        rows.append(table[m] - torch.stack(others).mean(0))
    return torch.stack(rows).flatten()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance)
        assert gradient.any(), f"{name}: nothing was compared"


# --- the estimator --------------------------------------------------------------------------------------------------


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
    assert seen[0][0] is batch  # as the loader gave it, not repeated


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


# --- which activations ----------------------------------------------------------------------------------------------


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


# --- in the network's place -----------------------------------------------------------------------------------------


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


def untouched(net: nn.Module) -> bool:
    return not any("forward" in part.__dict__ or part._forward_hooks for part in net.modules())


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


# --- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"exploration": "boltzmann"},
        {"exploration": bpf.Boltzmann(2, whole_network=True)},
        {"exploration": "recurrent", "negative_phase": True},
        {"exploration": "boltzmann", "evaluation": "samples"},
    ],
    ids=["boltzmann", "whole_network", "recurrent", "samples"],
)
def test_validating_from_a_checkpoint_gives_equal_bits(settings, tmp_path):
    def rule():
        return bpf.TeamReinforce(lateral_lr=0.2, **settings)

    module, first = validated(lr=0.05), rule()
    trainer = trained(module, first, val=loader())
    (here,) = trainer.validate(module, loader(), verbose=False)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    torch.manual_seed(99)  # another process
    fresh = validated(seed=1)
    (there,) = pl.Trainer(callbacks=[rule()], **QUIET).validate(
        fresh, loader(), ckpt_path=str(tmp_path / "it.ckpt"), verbose=False
    )
    assert here == there  # all metrics, val_loss among them
    saved = torch.load(tmp_path / "it.ckpt", weights_only=True)
    again = rule()
    again.load_state_dict(saved["callbacks"][again.state_key])
    plain = problem(seed=2)
    plain.load_state_dict(saved["state_dict"], strict=True)
    again.install(plain)
    x = torch.randn(4, 6)
    if "evaluation" not in settings:
        assert torch.equal(plain.net(x), module.net(x))
    loose = problem(seed=2)  # lateral weights are part of what was learnt
    loose.load_state_dict(saved["state_dict"])
    rule().install(loose)
    assert not torch.equal(loose.net(x), module.net(x))


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(1) == labels).float().mean())


def test_means_and_draws_are_both_reported():
    """Draws of three units, against all their eight configurations."""
    torch.manual_seed(3)
    module = Validated(MLP(6, [3], 3), lr=0.0)
    with torch.no_grad():
        module.net.layers[2].weight.mul_(3)
    draws, data = 4000, loader(rows=16)
    rule = bpf.TeamReinforce(eval_samples=draws)
    found = {}
    for evaluation in ("mean", "samples"):
        rule = bpf.TeamReinforce(eval_samples=draws, evaluation=evaluation, seed=1)
        (found[evaluation],) = pl.Trainer(callbacks=[rule], **QUIET).validate(module, data, verbose=False)
    rule.uninstall()
    key = "bpfree/team_reinforce/val_{}_{}".format
    reported = {key(what, way) for what in ("acc", "reward") for way in ("mean", "samples")}
    assert reported == {name for name in found["mean"] if name.startswith("bpfree")}
    for name in reported:
        assert found["mean"][name] == found["samples"][name]  # whichever of the two the network returns
    for evaluation, metrics in found.items():
        assert metrics["val_acc"] == metrics[key("acc", evaluation)]

    x, y = next(iter(data))
    layers = module.net.layers.requires_grad_(False)
    means = layers[2](torch.sigmoid(layers[0](x)))
    assert found["mean"][key("acc", "mean")] == pytest.approx(accuracy(means, y), abs=1e-6)
    chance = torch.softmax(means, 1)[torch.arange(16), y]
    assert found["mean"][key("reward", "mean")] == pytest.approx(float(2 * chance.mean() - 1), abs=1e-5)

    (hidden,), _ = configurations(3, actions=1)
    law = torch.stack([bpf.Bernoulli().log_prob(layers[0](x), h.float().expand(16, -1)).exp() for h in hidden])
    chances = torch.softmax(layers[2](hidden.float()), 1)[:, y]  # (8, 16)
    average = (law * chances).sum(0)
    variance = (law * chances.square()).sum(0) - average.square()
    error = 2 * float(variance.sum().sqrt()) / 16 / draws**0.5
    expected = float(2 * average.mean() - 1)
    assert abs(found["mean"][key("reward", "samples")] - expected) < ERRORS * error + 1e-6  # and float32
    assert abs(found["mean"][key("reward", "mean")] - expected) > 2 * ERRORS * error  # the two differ


def test_the_report_of_a_fit_is_in_its_metrics_and_in_a_test():
    module = validated(lr=0.05)
    trainer = trained(module, bpf.TeamReinforce(), val=loader(), log_every_n_steps=1)
    assert {f"bpfree/team_reinforce/val_acc_{way}" for way in ("mean", "samples")} <= trainer.callback_metrics.keys()
    assert "bpfree/team_reinforce/reward" in trainer.callback_metrics  # of training
    (found,) = trainer.test(module, loader(), verbose=False)
    assert {f"bpfree/team_reinforce/test_reward_{way}" for way in ("mean", "samples")} <= found.keys()


def test_batches_without_labels_are_not_reported():
    class Bare(Plain):
        def test_step(self, batch, batch_idx):
            self.log("size", float(len(self.net(batch))))

    torch.manual_seed(0)
    module = Bare(MLP(6, [4], 3))
    data = DataLoader(torch.randn(8, 6), batch_size=4)
    (found,) = pl.Trainer(callbacks=[bpf.TeamReinforce()], **QUIET).test(module, data, verbose=False)
    assert found == {"size": 4.0}


def test_a_barebones_fit_is_not_reported():
    class Bare(Plain):
        def validation_step(self, batch, batch_idx):
            self.net(batch[0])

    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu", barebones=True, max_epochs=1, limit_val_batches=1, callbacks=[bpf.TeamReinforce()]
    )
    trainer.fit(Bare(MLP(6, [4], 3)), loader(), loader())  # a warning is an error here


@pytest.mark.parametrize("exploration", ["independent", "boltzmann"])
def test_averages_of_many_draws_come_near_the_average(exploration):
    """With zero lateral weights for all: the law is the independent one."""
    torch.manual_seed(3)
    module, (x, _) = Plain(MLP(6, [3], 3).double()), vectors()
    layers = module.net.layers
    (hidden,), _ = configurations(3, actions=1)
    law = torch.stack([bpf.Bernoulli().log_prob(layers[0](x), h.expand(8, -1)).exp() for h in hidden])
    chances = torch.softmax(layers[2](hidden), 1)[:, None]
    average = (law[..., None] * chances).sum(0)
    variance = (law[..., None] * chances.square()).sum(0) - average.square()
    draws = 5000
    rule = bpf.TeamReinforce(exploration=exploration, evaluation="samples", eval_samples=draws)
    rule.install(module)
    found = torch.softmax(module.net(x), 1)
    assert bool(((found - average).abs() <= ERRORS * (variance / draws).sqrt()).all())
    first = module.net(x)
    assert not torch.equal(first, module.net(x))  # each call draws anew


@pytest.mark.parametrize("exploration", ["independent", "boltzmann", "recurrent", bpf.Boltzmann(whole_network=True)])
@pytest.mark.parametrize("evaluation", ["mean", "samples"])
def test_evaluation_moves_no_global_random_stream(evaluation, exploration):
    module = problem()
    bpf.TeamReinforce(evaluation=evaluation, exploration=exploration).install(module)
    before = torch.get_rng_state()
    module.net(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_validation_draws_the_same():
    module, rule = validated(), bpf.TeamReinforce(evaluation="samples", eval_samples=3)
    trainer = pl.Trainer(callbacks=[rule], **QUIET)
    (one,) = trainer.validate(module, loader(), verbose=False)
    (two,) = trainer.validate(module, loader(), verbose=False)
    assert one == two


def test_validating_before_the_fit_changes_nothing():
    losses = []
    for first in (False, True):
        module, rule = validated(lr=0.1), bpf.TeamReinforce(evaluation="samples", eval_samples=2)
        trainer = pl.Trainer(max_epochs=1, callbacks=[rule], **QUIET)
        if first:
            trainer.validate(module, loader(), verbose=False)
        torch.manual_seed(5)
        trainer.fit(module, loader(), loader())
        losses.append(trainer.validate(module, loader(), verbose=False)[0]["val_loss"])
    assert losses[0] == losses[1]


# --- other networks -------------------------------------------------------------------------------------------------


def images(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 1, 8, 8, generator=generator, dtype=dtype), torch.arange(6) % 3


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
    with pytest.raises(ValueError, match=r"SmallTransformer has no activation that is a module \(functions.*Make them"):
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


# --- what is learned elsewhere --------------------------------------------------------------------------------------


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


# --- rewards --------------------------------------------------------------------------------------------------------


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


class Regresses(Plain):
    """The reward is a method of the module."""

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    reward = Regressor.reward


def targets(x: Tensor) -> Tensor:
    return x[:, :1] * x[:, 1:2]


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


class Acts(Plain):
    """Draws its action itself, and returns what it is rewarded with."""

    def __init__(self, net: nn.Module, rewards: Tensor, done: Tensor | None = None, output: Any = None) -> None:
        super().__init__(net)
        self.rewards, self.done, self.output = rewards, done, output or bpf.Softmax()
        self.actions: list[Tensor] = []
        self.noise = torch.Generator().manual_seed(8)

    def training_step(self, batch, batch_idx):
        scores = self.net(batch[0])
        self.actions.append(self.output.sample(scores, self.noise))
        action = self.actions[-1]
        if isinstance(self.output, bpf.Softmax):
            action = action.argmax(1)
        returned = {"loss": scores.square().mean(), "action": action, "reward": self.rewards}
        return returned if self.done is None else {**returned, "done": self.done}


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


# --- traces ---------------------------------------------------------------------------------------------------------

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


# --- learning rates of layers ---------------------------------------------------------------------------------------


class Steps(pl.Callback):
    """Compares every step of the optimizer with the same step written by hand, bit for bit."""

    def __init__(self, factors: dict[str, float], lr: float) -> None:
        self.factors, self.lr, self.compared = factors, lr, 0

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.before = {n: p.detach().clone() for n, p in module.named_parameters()}
        self.gradients = {n: p.grad.clone() for n, p in module.named_parameters()}

    def on_before_zero_grad(self, trainer, module, optimizer):
        if hasattr(self, "before"):
            self.compare(module)

    def compare(self, module):
        for name, parameter in module.named_parameters():
            before, factor = self.before[name], self.factors[name.rpartition(".")[0]]
            plain = before.add(self.gradients[name], alpha=-self.lr)
            expected = plain if factor == 1 else before + factor * (plain - before)
            assert torch.equal(parameter, expected), name
            close = before - self.lr * factor * self.gradients[name]
            torch.testing.assert_close(parameter.detach(), close, rtol=1e-5, atol=1e-7)  # float32
            assert torch.equal(parameter, before) == (factor == 0)
        self.compared += 1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"credit": "weight_max"}], ids=["reward", "weight_max"])
def test_factors_scale_every_step_of_their_segment_from_the_first_on(settings, accumulate):
    torch.manual_seed(0)
    module = Plain(MLP(6, [8, 8], 3), lr=0.1)
    watch = Steps({"net.layers.0": 0.5, "net.layers.2": 0.0, "net.layers.4": 3.0}, 0.1)
    rule = bpf.TeamReinforce(learning_rates=[0.5, 0.0, 3.0], **settings)
    trainer = fitted(module, loader(rows=128), rule, watch, max_epochs=2, accumulate_grad_batches=accumulate)
    watch.compare(module)  # the last step
    assert watch.compared >= trainer.global_step == 16 / accumulate


def test_one_factor_is_that_from_each_layer_to_the_next():
    several, one = problem(lr=0.1), problem(lr=0.1)
    fitted(several, loader(), bpf.TeamReinforce(learning_rates=[1.0, 0.5, 0.25], seed=1))
    fitted(one, loader(), bpf.TeamReinforce(learning_rates=0.5, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(several.parameters(), one.parameters(), strict=True))


def test_factors_end_with_the_rules_epochs():
    plain, factored = (problem(lr=0.1) for _ in range(2))
    fitted(plain, loader())
    fitted(factored, loader(), bpf.TeamReinforce(start_epoch=1, learning_rates=[0, 1, 1]))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), factored.parameters(), strict=True))


def test_factors_are_those_of_the_module_in_training():
    rule = bpf.TeamReinforce(learning_rates=[0.0, 0.0, 0.0])
    fitted(problem(lr=0.1), loader(), rule)
    module = problem(lr=0.1)
    before = [parameter.clone() for parameter in module.parameters()]
    fitted(module, loader(), rule)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


# --- lateral weights and critics in a fit ---------------------------------------------------------------------------


def lateral_weights(rule: bpf.TeamReinforce) -> dict[str, Tensor]:
    return {name: saved["module"]["weight"] for name, saved in rule.rule_state()["lateral"].items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"exploration": bpf.Boltzmann(2, 2)},
        {"exploration": bpf.Boltzmann(2, 3), "negative_phase": True, "unit": "sign"},
        {"exploration": bpf.Boltzmann(2, 2, whole_network=True)},
        {"exploration": bpf.Boltzmann(2, 2), "baseline": "per_layer", "num_samples": 1},
    ],
    ids=["leave_one_out", "negative_phase", "whole_network", "per_layer"],
)
def test_lateral_weights_learn_and_stay_symmetric_between_colours(settings):
    rule = bpf.TeamReinforce(lateral_lr=0.05, **settings)
    fitted(problem(7, 8, lr=0.1), loader(), rule)
    weights = lateral_weights(rule)
    assert weights.keys() == {"lateral/net.layers.1", "lateral/net.layers.3"}
    for name, weight in weights.items():
        assert len(weight) == (7 if name.endswith("1") else 8)
        assert torch.equal(weight, weight.T)
        groups = settings["exploration"].groups(len(weight))
        assert not any(bool(weight[group, group].any()) for group in groups)
        zeros = sum((group.stop - group.start) ** 2 for group in groups)
        assert int((weight == 0).sum()) == zeros  # all others have moved


def test_recurrent_weights_learn_without_symmetry():
    rule = bpf.TeamReinforce(exploration="recurrent", lateral_lr=0.05)
    fitted(problem(lr=0.1), loader(), rule)
    for weight in lateral_weights(rule).values():
        assert bool(weight.any())
        assert not torch.equal(weight, weight.T)


def test_what_the_rule_owns_steps_when_the_optimizer_does():
    rule = bpf.TeamReinforce(exploration="boltzmann", baseline="per_layer", lateral_lr=0.05)
    trainer = fitted(problem(lr=0.1), loader(), rule, accumulate_grad_batches=2)
    assert trainer.global_step == 2
    state = rule.rule_state()
    several = [*state["lateral"].values(), *state["critics"].values()]
    assert len(several) == 2 + 3
    for saved in several:
        assert {int(moments["step"]) for moments in saved["optimizer"]["state"].values()} == {2}
    once = bpf.TeamReinforce(exploration="boltzmann", lateral_lr=0.05)
    fitted(problem(lr=0.1), loader(), once, accumulate_grad_batches=4)
    for weight in lateral_weights(once).values():
        # The first step of Adam is the learning rate, unless the gradient is as small as its epsilon; in float32.
        moved = weight[weight != 0].abs()
        assert float(moved.max()) <= 0.05 * (1 + 1e-3)
        assert float(moved.median()) == pytest.approx(0.05, rel=1e-3)


def test_a_rule_without_draws_of_its_own_leaves_lateral_weights_alone():
    rule = bpf.TeamReinforce(exploration="boltzmann", start_epoch=5)
    fitted(problem(lr=0.1), loader(), rule)
    assert lateral_weights(rule) == {}


# --- precision ------------------------------------------------------------------------------------------------------

EVERY: dict[str, dict[str, Any]] = {
    "reward": {},
    "weight_max": {"credit": "weight_max"},
    "exact_weight_max": {"credit": bpf.WeightMax(exact=True)},
    "map_propagation": {"unit": "gaussian", "credit": "map_propagation"},
    "ste": {"credit": "ste"},
    "identity": {"credit": bpf.StraightThrough("identity")},
    "pathwise": {"unit": "gaussian", "credit": "pathwise"},
    "loss": {"output": None, "reward": "loss"},
    "boltzmann": {"exploration": "boltzmann"},
    "whole_network": {"exploration": bpf.Boltzmann(whole_network=True)},
    "recurrent": {"exploration": "recurrent"},
    "critic": {"baseline": "critic"},
    "per_layer": {"baseline": "per_layer"},
}


@pytest.mark.parametrize("name", EVERY)
def test_mixed_precision_trains_in_single(name):
    assert set(CREDITS) <= set(EVERY)
    module = problem(lr=0.1)
    fitted(module, loader(rows=32), bpf.TeamReinforce(**EVERY[name]), precision="bf16-mixed")
    assert len(module.gradients[0]) == 6
    for gradients in module.gradients:
        for gradient in gradients.values():
            assert gradient.dtype == torch.float32
            assert bool(torch.isfinite(gradient).all())
            assert bool(gradient.any())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in EVERY for dtype in (torch.bfloat16, torch.float64)],
)
def test_true_half_and_double_precision_train(name, dtype):
    torch.manual_seed(0)
    module = Plain(MLP(6, [8, 8], 3).to(dtype))
    found = estimate(bpf.TeamReinforce(**EVERY[name]), module, vectors(dtype=dtype))
    for gradient in found.values():
        assert gradient.dtype == dtype
        assert bool(torch.isfinite(gradient).all())
        assert bool(gradient.any())


# --- MAP propagation in a fit ---------------------------------------------------------------------------------------


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


# --- a resume inside an epoch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"exploration": "boltzmann", "negative_phase": True},
        {"exploration": "recurrent", "evaluation": "samples"},
        {"learning_rates": (1.0, 0.1)},
        {"start_epoch": 1},
        {"stop_epoch": 1},
    ],
    ids=lambda settings: next(iter(settings)) if "exploration" not in settings else settings["exploration"],
)
def test_a_run_that_is_resumed_inside_an_epoch_is_the_same_run(settings, tmp_path):
    def part(ckpt_path=None):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(5)
        checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        rule = bpf.TeamReinforce(**({"lateral_lr": 0.05} if "exploration" in settings else {}), **settings)
        options = {**QUIET, "enable_checkpointing": True}
        trainer = pl.Trainer(callbacks=[rule, checkpoints], max_epochs=2, **options)
        trainer.fit(Net(), Batches(), ckpt_path=ckpt_path)
        return trainer.lightning_module, rule

    whole, whole_rule = part()
    again, again_rule = part(tmp_path / "step=9.ckpt")  # two batches into the second epoch
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    one, other = lateral_weights(whole_rule), lateral_weights(again_rule)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert untouched(whole) == untouched(again)


# --- several fits, several rules ------------------------------------------------------------------------------------


def test_a_second_fit_goes_on():
    module, rule = problem(lr=0.05), bpf.TeamReinforce(exploration="boltzmann", lateral_lr=0.05)
    fitted(module, loader(), rule)
    first = lateral_weights(rule)
    fitted(module, loader(), rule)
    assert rule.record.batches == 8
    assert all(len(part._forward_hooks) == 1 for part in module.modules() if isinstance(part, nn.Linear))
    for name, weight in lateral_weights(rule).items():
        assert not torch.equal(weight, first[name])
    for saved in rule.rule_state()["lateral"].values():
        assert int(saved["optimizer"]["state"][0]["step"]) == 8
    fitted(module, loader(), bpf.TeamReinforce())  # by another object
    assert all(len(part._forward_hooks) == 1 for part in module.modules() if isinstance(part, nn.Linear))


@pytest.mark.parametrize("settings", [{"exploration": "boltzmann", "lateral_lr": 0.1}, {"baseline": "per_layer"}])
@pytest.mark.parametrize("widths", [(5, 5), (8, 8)])
def test_a_second_module_starts_afresh_and_leaves_the_first_as_it_is(widths, settings):
    rule, one, two = bpf.TeamReinforce(**settings), problem(lr=0.1), problem(*widths, lr=0.1)
    fitted(one, loader(), rule)
    x = torch.randn(3, 6)
    expected = one.net(x)
    fitted(two, loader(), rule)
    assert torch.equal(one.net(x), expected)
    state = rule.rule_state()
    for saved in [*state["lateral"].values(), *state["critics"].values()]:
        assert int(saved["optimizer"]["state"][0]["step"]) == 4


@pytest.mark.parametrize("other", [bpf.Backprop, bpf.ForwardGradient, bpf.ForwardForward])
def test_another_rule_does_not_train_through_a_team_unnoticed(other):
    module, rule = problem(lr=0.01), bpf.TeamReinforce()
    fitted(module, loader(), rule)
    with pytest.raises(
        MisconfigurationException, match=r"what TeamReinforce has put in the place.*uninstall\(module\) f"
    ):
        fitted(module, loader(), other())
    rule.uninstall(module)
    fitted(module, loader(), other())


def test_a_team_does_not_train_through_another_rule_unnoticed():
    module, rule = problem(lr=0.01), bpf.ForwardForward()
    fitted(module, loader(), rule)
    with pytest.raises(MisconfigurationException, match=r"what ForwardForward has put.*uninstall\(module\) first"):
        fitted(module, loader(), bpf.TeamReinforce())
    rule.uninstall()
    fitted(module, loader(), bpf.TeamReinforce())


def test_alignment_says_that_there_is_nothing_to_compare_with():
    alignment = bpf.GradientAlignment(every_n_steps=1)
    fitted(problem(), loader(), bpf.TeamReinforce(), alignment)
    assert alignment.measured == 0


def test_the_cost_of_every_draw_is_counted():
    found = []
    for num_samples in (2, 6):
        rule = bpf.TeamReinforce(num_samples=num_samples)
        fitted(problem(), loader(), rule)
        found.append(rule.record.forward_evals / 4)
    assert found == [2 * 2, 6 * 2]  # a forward pass, and a product of matrices a layer behind it


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_samples": 0}, "num_samples=0: give a whole number of at least 1"),
        ({"num_samples": 2.5}, "num_samples=2.5: give a whole number of at least 1"),
        ({"num_samples": 1}, "num_samples=1 with baseline='leave_one_out'.*Use num_samples=2 or more, or baseline='cr"),
        ({"unit": "poisson"}, "unit='poisson': give 'bernoulli'"),
        ({"unit": []}, r"unit=\[\]: give 'bernoulli'"),
        ({"output": "tanh"}, "output='tanh': give 'softmax'"),
        ({"exploration": "gibbs"}, "exploration='gibbs': give 'independent'"),
        ({"credit": "backprop"}, "credit='backprop': give 'reward'"),
        ({"baseline": "mean"}, "baseline='mean': choose 'leave_one_out', 'critic', 'per_layer' or 'none'"),
        ({"reward": "accuracy"}, "reward='accuracy': give 'class'"),
        ({"evaluation": "mode"}, "evaluation='mode': choose 'mean' or 'samples'"),
        ({"eval_samples": 0}, "eval_samples=0: give a whole number of at least 1"),
        ({"lateral_lr": 0.0}, r"lateral_lr=0\.0: give a positive number"),
        ({"critic_lr": -1.0}, r"critic_lr=-1\.0: give a positive number"),
        ({"learning_rates": [1.0, -0.5]}, r"learning_rates=\[1\.0, -0\.5\]: give a list of numbers of at least 0"),
        ({"unit": "gaussian", "exploration": "boltzmann"}, "exploration=Boltzmann.*unit is Gaussian. Use unit='berno"),
        ({"unit": ["sign", "gaussian"], "exploration": "recurrent"}, "exploration=Recurrent.*or exploration='indep"),
        ({"credit": "map_propagation"}, "credit='map_propagation'.*use unit='gaussian'"),
        ({"credit": "ste", "unit": "gaussian"}, "credit='ste'.*use credit='pathwise'"),
        ({"credit": "pathwise"}, "credit='pathwise'.*use credit='ste'"),
        (
            {"credit": "map_propagation", "unit": "gaussian", "output": None, "reward": "loss"},
            "credit='map_propagation': the action is held.*output=None draws none",
        ),
        ({"credit": bpf.WeightMax(True), "output": None, "reward": "loss"}, "exact=True.*output='softmax', or exact=F"),
        ({"credit": bpf.MapPropagation(gate=True), "unit": "gaussian"}, "gate=True.*output='gaussian'"),
        (
            {"exploration": "boltzmann", "credit": "weight_max"},
            "exploration=Boltzmann with credit=WeightMax.*Use credit=",
        ),
        (
            {"exploration": "boltzmann", "baseline": "none"},
            "baseline='none' and negative_phase=False.*Choose a baseline, or negative_phase=True",
        ),
        (
            {"exploration": bpf.Boltzmann(whole_network=True), "output": "gaussian", "reward": "module"},
            "whole_network=True.*use output='softmax'",
        ),
        ({"output": None}, r"reward='class' with output=None.*output='softmax'.*output=None"),
        ({"reward": "loss"}, "reward='loss' with output='softmax'.*output=None"),
        ({"reward": "step"}, "reward='step' with num_samples=4.*Use num_samples=1"),
        ({"trace_decay": 0.5}, "trace_decay: traces are of one draw"),
        ({"trace_decay": 1.0, "num_samples": 1, "baseline": "none"}, r"trace_decay=1\.0: give a number in \[0"),
        ({"trace_decay": 0.5, "num_samples": 1, "baseline": "none", "credit": "ste"}, "trace_decay: traces are of"),
    ],
)
def test_bad_arguments_are_named_with_their_cure(arguments, said):
    with pytest.raises(ValueError, match=said):
        bpf.TeamReinforce(**arguments)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bpf.StraightThrough("slope"), "derivative='slope': choose 'mean' or 'identity'"),
        (lambda: bpf.MapPropagation(-1), "steps=-1: give a whole number of at least 0"),
        (lambda: bpf.MapPropagation(step_size=0.0), r"step_size=0\.0: give a positive number"),
        (lambda: bpf.MapPropagation(guard=0.0), r"guard=0\.0: give a positive number"),
    ],
)
def test_bad_arguments_of_credits(make, said):
    with pytest.raises(ValueError, match=said):
        make()


class Between(nn.Module):
    """More than a linear layer between two layers of units."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)
        )

    def forward(self, x):
        return self.net(x)


class Normed(nn.Module):
    """Potentials that come from no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x):
        return self.net(x)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)

    def forward(self, x):
        return self.two(self.act(self.one(x))), x


class Batchless(nn.Module):
    """The batch is no longer the first dimension where the units are."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3)

    def forward(self, x):
        return self.two(self.act(self.one(x.view(len(x), 3, 2).transpose(0, 1))).mean(0))


class Silent(nn.Module):
    """Has an activation, and does not use it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


@pytest.mark.parametrize(
    ("net", "settings", "error", "said"),
    [
        (None, {"units": "net.*.act"}, ValueError, r"units='net\.\*\.act' matches no module.*nearest names"),
        (None, {"units": nn.GELU}, ValueError, "units=GELU matches no module of the network.*ReLU"),
        (None, {"units": "net.layers.0"}, ValueError, r"units: net\.layers\.0 \(Linear\) has parameters.*Name the a"),
        (None, {"network": "nett"}, ValueError, "network='nett' is no part of Problem.*net"),
        (None, {"unit": ["sign"] * 3}, ValueError, r"unit: 3 units for 2 layers.*net\.layers\.1.*give one, or one"),
        (None, {"learning_rates": [1.0, 1.0]}, ValueError, r"learning_rates=\[1\.0, 1\.0\].*each of the 2 layers"),
        (None, {"reward": lambda b, a: a[:5].float()}, ValueError, r"reward: found shape \(5,\).*\(64,\): row m \* B"),
        (None, {"reward": lambda b, a: 1.0}, ValueError, "reward: found float; needed is one number a row"),
        (None, {"reward": "module"}, MisconfigurationException, r"has no method reward\(batch, action\)"),
        (
            None,
            {"reward": "step", "num_samples": 1, "baseline": "none"},
            MisconfigurationException,
            "reward='step'.*'loss', 'action' and 'reward'; 'action' is missing",
        ),
        (None, {"labels": lambda b: b[0]}, ValueError, r"labels: found torch\.float32 of shape \(16, 6\)"),
        (
            None,
            {"output": None, "reward": lambda b, a: torch.zeros(64)},
            MisconfigurationException,
            r"output=None\).*no graph to the output. Draw an action, output='softmax'",
        ),
        (None, {"output": "gaussian"}, MisconfigurationException, r"reward='class'\) needs scores.*Pass a function"),
        (None, {"params": "accuracy*"}, ValueError, "params='accuracy\\*' matches none"),
        (
            Between,
            {"exploration": bpf.Boltzmann(whole_network=True)},
            ValueError,
            r"whole_network=True\): between .* must be one nn\.Linear and nothing else. Use Boltzmann\(\) with bas",
        ),
        (Between, {"credit": bpf.WeightMax(exact=True)}, ValueError, r"between .* must be one nn\.Linear.*exact=False"),
        (Normed, {"trace_decay": 0.5, "num_samples": 1, "baseline": "none"}, ValueError, "trace_decay: .*Leave t"),
        (Pair, {}, ValueError, "network: Pair returns a tuple.*Name the submodule that returns them, network="),
        (Batchless, {}, ValueError, r"units: net\.act gets \(3, 64, 5\) for 64 samples.*batch_first=True"),
        (Silent, {}, ValueError, r"units: none of net\.act ran in the network's forward pass"),
        (nn.Linear, {}, ValueError, r"units: Linear has no activation that is a module"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_with_its_cure(net, settings, error, said):
    module = problem() if net is None else Problem(net(6, 3) if net is nn.Linear else net())
    with pytest.raises(error, match=said):
        fitted(module, loader(), bpf.TeamReinforce(**settings))
    assert "training_step" not in module.__dict__


@pytest.mark.parametrize("exploration", ["boltzmann", "recurrent"])
def test_lateral_weights_are_refused_between_the_units_of_an_image(exploration):
    module = Problem(SmallCNN((1, 8, 8), [3], 3))
    data = DataLoader(TensorDataset(*images()), batch_size=6)
    with pytest.raises(
        ValueError, match=r"net\.features\.1 has potentials of shape \(24, 3, 8, 8\).*exploration='indepe"
    ):
        fitted(module, data, bpf.TeamReinforce(exploration=exploration))


@pytest.mark.parametrize(
    ("own", "settings", "said"),
    [
        (bpf.Gaussian, {"exploration": "boltzmann"}, "exploration=Boltzmann.*Gaussian"),
        (bpf.Bernoulli, {"unit": "gaussian", "credit": "map_propagation"}, "credit='map_propagation'.*gaussian"),
        (bpf.Bernoulli, {"unit": "gaussian", "credit": "pathwise"}, "credit='pathwise'.*credit='ste'"),
        (bpf.Gaussian, {"credit": "ste"}, "credit='ste'.*credit='pathwise'"),
    ],
)
def test_a_networks_own_units_are_refused_as_others_are(own, settings, said):
    net = nn.Sequential(nn.Linear(6, 5), own(), nn.Linear(5, 3)).double()
    with pytest.raises(ValueError, match=said):
        estimate(bpf.TeamReinforce(**settings), Plain(net), vectors())


def test_a_reward_is_of_one_call():
    class Twice(Problem):
        def training_step(self, batch, index):
            return self.net(batch[0]).sum() + self.net(batch[0]).sum()

    class Never(Problem):
        def training_step(self, batch, index):
            return self.net.layers(batch[0]).square().mean()

    with pytest.raises(ValueError, match=r"calls its network twice.*Join the batches, or name the part that is"):
        fitted(Twice(MLP(6, [8], 3)), loader(), bpf.TeamReinforce())
    with pytest.raises(MisconfigurationException, match=r"never called.*network="):
        fitted(Never(MLP(6, [8], 3)), loader(), bpf.TeamReinforce())


def test_an_error_in_a_step_leaves_no_pass_behind():
    module, rule = problem(), bpf.TeamReinforce(reward=lambda b, a: a[:5].float())
    with pytest.raises(ValueError, match="reward"):
        fitted(module, loader(), rule)
    assert rule._network.training_pass is None
    assert module.net(torch.randn(2, 6)).shape == (2, 3)  # evaluation, not a pass of training


def sometimes_nan(batch: Any, action: Tensor) -> Tensor:
    rewards = action.float()
    if bool((batch[0] == loader().dataset.tensors[0][16:32]).all()):  # the second batch
        rewards[7] = torch.nan
    return rewards


@pytest.mark.parametrize("settings", [{}, {"exploration": "boltzmann", "baseline": "per_layer"}])
def test_a_reward_that_is_no_number_stops_the_run_or_leaves_out_the_batch(settings):
    module, states = problem(lr=0.1), []
    module.on_train_batch_start = lambda batch, index: states.append([p.clone() for p in module.parameters()])
    rule = bpf.TeamReinforce(reward=sometimes_nan, **settings)
    said = r"the reward of row 7 gave nan in batch 1\. No parameter has moved.*on_nonfinite='skip'"
    with pytest.raises(RuntimeError, match=said):
        fitted(module, loader(), rule)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), states[1], strict=True))

    module = problem(lr=0.1)
    rule = bpf.TeamReinforce(reward=sometimes_nan, on_nonfinite="skip", **settings)
    with pytest.warns(UserWarning, match=r"the reward of row 7 gave nan; batch 1 is skipped"):
        fitted(module, loader(), rule)
    assert rule.record.skipped == 1
    assert [bool(gradients) for gradients in module.gradients] == [True, False, True, True]
    state = rule.rule_state()
    for saved in [*state["lateral"].values(), *state["critics"].values()]:
        assert int(saved["optimizer"]["state"][0]["step"]) == 3


@pytest.mark.parametrize("baseline", ["critic", "per_layer"])
def test_critics_do_not_read_whole_numbers(baseline):
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 5), nn.ReLU(), nn.Linear(5, 3))
    batch = torch.arange(30).view(6, 5) % 9, torch.arange(6) % 3
    with pytest.raises(
        ValueError, match=rf"baseline='{baseline}': a critic reads.*torch\.int64.*baseline='leave_one_out'"
    ):
        estimate(bpf.TeamReinforce(baseline=baseline), Plain(net), batch)
    found = estimate(bpf.TeamReinforce(), Plain(net), batch)
    assert bool(found["net.0.weight"].any())  # embeddings are in front of the first layer of units


def test_the_number_of_environments_stays():
    module, rule = online_module(), online_rule("reward")
    traced("reward", range(1), rule, module)
    x, rewards, _ = online(1)
    module.rewards, module.done = rewards[:3], None
    with pytest.raises(ValueError, match=r"trace_decay: a batch of 3 rows after one of 4.*Keep their number"):
        estimate(rule, module, (x[:3],))


@pytest.mark.parametrize(
    ("action", "said"),
    [(torch.zeros(8, 1, dtype=torch.int64), r"shape \(8, 1\)"), (torch.zeros(8), r"torch\.float32")],
)
def test_an_action_that_does_not_fit_is_refused(action, said):
    class Wrong(Acts):
        def training_step(self, batch, batch_idx):
            return {**super().training_step(batch, batch_idx), "action": action}

    module = Wrong(network(6, 5, 3), torch.zeros(8))
    rule = bpf.TeamReinforce(reward="step", num_samples=1, baseline="none")
    with pytest.raises(MisconfigurationException, match=rf"{said}.*needed are whole numbers \(8,\)"):
        estimate(rule, module, vectors())


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (
            lambda x: (x, torch.zeros(8, 2)),
            r"gate=True\): the batch has a target of shape \(8, 2\).*one number a sample",
        ),
        (lambda x: x, "the batch has no pair"),
    ],
)
def test_the_gate_needs_one_target_a_sample(batch, said):
    class Takes(Plain):
        def training_step(self, batch, batch_idx):
            return self.net(batch[0] if isinstance(batch, tuple) else batch).square().mean()

    rule = bpf.TeamReinforce(
        unit="gaussian", output="gaussian", credit=bpf.MapPropagation(gate=True), reward=lambda b, a: a[:, 0]
    )
    with pytest.raises(ValueError, match=said):
        estimate(rule, Takes(network(6, 5, 1)), batch(vectors()[0]))


def test_compiled_networks_are_refused():
    module = problem()
    module.net.layers.compile()
    with pytest.raises(MisconfigurationException, match=r"torch\.compile"):
        fitted(module, loader(), bpf.TeamReinforce())


def test_parameters_that_no_layer_reaches_are_refused():
    class Apart(Problem):
        def __init__(self) -> None:
            super().__init__(MLP(6, [8], 3), lr=0.1)
            self.other = nn.Linear(6, 3)

    with pytest.raises(
        MisconfigurationException, match=r"params='other\.\*'\): none of the trained parameters is in fr"
    ):
        fitted(Apart(), loader(), bpf.TeamReinforce(network="net", params="other.*"))


@pytest.mark.parametrize("evaluation", ["mean", "samples"])
def test_callers_see_the_mean_of_what_acts(evaluation):
    """A softplus output: the mean of the action, and not the potential under it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    module, unit = Plain(net), bpf.Gaussian(0.1)
    rule = bpf.TeamReinforce(unit="gaussian", output=unit, reward=lambda *_: None, evaluation=evaluation)
    rule.install(module)
    x = torch.randn(3, 6)
    assert bool((module.net(x) > 0).all())
    if evaluation == "mean":
        hidden = bpf.Gaussian().mean(net[0](x))
        torch.testing.assert_close(module.net(x), unit.mean(net[2](hidden)))
