"""What a network with units returns outside of training: means, averages of draws, and their report."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from enumerated import configurations
from problems import loader
from team_problems import QUIET, Plain, Validated, problem, trained, validated, vectors
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_bpfree as bpf
from lightning_bpfree.demos.modules import MLP

ERRORS = 5.0  # standard errors


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
