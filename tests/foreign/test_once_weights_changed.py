"""Trained weights that the step itself changes, freezes or thaws."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from once_problems import (
    CLASSES,
    RULES,
    Once,
    difference,
    outcome,
)
from problems import fitted
from torch import nn

import lightning_bpfree as bpf

# --- parameters that are trained, and that the step changes itself ----------------------------------------------------


class NormalizesItsWeights(Once):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.net.weight.div_(self.net.weight.norm())
        return super().training_step(batch, batch_idx)


class ClampsItsWeights(Once):
    def training_step(self, batch, batch_idx):
        self.net.weight.data.clamp_(-0.1, 0.1)
        return super().training_step(batch, batch_idx)


class AssignsItsWeights(Once):
    def training_step(self, batch, batch_idx):
        self.net.weight.data = F.normalize(self.net.weight.data, dim=0)
        return super().training_step(batch, batch_idx)


class ReplacesItsWeights(Once):
    def training_step(self, batch, batch_idx):
        self.net.load_state_dict({key: 0.9 * value for key, value in self.net.state_dict().items()})
        return super().training_step(batch, batch_idx)


CHANGING = [NormalizesItsWeights, ClampsItsWeights, AssignsItsWeights, ReplacesItsWeights]


@pytest.mark.parametrize("rule", [name for name in RULES if name != "backprop"])
@pytest.mark.parametrize("make", CHANGING, ids=lambda make: make.__name__)
def test_weights_that_the_step_changes_are_refused_before_they_change(make, rule):
    module = make()
    before = module.net.weight.detach().clone()
    with pytest.raises(MisconfigurationException, match=r"net\.weight.*on_train_batch_start"):
        fitted(module, module.data(), RULES[rule](), precision="64-true")
    assert torch.equal(module.net.weight, before.double())


@pytest.mark.parametrize("make", CHANGING, ids=lambda make: make.__name__)
def test_backprop_lets_the_step_change_weights(make):
    assert not difference(outcome(make, bpf.Backprop()), outcome(make))


@pytest.mark.parametrize("rule", RULES)
def test_what_the_step_freezes_does_not_move(rule):
    class Freezes(Once):
        def prepare(self):
            self.lr, self.last = 0.1, nn.Linear(CLASSES, CLASSES)

        def training_step(self, batch, batch_idx):
            self.net.requires_grad_(False)
            return F.cross_entropy(self.last(self.net(batch[0])), batch[1])

    module = Freezes()
    first, last = (part.weight.detach().double() for part in (module.net, module.last))
    fitted(module, module.data(), RULES[rule](), precision="64-true")
    assert torch.equal(module.net.weight, first)
    assert not torch.equal(module.last.weight, last)
    assert not module.net.weight.requires_grad  # as the step has left it


@pytest.mark.parametrize("rule", RULES)
def test_what_the_step_thaws_moves(rule):
    class Thaws(Once):
        def prepare(self):
            self.lr, self.last = 0.1, nn.Linear(CLASSES, CLASSES).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            self.last.requires_grad_(batch_idx >= 2)
            return F.cross_entropy(self.last(self.net(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.lr)

    module, seen = Thaws(), []

    class Looks(pl.Callback):
        def on_train_batch_end(self, *_):
            seen.append(module.last.weight.detach().clone())

    fitted(module, module.data(), RULES[rule](), Looks(), precision="64-true")
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[2], seen[3])
