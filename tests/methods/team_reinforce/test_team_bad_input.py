"""What TeamReinforce refuses, with the argument and its cure in the message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from enumerated import network
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import CallsTwice, NeverCalls, Problem, fitted, loader
from team_problems import Acts, Between, Plain, estimate, images, problem, vectors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.demos.modules import MLP, SmallCNN


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
            "credit='map_propagation': it needs an action.*output=None draws none",
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
        (None, {"network": "nett"}, ValueError, "network='nett' is not a part of Problem.*net"),
        (None, {"unit": ["sign"] * 3}, ValueError, r"unit: 3 units for 2 layers.*net\.layers\.1.*give one, or one"),
        (None, {"learning_rates": [1.0, 1.0]}, ValueError, r"learning_rates=\[1\.0, 1\.0\].*each of the 2 layers"),
        (None, {"reward": lambda b, a: a[:5].float()}, ValueError, r"reward: found shape \(5,\).*\(64,\): row m \* B"),
        (None, {"reward": lambda b, a: 1.0}, ValueError, "reward: found float; give one number per row"),
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
    with pytest.raises(
        ValueError, match=r"calls its network twice.*Concatenate the batches, or name the submodule that is"
    ):
        fitted(CallsTwice(MLP(6, [8], 3)), loader(), bpf.TeamReinforce())
    with pytest.raises(MisconfigurationException, match=r"never called.*network="):
        fitted(NeverCalls(MLP(6, [8], 3)), loader(), bpf.TeamReinforce())


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
    said = r"the reward of row 7 gave nan in batch 1\. No parameter has changed.*on_nonfinite='skip'"
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
    with pytest.raises(MisconfigurationException, match=rf"{said}.*give whole numbers of shape \(8,\)"):
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

    with pytest.raises(MisconfigurationException, match=r"params='other\.\*'\): none of the trained parameters feeds"):
        fitted(Apart(), loader(), bpf.TeamReinforce(network="net", params="other.*"))
