"""Properties of every rule: shapes of training steps, and what a run says of its rule; see `conformance.py`."""

from __future__ import annotations

import csv
import inspect
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conformance_problem import Case, assert_equal
from problems import fitted

from lightning_bpfree import TrainingRule


def the_signature_is_kept(case: Case) -> None:
    class OnlyBatch(case.problem):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    class Renamed(case.problem):
        def training_step(self, rows, number):
            return super().training_step(rows, number)

    seen: list[list[str]] = []

    class Looks(pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer) -> None:
            seen.append(list(inspect.signature(module.training_step).parameters))

    for kind, names in ((OnlyBatch, ["batch"]), (Renamed, ["rows", "number"])):
        seen.clear()
        torch.manual_seed(0)
        module = kind()
        fitted(module, case.problem.data(), case.make_rule(), Looks())
        assert seen == [names] * 4
        assert set(module.calls) == ({0} if kind is OnlyBatch else {0, 1, 2, 3})  # Lightning hands over the number
        assert len(module.gradients) == 4


def several_dataloaders(case: Case) -> None:
    class Two(case.problem):
        def training_step(self, batch, index):
            first = super().training_step(batch["a"], index)
            return first + super().training_step(batch["b"], index)

    def gradients(b: int) -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        module = Two()
        fitted(module, {"a": case.problem.data(seed=1), "b": case.problem.data(seed=b)}, case.make_rule(seed=5))
        assert len(module.gradients) == 4
        return module.gradients

    first, again, other = gradients(2), gradients(2), gradients(3)
    for a, b, c in zip(first, again, other, strict=True):
        assert_equal(a, b)
        assert any(not torch.equal(a[name], c[name]) for name in a)  # the second loader has a say


def the_run_proves_its_rule(case: Case) -> None:
    from lightning.pytorch.loggers import CSVLogger

    with tempfile.TemporaryDirectory() as folder:
        logger = CSVLogger(folder, version="")
        module, trainer = case.run(logger=logger)
        (rule,) = [callback for callback in trainer.callbacks if isinstance(callback, TrainingRule)]
        name = type(case.make_rule()).__name__
        text = (Path(logger.log_dir) / "hparams.yaml").read_text()
        assert f"rule: {name}" in text
        assert {
            "bpfree/loss",
            "bpfree/grad_norm",
            "bpfree/forward_evals",
            "bpfree/active",
        } <= trainer.callback_metrics.keys()
        found = {key: float(value) for key, value in trainer.callback_metrics.items()}
        assert found["bpfree/active"] == 1.0
        assert found["bpfree/forward_evals"] == pytest.approx(rule.record.forward_evals, rel=1e-6)  # logged in float32
        assert rule.record.forward_evals >= 4
        assert rule.record.batches == 4
        assert rule.record.history == [{"rule": name, "first_epoch": 0, "last_epoch": 0}]
        gradient = torch.cat([grad.flatten() for grad in module.gradients[-1].values()])
        # One sum of squares in another order of float32.
        assert found["bpfree/grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            logged = [row["bpfree/loss"] for row in csv.DictReader(file) if row["bpfree/loss"]]
        assert len(logged) == 4
        if rule.estimates_user_loss:  # in half of the digits that the file has
            assert sum(map(float, logged)) / 4 == pytest.approx(found["train_loss"], rel=1e-4)
