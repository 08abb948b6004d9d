"""Evaluating a step several times looks, to the step and to all it touches, as if it had run once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from once_modules_batch import BATCH, ITERATORS, RANDOM
from once_modules_held import METRICS, TEACHERS
from once_modules_state import BORN, CONTAINERS, HeldTensors
from once_problems import (
    BATCHES,
    CLASSES,
    RULES,
    Once,
    Seen,
    difference,
    exact_rule,
    first_gradient,
    outcome,
    pairs,
    table,
)
from problems import fitted
from thinned import in_turn
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf

# --- the tests ----

CASES = [*BATCH, *CONTAINERS, *METRICS, *RANDOM, *TEACHERS, *ITERATORS, *BORN]
of_each = pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
PLAIN: dict[Callable[[], Once], dict[str, Any]] = {}


def plain(make: Callable[[], Once]) -> dict[str, Any]:
    if make not in PLAIN:
        PLAIN[make] = outcome(make, max_epochs=getattr(make, "epochs", 1))
    return PLAIN[make]


@pytest.mark.parametrize(("make", "rule"), in_turn(CASES, RULES, fast=2))
def test_all_is_left_behind_as_by_a_plain_fit(make, rule):
    found = outcome(make, RULES[rule](), max_epochs=getattr(make, "epochs", 1))
    assert not difference(found, plain(make))


@of_each
def test_measuring_the_alignment_leaves_no_trace(make):
    found = outcome(make, bpf.Backprop(), bpf.GradientAlignment(every_n_steps=1), max_epochs=getattr(make, "epochs", 1))
    assert not difference(found, plain(make))


@of_each
def test_every_evaluation_is_of_the_same_function(make):
    expected = first_gradient(make)
    found = first_gradient(make, exact_rule(make))
    # As many orthonormal directions as coordinates: the gradient itself, up to the solution of a small linear system.
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


# Finite differences see what no derivative sees: a loss that depends on the weights through a teacher, or a sum.
STOPPED = [*TEACHERS, HeldTensors]


@pytest.mark.parametrize("make", [make for make in CASES if make not in STOPPED], ids=lambda make: make.__name__)
def test_finite_differences_are_of_the_same_function(make):
    directions = {"num_directions": 2, "seed": 1}
    exact = first_gradient(make, bpf.ForwardGradient(**directions))
    found = first_gradient(make, bpf.ZerothOrder(**directions, sigma=1e-4))
    # Central differences: O(sigma^2) times a third derivative of a few units, and rounding of 1e-16 / sigma.
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


# --- what transformers remembers on a module ----


class HiddenStates(Once):
    """Averages all hidden states, as probes and distillation do, and counts them."""

    def prepare(self):
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = BertConfig(vocab_size=20, max_position_embeddings=8, attn_implementation="eager", **sizes)
        self.bert, self.net, self.counts = BertModel(config), nn.Linear(8, CLASSES), []

    def data(self):
        return DataLoader(TensorDataset(torch.arange(64).reshape(16, 4) % 20, table()[1]), batch_size=4)

    def hidden(self, ids):
        return self.bert(input_ids=ids, output_hidden_states=True, output_attentions=True)

    def training_step(self, batch, batch_idx):
        output = self.hidden(batch[0])
        self.counts.append((len(output.hidden_states), len(output.attentions)))
        return F.cross_entropy(self.net(torch.stack(output.hidden_states).mean((0, 2))), batch[1])

    def trace(self):
        output = self.hidden(torch.ones(1, 4, dtype=torch.long))
        return [*self.counts, (len(output.hidden_states), len(output.attentions))]


@pytest.mark.parametrize("rule", RULES)
def test_transformers_returns_as_many_hidden_states_as_there_are(rule):
    found = outcome(HiddenStates, RULES[rule](), bpf.GradientAlignment(every_n_steps=2))
    assert found["trace"] == [(3, 2)] * (BATCHES + 1)


# --- what the datamodule holds ----


class Noisy(pl.LightningDataModule):
    """Adds noise on the device, in a hook that the step calls again."""

    def __init__(self):
        super().__init__()
        self.rng, self.calls = np.random.default_rng(3), []

    def train_dataloader(self):
        return pairs()

    def noisy(self, x):
        self.calls.append(len(x))
        return x + torch.from_numpy(self.rng.standard_normal(x.shape))


class FromTheDatamodule(Once):
    def data(self):
        return Noisy()

    def training_step(self, batch, batch_idx):
        return self.loss(self.trainer.datamodule.noisy(batch[0]), batch[1])


@pytest.mark.parametrize("rule", RULES)
def test_what_the_datamodule_holds_moves_once(rule):
    def run(*callbacks):
        torch.manual_seed(0)
        module, data, seen = FromTheDatamodule(), Noisy(), Seen()
        fitted(module, data, *callbacks, seen, precision="64-true")
        return data.calls, data.rng.random(), seen.losses

    assert not difference(run(RULES[rule]()), run())
