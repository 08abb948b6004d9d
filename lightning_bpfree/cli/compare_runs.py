"""The runs that a comparison is made of: a few profiled steps, and trainings to the end of a budget."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_bpfree.callbacks.gradient_alignment import GradientAlignment
from lightning_bpfree.cli.configured import Blueprint
from lightning_bpfree.cli.evaluation import evaluated, mean_cosine
from lightning_bpfree.cli.memory import PeakMemory
from lightning_bpfree.cli.records import finite
from lightning_bpfree.rules.training_rule import TrainingRule

PROFILED_STEPS = 3  # the first may differ, and an optimizer has all its state after it


class Stopwatch(Callback):
    """Takes the time of the training itself, without the reading of data before it."""

    seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start."""
        self._start = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self._start


class StepMeter(Callback):
    """Measures the peak of memory over training batches, and what the last batch cost in forward passes."""

    peak_mib: float | None = None
    last_cost = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to measure."""
        self.memory = PeakMemory(trainer.strategy.root_device)
        self.memory.start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note what the rule has evaluated before this batch."""
        self._before = _rule(trainer).record.forward_evals

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note what this batch has cost; validation, which comes behind it, does not count."""
        self.last_cost = _rule(trainer).record.forward_evals - self._before
        self.peak_mib = self.memory.peak()


def _rule(trainer: pl.Trainer) -> TrainingRule:
    return next(cb for cb in trainer.callbacks if isinstance(cb, TrainingRule))  # type: ignore[attr-defined]


def profile(blueprint: Blueprint, seed: int) -> dict[str, Any]:
    """Return what a step costs and its peak of memory, of the rule alone, without a comparison with backprop."""
    meter = StepMeter()
    built = blueprint.build(
        seed=seed,
        callbacks=[meter],
        dropped=(GradientAlignment,),
        strategy="auto",
        max_epochs=1,
        limit_train_batches=PROFILED_STEPS * blueprint.config.trainer.accumulate_grad_batches,
        limit_val_batches=1,  # not 0, for early stopping and schedulers may ask for a metric of it
        num_sanity_val_steps=0,
    )
    built.trainer.fit(built.module, datamodule=built.data)
    device = built.trainer.strategy.root_device
    return {
        "rule": type(built.rules[0]).__name__,
        "settings": built.rules[0].settings(),
        "forward_evals_per_batch": meter.last_cost,
        "peak_memory_mib": meter.peak_mib,
        "peak_memory_kind": meter.memory.kind,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def train(blueprint: Blueprint, seed: int, stages: tuple[Any, ...], **limits: Any) -> dict[str, Any]:
    """Train once, and return the metrics of the last weights and what they have cost.

    Args:
        blueprint: the configuration.
        seed: for ``seed_everything``.
        stages: what to evaluate on afterwards: ``"validate"``, ``"test"``.
        **limits: arguments of the Trainer that set the budget.
    """
    watch = Stopwatch()
    built = blueprint.build(seed=seed, callbacks=[watch], strategy="auto", **limits)
    built.trainer.fit(built.module, datamodule=built.data)
    metrics = {name: float(value) for name, value in built.trainer.callback_metrics.items()}
    cosine, steps = mean_cosine(built.trainer), built.trainer.global_step
    for stage in stages:
        metrics.update(evaluated(stage, built.trainer, built.module, built.data))
    record = built.rules[0].record
    return {
        "metrics": finite(metrics),
        "steps": steps,
        "batches": record.batches,
        "forward_evals": record.forward_evals,
        "seconds": watch.seconds,
        "mean_cosine": finite(cosine),
    }


def step_limits(blueprint: Blueprint, steps: int) -> dict[str, Any]:
    """Return the Trainer's arguments that stop it after so many optimizer steps, with a validation at the end."""
    configured = blueprint.config.trainer.limit_train_batches
    limits: dict[str, Any] = {"max_steps": steps, "max_epochs": -1}
    if configured is None or isinstance(configured, int):
        # An epoch that max_steps cuts short has no validation, which early stopping and schedulers may wait for.
        batches = steps * blueprint.config.trainer.accumulate_grad_batches
        limits["limit_train_batches"] = batches if configured is None else min(configured, batches)
    return limits
