"""Heads of local guesses: they learn, stay out of the module, and resume bit for bit."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from conformance import resume_is_exact
from conformance_problem import Case, ConformanceProblem
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import Problem, Tied, fitted, loader
from projection_problems import FROZEN, SPACES, chain, close, data_in, head_of, step, steps
from torch import nn

from lightning_bpfree import Backprop, ForwardGradient, GradientAlignment, LocalLoss


def test_heads_learn_and_are_no_part_of_the_module():
    """Learning alone says little; their state is what is looked at."""
    rule = ForwardGradient(guess=LocalLoss(lr=0.05), seed=1)
    torch.manual_seed(0)
    module = Problem(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), lr=0.05)
    names = set(module.state_dict())
    logged = []

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            logged.append(float(trainer.callback_metrics["bpfree/forward_gradient/local_loss/guess/0..1"]))

    alignment = GradientAlignment(every_n_steps=1)
    fitted(module, loader(rows=128), rule, alignment, Reads(), max_epochs=6)
    assert set(module.state_dict()) == names
    assert sum(logged[-8:]) < 0.8 * sum(logged[:8])
    assert alignment.mean_cosine > 0.5
    (saved,) = rule.rule_state()["guided"]["guess"].values()
    assert saved["module"]["1.weight"].shape == (3, 16)
    assert saved["optimizer"]["state"]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("guess", [None, LocalLoss("mlp", update="reset")], ids=["random", "guided"])
def test_heads_of_a_target_take_the_exact_step_of_their_own_loss(space, guess):
    """One step of SGD along what autograd finds for the first block's head."""

    def rule(update):
        target = LocalLoss(update=update, optimizer="sgd", lr=0.1)
        return ForwardGradient(guess=guess, target=target, space=space, seed=1, blocks=None if guess else 1)

    untrained, trained = rule("freeze"), rule("train")
    steps(untrained)
    steps(trained)  # one batch
    before, after = head_of(untrained, "target"), head_of(trained, "target")
    weight, bias = (before[name].clone().requires_grad_() for name in ("1.weight", "1.bias"))
    ((x, y),) = data_in(torch.float64)
    loss = nn.functional.cross_entropy(nn.functional.linear(chain()[:2](x).detach(), weight, bias), y)
    for name, parameter in (("1.weight", weight), ("1.bias", bias)):
        (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        torch.testing.assert_close(after[name], before[name] - 0.1 * gradient, rtol=1e-10, atol=1e-12)  # float64


class OnTied(ConformanceProblem):
    def make_net(self):
        return Tied(dropout=0.3)


@pytest.mark.parametrize(
    "how",
    [
        {"guess": LocalLoss("mlp", blocks=[["inner", "norm", "frozen", "again", "drop"]], network="net")},
        {"space": "activations", "target": "local", "blocks": [["inner", "norm", "frozen", "again"]], "network": "net"},
        {"guess": LocalLoss(blocks=[["inner", "norm"]], network="net", update="reset"), "scope": "network"},
    ],
    ids=["trained", "target", "reset"],
)
def test_resume_is_bit_for_bit_with_heads(how):
    if how.get("guess") is not None and how["guess"].update == "reset":
        how = {**how, "params": ["net.inner.*", "net.norm.*", "net.head.*"]}
        with pytest.raises(MisconfigurationException, match=r"net\.inner\.weight is tied"):
            resume_is_exact(Case(partial(ForwardGradient, **how), OnTied))
        how["params"] = ["net.norm.*", "net.head.*"]
    resume_is_exact(Case(partial(ForwardGradient, **how), OnTied))


def test_head_gradients_of_micro_batches_count_as_their_mean():
    def heads(**settings):
        rule = ForwardGradient(guess=LocalLoss(optimizer="sgd", lr=0.1), seed=1)
        steps(rule, **settings)
        return head_of(rule)

    whole = heads(data=data_in(torch.float64, rows=32, batch_size=32))
    parts = heads(data=data_in(torch.float64, rows=32, batch_size=16), accumulate_grad_batches=2)
    close(whole, parts, rtol=1e-10, atol=1e-12)


def test_a_block_learns_from_its_own_loss_alone():
    plain = step(ForwardGradient(guess=FROZEN(), target="local", seed=1))
    net = chain()
    with torch.no_grad():
        net[2].weight.mul_(-50).add_(1)
        net[4].bias.add_(3)
    wild = step(ForwardGradient(guess=FROZEN(), target="local", seed=1), net=net)
    for name, grad in plain.items():
        assert torch.equal(grad, wild[name]) == name.startswith("net.0.")


class Probe(nn.Module):
    """Keeps whether what comes in has a graph."""

    def __init__(self):
        super().__init__()
        self.graphs = []

    def forward(self, x):
        self.graphs.append(x.requires_grad)
        return x


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("target", ["global", "local"])
def test_graphs_end_at_blocks(space, target):
    """Else all blocks would be held at once, as in backprop."""
    net = nn.Sequential(nn.Linear(6, 7), Probe(), nn.Linear(7, 5), Probe(), nn.Linear(5, 3)).double()
    step(ForwardGradient(guess=LocalLoss(blocks=[["0"], ["1", "2"]]), space=space, target=target), net=net)
    for probe in (net[1], net[3]):
        assert probe.graphs
        assert not any(probe.graphs)


def test_reset_heads_are_new_for_every_batch_and_frozen_ones_stay(monkeypatch):
    same = torch.utils.data.DataLoader(data_in(torch.float64).dataset, batch_sampler=[list(range(16))] * 3)

    def found(update):
        rule = ForwardGradient(guess=LocalLoss(update=update), seed=1)
        return rule, [u["net.0.weight"] for u in steps(rule, data=same)]

    frozen, one = found("freeze")
    assert torch.equal(one[0], one[2])
    (saved, _) = frozen.rule_state()["guided"]["guess"].values()
    assert saved["optimizer"] is None
    reset, two = found("reset")
    assert not torch.equal(two[0], two[1])
    assert reset.rule_state()["guided"]["guess"] == {}
    assert all(torch.equal(a, b) for a, b in zip(two, found("reset")[1], strict=True))


def test_the_global_stream_does_not_move():
    torch.manual_seed(3)
    fitted(Problem(Tied(dropout=0.3)), loader(), Backprop())
    expected = torch.rand(2)
    for update in ("train", "reset"):
        torch.manual_seed(3)
        how = LocalLoss(blocks=[["inner", "norm", "frozen", "again", "drop"]], network="net", update=update)
        fitted(Problem(Tied(dropout=0.3)), loader(), ForwardGradient(guess=how))
        assert torch.equal(torch.rand(2), expected)
