"""What a refusal names as the cure is the cure: with it the module trains, under the same rule."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from suite_cells import REFUSED, outcome
from suite_modules import CASES
from suite_oracle import Watch, fitted, started
from torch import nn

import lightning_bpfree as bpf

SAID = {
    ("NotRegistered", "zeroth_order"): r"the optimizer holds others, of shapes \(3, 3\).*nn\.ModuleList",
    ("GradientPenalty", "feedback"): r"itself computes gradients.*Backprop\(\)",
    ("Physics", "local_loss"): r"itself computes gradients",
    ("Lazy", "team"): r"has lazy ones \(LazyLinear.*Call the module on a batch before the fit",
    ("Lazy", "lottery_ticket"): r"LotteryTicket looks at the shapes.*Call the module on a batch",
    ("OfLightning", "feedback"): r"has no two layers.*network=",
    ("Arrays", "team"): r"labels: found ndarray.*labels=lambda batch",
    ("Outside", "local_loss"): r"ran without a graph.*torch\.no_grad",
    ("ReturnsAVector", "backprop"): r"return loss\.mean\(\)",
    ("ClampsItsWeights", "one_by_one"): r"on_train_batch_start or on_train_batch_end",
    ("Encoder", "reversible"): r"rewire=",
}


@pytest.mark.parametrize(("name", "rule"), SAID, ids=[f"{name}-{rule}" for name, rule in SAID])
def test_refusals_say_what_to_change(name, rule):
    found = outcome(CASES[name], rule)
    assert found.kind == REFUSED
    assert re.search(SAID[name, rule], found.said, re.S), found.said


class Registered(CASES["NotRegistered"]):
    def prepare(self) -> None:
        super().prepare()
        self.heads = nn.ModuleList(self.heads)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class MadeBefore(CASES["Lazy"]):
    def prepare(self) -> None:
        super().prepare()
        self.net(torch.zeros(2, 6))


class ClampsBefore(CASES["ClampsItsWeights"]):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for parameter in self.net.parameters():
            parameter.data.clamp_(-0.2, 0.2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(*batch)


CURED = {
    "registered": (Registered, lambda: bpf.ZerothOrder(2)),
    "made before": (MadeBefore, lambda: bpf.TeamReinforce()),
    "clamped before": (ClampsBefore, lambda: bpf.ForwardGradient(2)),
    "labels of arrays": (
        CASES["Arrays"],
        lambda: bpf.ForwardForward(labels=lambda batch: torch.from_numpy(batch["y"])),
    ),
    "labels of a dataclass": (CASES["Dataclasses"], lambda: bpf.TeamReinforce(labels=lambda batch: batch.y)),
    "labels of a nested dict": (
        CASES["KeysRenamed"],
        lambda: bpf.ForwardForward(labels=lambda batch: batch["fields"]["target"]),
    ),
    "network by name": (CASES["MomentumTeacher"], lambda: bpf.DirectFeedbackAlignment(network="net")),
    "rewired": (CASES["Encoder"], lambda: bpf.ReversibleRecompute("all", rewire="pre_norm")),
    "another rule": (CASES["GradientPenalty"], lambda: bpf.ForwardGradient(2)),
}


@pytest.mark.parametrize("case", CURED)
def test_the_cure_is_one(case):
    kind, make = CURED[case]
    watch = Watch()
    module = started(kind)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fitted(module, [make(), watch])
    assert len(watch.before_step) == 3
    assert any(not torch.equal(p, before[name].to(p.dtype)) for name, p in module.named_parameters())
