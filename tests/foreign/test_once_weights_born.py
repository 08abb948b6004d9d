"""Parameters that are born during the fit are trained from then on."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from once_problems import (
    CLASSES,
    RULES,
    Once,
    first_gradient,
)
from problems import fitted
from thinned import in_turn
from torch import nn

import lightning_bpfree as bpf

# --- parameters that are born during the fit ----


class Grows(Once):
    """Gets a second layer at the start of its second epoch, and tells the optimizer."""

    def prepare(self):
        self.lr, self.more = 0.1, None

    def grow(self):
        self.more = nn.Linear(CLASSES, CLASSES).double()
        self.trainer.optimizers[0].add_param_group({"params": list(self.more.parameters())})
        self.born = self.more.weight.detach().clone()

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.grow()

    def loss(self, x, y):
        logits = self.net(x)
        return F.cross_entropy(logits if self.more is None else self.more(logits), y)


class GrowsInASequential(Grows):
    def prepare(self):
        super().prepare()
        self.net = nn.Sequential(self.net)

    def grow(self):
        self.net.append(nn.Linear(CLASSES, CLASSES).double())
        self.more = None
        self.trainer.optimizers[0].add_param_group({"params": list(self.net[1].parameters())})
        self.born = self.net[1].weight.detach().clone()

    def newest(self):
        return self.net[1].weight


class Grown(Grows):
    """Grown by a callback."""

    def on_train_epoch_start(self):
        pass


class GrowsInTheStep(Grows):
    """Gets its second layer in the first step: a step later it trains."""

    def on_train_epoch_start(self):
        pass

    def training_step(self, batch, batch_idx):
        if self.more is None:
            self.grow()
        return super().training_step(batch, batch_idx)


class Growing(pl.Callback):
    def __init__(self, hook):
        setattr(self, hook, self.grow)

    def grow(self, trainer, pl_module, *_):
        if isinstance(pl_module, Grown) and pl_module.more is None:
            pl_module.grow()


@pytest.mark.parametrize(("make", "rule"), in_turn([Grows, GrowsInASequential, GrowsInTheStep], RULES, fast=2))
def test_what_is_born_during_the_fit_is_trained(make, rule):
    torch.manual_seed(0)
    module = make()
    trainer = fitted(module, module.data(), RULES[rule](), max_epochs=2, precision="64-true")
    newest = module.newest() if hasattr(module, "newest") else module.more.weight
    assert not torch.equal(newest, module.born)
    assert len(trainer.optimizers[0].param_groups) == 2


HOOKS = ["on_train_epoch_start", "on_train_batch_start", "on_train_start"]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("rule", "hook"), in_turn(RULES, HOOKS, fast=1))
def test_what_callbacks_bring_is_trained(rule, hook, first):
    torch.manual_seed(0)
    module, grows, made = Grown(), Growing(hook), RULES[rule]()
    fitted(module, module.data(), *([grows, made] if first else [made, grows]), precision="64-true")
    assert not torch.equal(module.more.weight, module.born)


def test_the_gradient_of_what_is_born_is_exact():
    class GrowsAtOnce(Grows):
        def prepare(self):
            super().prepare()
            self.lr = 0.0

        def on_train_epoch_start(self):
            self.grow()

    torch.testing.assert_close(
        first_gradient(GrowsAtOnce, bpf.ForwardGradient(14, orthogonal=True)),  # 8 coordinates, and 6 of the new layer
        first_gradient(GrowsAtOnce),
        rtol=1e-7,
        atol=1e-9,
    )
