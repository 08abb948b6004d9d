"""A twin of a rule trains other weights in the same fit, with a record and a seed of its own."""

from __future__ import annotations

import pytest
from problems import Problem, fitted, loader

import lightning_bpfree as bpf
from lightning_bpfree.methods.deep_ensemble.rule_copies import twin_of


class Made(bpf.Backprop):
    """Keeps a twin of each rule that it meets, made in the middle of the fit."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.twin_of_mine: bpf.TrainingRule | None = None

    def on_train_start(self, trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        self.twin_of_mine = twin_of(self, pl_module, seed=5)
        assert self.twin_of_mine.original_step == self.original_step


def test_a_twin_has_a_record_and_a_seed_of_its_own():
    rule = Made(seed=3)
    fitted(Problem(), loader(), rule)
    twin = rule.twin_of_mine
    assert twin is not None
    assert (rule.record.seed, twin.record.seed) == (3, 5)
    assert twin.record.batches == 0 < rule.record.batches
    assert not twin.observers


def test_a_twin_is_made_inside_of_a_fit_only():
    with pytest.raises(RuntimeError, match="Backprop is in no fit"):
        twin_of(bpf.Backprop(), Problem(), seed=0)
