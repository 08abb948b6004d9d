"""A twin of a rule trains other weights in the same fit; a rule that hands its step over is evaluated by somebody else."""

from __future__ import annotations

import pytest
from problems import Problem, fitted, loader

import lightning_bpfree as bpf


class Made(bpf.Backprop):
    """Keeps a twin of each rule that it meets, made in the middle of the fit."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.twin_of_mine: bpf.TrainingRule | None = None

    def on_train_start(self, trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        self.twin_of_mine = self.twin(seed=5)
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
    with pytest.raises(RuntimeError, match="twin: the rule is in no fit"):
        bpf.Backprop().twin(seed=0)


class HandsOver(bpf.ZerothOrder):
    """Lets the training step go before the first batch."""

    def on_train_start(self, trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        self.hand_over()


def test_a_rule_that_hands_over_evaluates_nothing_by_itself():
    rule = HandsOver()
    fitted(Problem(), loader(), rule)
    assert rule.record.batches > 0
    assert rule.record.forward_evals == 0
