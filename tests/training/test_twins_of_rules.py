"""A twin of a rule trains other weights in the same fit: what it learns is its own, what it knows of the module is not."""

from __future__ import annotations

import pytest
import torch
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
    with pytest.raises(RuntimeError, match="Backprop.twin: the rule is in no fit"):
        bpf.Backprop().twin(seed=0)


def test_a_rule_that_hands_over_trains_nothing_by_itself():
    class HandsOver(bpf.ZerothOrder):
        def on_train_start(self, trainer, pl_module) -> None:
            super().on_train_start(trainer, pl_module)
            self.hand_over()

    rule, module, plain = HandsOver(), Problem(), Problem()
    plain.load_state_dict(module.state_dict())
    for one, callbacks in ((module, [rule]), (plain, [])):
        torch.manual_seed(1)
        fitted(one, loader(), *callbacks)
    assert rule.record.forward_evals == 0
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
