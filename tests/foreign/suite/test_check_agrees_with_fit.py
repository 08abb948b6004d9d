"""`bpfree check` says yes where a fit trains, and what the fit says where it does not, for all modules of the suite."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers.logger import DummyLogger
from suite_expected import EXPECTED
from suite_modules import CASES
from suite_oracle import fitted, started
from suite_rules import COMPANIONS, RULES
from thinned import in_turn

from lightning_bpfree import GradientAlignment, ZerothOrder
from lightning_bpfree.cli.check import CostMeter, Verdict, check, judged
from lightning_bpfree.cli.common.configured import Blueprint

EVERY = [*RULES, *COMPANIONS]


def verdict(kind, *callbacks: pl.Callback) -> Verdict:
    module, meter = started(kind), CostMeter(1)
    settings = {"precision": "64-true", **module.settings, "max_epochs": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            fast_dev_run=True,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=DummyLogger(),
            callbacks=[*callbacks, meter],
            **settings,
        )
        return judged("", trainer, module, meter, None)


@pytest.mark.parametrize(("kind", "rule"), in_turn(CASES.values(), RULES, fast=1))
def test_check_agrees_with_fit(kind, rule):
    found = verdict(kind, RULES[rule]())
    assert (found.cost is not None) == (EXPECTED[kind.__name__][EVERY.index(rule)] == "+"), found.obstacle
    if found.cost is None:
        with pytest.raises(Exception) as caught:  # noqa: PT011  # whatever it is, check says the same
            fitted(started(kind), [RULES[rule]()])
        assert str(caught.value).splitlines()[0] in found.obstacle


def test_two_rules_are_refused_as_by_fit():
    overlays = ["--trainer.callbacks+=ZerothOrder", "--trainer.callbacks+=Backprop"]
    found = {v.rule: v for v in check(Blueprint(["--model=suite_steps.Underscore", *overlays]), repeats=1)}
    assert "Two training rules" in found["ZerothOrder, Backprop as configured"].obstacle
    assert found["ZerothOrder()"].cost
    assert not any(name in found for name in ("ZerothOrder as configured", "Backprop as configured"))


def test_what_measures_the_alignment_stays_as_in_a_fit():
    callbacks = [ZerothOrder(), GradientAlignment(every_n_steps=1)]
    assert "differentiable" in verdict(CASES["Outside"], *callbacks).obstacle
    assert verdict(CASES["ReturnsADict"], *callbacks).cost


def test_a_step_that_does_not_run_twice_is_no_obstacle():
    class UsesUp(CASES["SecondLoader"]):
        def training_step(self, batch, batch_idx):
            assert batch.pop() is not None  # a list, which a second step on it would find shorter
            return super().training_step([*batch, self.labels.pop()], batch_idx)

        def prepare(self):
            super().prepare()
            self.labels = [self.train_dataloader().dataset.tensors[1][:4]]

    found = verdict(UsesUp, RULES["backprop"]())
    assert found.cost is not None
    assert found.cost.forward_evals == 3
    assert found.cost.time_ratio != found.cost.time_ratio  # not a number
