"""The runs of a comparison: a few profiled steps, and trainings to the end of a budget."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lightning_bpfree.cli.common.configured import Blueprint, Built
from lightning_bpfree.cli.common.evaluation import evaluated, mean_cosine
from lightning_bpfree.cli.common.records import finite
from lightning_bpfree.training.gradient_alignment import GradientAlignment
from lightning_bpfree.training.measurement.peak_memory import PeakMemory
from lightning_bpfree.training.trainer_attributes import callbacks_of
from lightning_bpfree.training.training_rule import TrainingRule

PROFILED_STEPS = 3  # the first may differ, and an optimizer has all its state after it


class MetricMissingError(Exception):
    """The module does not log a metric that the comparison requests."""


class Stopwatch(Callback):
    """Measures the time of the training itself, without the reading of data before it."""

    seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start."""
        self._start = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self._start


class StepMeter(Callback):
    """Measures one epoch: the peak memory over its batches, and the cost of the last batch in forward passes."""

    peak_mib: float | None = None
    last_cost = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start measuring."""
        self.memory = PeakMemory(trainer.strategy.root_device)
        self.memory.start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the rule's evaluations before this batch."""
        self._before = _rule(trainer).record.forward_evals

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Record the cost of this batch, without the validation after it."""
        self.last_cost = _rule(trainer).record.forward_evals - self._before
        self.peak_mib = self.memory.peak()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop."""
        trainer.should_stop = True


class LearningCurve(Callback):
    """Records a metric at every validation of a fit. It draws no random numbers, so that training does not change.

    Args:
        metric: its name; None records nothing.
    """

    def __init__(self, metric: str | None) -> None:
        self.metric = metric
        self.points: list[list[float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the number of batches that the rule has trained, and the metric; NaN if it was not logged."""
        # Neither the check before the training nor the validation after it is a point of the curve.
        if self.metric is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        value = float(trainer.callback_metrics.get(self.metric, math.nan))
        self.points.append([_rule(trainer).record.batches, value])


def _rule(trainer: pl.Trainer) -> TrainingRule:
    return callbacks_of(trainer, TrainingRule)[0]


def profile(blueprint: Blueprint, seed: int) -> dict[str, Any]:
    """Return the cost of a step and its peak memory, for the rule alone, without a comparison with backprop."""
    meter = StepMeter()
    built = blueprint.build(
        seed=seed,
        callbacks=[meter],
        dropped=(GradientAlignment,),
        strategy="auto",
        max_epochs=10_000,  # the meter stops after one; learning rates may warm up for longer than that
        min_epochs=None,
        min_steps=None,
        limit_train_batches=PROFILED_STEPS * blueprint.config.trainer.accumulate_grad_batches,
        limit_val_batches=1,  # not 0, for early stopping and schedulers may ask for a metric of it
        val_check_interval=1.0,  # at the end: more batches than there are would be refused
        check_val_every_n_epoch=1,
        limit_test_batches=1,
        num_sanity_val_steps=0,
    )
    built.trainer.fit(built.module, datamodule=built.data)
    device = built.trainer.strategy.root_device
    return {
        "logged": _logged(built),
        "rule": type(built.rules[0]).__name__,
        "settings": built.rules[0].settings(),
        "forward_evals_per_batch": meter.last_cost,
        "peak_memory_mib": meter.peak_mib,
        "peak_memory_kind": meter.memory.kind,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _logged(built: Built) -> dict[str, list[str]] | None:
    """Return the metrics that fit, validation and test log, after a short fit; None if one batch is too few."""
    found = {"fit": sorted(built.trainer.callback_metrics)}
    for stage in ("validate", "test"):
        try:
            found[stage] = sorted(evaluated(stage, built.trainer, built.module, built.data))
        except Exception:
            return None
    return found


def train(
    blueprint: Blueprint, seed: int, stages: tuple[Any, ...], curve: str | None = None, **limits: Any
) -> dict[str, Any]:
    """Train once, and return the metrics of the last weights and their cost.

    Args:
        blueprint: the configuration.
        seed: seed for ``seed_everything``.
        stages: stages to evaluate afterward: ``"validate"``, ``"test"``.
        curve: a validation metric to record during the training, if any.
        **limits: arguments of the Trainer that set the budget.

    Raises:
        MetricMissingError: if validation does not log ``curve``.
    """
    watch, noted = Stopwatch(), LearningCurve(curve)
    built = blueprint.build(seed=seed, callbacks=[watch, noted], strategy="auto", **limits)
    built.trainer.fit(built.module, datamodule=built.data)
    metrics = {name: float(value) for name, value in built.trainer.callback_metrics.items()}
    cosine, steps = mean_cosine(built.trainer), built.trainer.global_step
    for stage in stages:
        found = evaluated(stage, built.trainer, built.module, built.data)
        if stage == "validate" and curve is not None and curve not in found:
            known = ", ".join(sorted(found)) or "nothing"
            raise MetricMissingError(f"--curve {curve}: the validation does not log it; it logs: {known}")
        metrics.update(found)
    record = built.rules[0].record
    return {
        "metrics": finite(metrics),
        "steps": steps,
        "batches": record.batches,
        "forward_evals": record.forward_evals,
        "seconds": watch.seconds,
        "mean_cosine": finite(cosine),
        **({} if curve is None else {"curve": finite(noted.points)}),
    }


def step_limits(blueprint: Blueprint, steps: int) -> dict[str, Any]:
    """Return the Trainer's arguments that stop it after a number of optimizer steps, with a validation at the end."""
    configured = blueprint.config.trainer.limit_train_batches
    limits: dict[str, Any] = {"max_steps": steps, "max_epochs": -1}
    if configured is None or isinstance(configured, int):
        # An epoch that max_steps cuts short has no validation, which early stopping and schedulers may wait for.
        batches = steps * blueprint.config.trainer.accumulate_grad_batches
        limits["limit_train_batches"] = batches if configured is None else min(configured, batches)
        interval = blueprint.config.trainer.val_check_interval
        if isinstance(interval, int) and interval > limits["limit_train_batches"]:
            limits["val_check_interval"] = limits["limit_train_batches"]  # more than an epoch has would be refused
    return limits
