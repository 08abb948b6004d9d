"""One rule of a comparison, in a process of its own, so that its peak of memory is its own and its crash is too.

Reads what to do from a JSON file, and writes one JSON object a line to the standard output for everything it has done.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from lightning_bpfree.callbacks.gradient_alignment import GradientAlignment
from lightning_bpfree.cli.configured import Blueprint
from lightning_bpfree.cli.evaluation import evaluated, mean_cosine
from lightning_bpfree.cli.memory import PeakMemory
from lightning_bpfree.rules.training_rule import BACKPROP_COST, TrainingRule

PROFILED_STEPS = 3  # the first may differ, and an optimizer has all its state after it
Send = Callable[..., None]


class MetricMissingError(Exception):
    """The metric to compare by is not among those that the module logs."""


class Meter(Callback):
    """Seconds and peak memory of the training itself, without the reading of data, and the cost of the last batch."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_mib: float | None = None
        self.last_cost = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to measure."""
        self._memory = PeakMemory(trainer.strategy.root_device)
        self._memory.start()
        self._start = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note what the rule has evaluated before this batch."""
        self._evals = _rule(trainer).record.forward_evals

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note what this batch has cost."""
        self.last_cost = _rule(trainer).record.forward_evals - self._evals

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the results."""
        self.seconds = time.perf_counter() - self._start
        self.peak_mib = self._memory.peak()


def _rule(trainer: pl.Trainer) -> TrainingRule:
    return next(cb for cb in trainer.callbacks if isinstance(cb, TrainingRule))  # type: ignore[attr-defined]


def profile(blueprint: Blueprint, seed: int) -> dict[str, Any]:
    """Return the cost of a step and its peak memory, of the rule alone: no validation, no comparison with backprop."""
    meter = Meter()
    built = blueprint.build(
        seed=seed,
        callbacks=[meter],
        dropped=(GradientAlignment,),
        strategy="auto",
        max_steps=PROFILED_STEPS,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    built.trainer.fit(built.module, datamodule=built.data)
    device = built.trainer.strategy.root_device
    return {
        "rule": type(built.rules[0]).__name__,
        "settings": built.rules[0].settings(),
        "forward_evals_per_batch": meter.last_cost,
        "peak_memory_mib": meter.peak_mib,
        "peak_memory_kind": PeakMemory(device).kind,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "planned_batches": _planned_batches(blueprint, built.trainer),
        "accumulate_grad_batches": built.trainer.accumulate_grad_batches,
    }


def _planned_batches(blueprint: Blueprint, trainer: pl.Trainer) -> float:
    """Return how many batches the configuration trains on, if nothing stops it early."""
    planned = blueprint.config.trainer
    by_epochs = by_steps = math.inf
    if planned.max_epochs is not None and planned.max_epochs >= 0:
        by_epochs = planned.max_epochs * trainer.num_training_batches
    if planned.max_steps is not None and planned.max_steps >= 0:
        by_steps = planned.max_steps * trainer.accumulate_grad_batches
    return min(by_epochs, by_steps)


def train(blueprint: Blueprint, seed: int, stages: tuple[Any, ...], **limits: Any) -> dict[str, Any]:
    """Train once, and return the metrics and what they have cost.

    Args:
        blueprint: the configuration.
        seed: for ``seed_everything``.
        stages: what to evaluate on afterwards: ``"validate"``, ``"test"``.
        **limits: arguments of the Trainer that set the budget.
    """
    meter = Meter()
    built = blueprint.build(seed=seed, callbacks=[meter], strategy="auto", **limits)
    built.trainer.fit(built.module, datamodule=built.data)
    metrics = {name: float(value) for name, value in built.trainer.callback_metrics.items()}
    cosine = mean_cosine(built.trainer)
    steps = built.trainer.global_step
    for stage in stages:
        metrics.update(evaluated(stage, built.trainer, built.module, built.data))
    record = built.rules[0].record
    return {
        "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
        "steps": steps,
        "batches": record.batches,
        "forward_evals": record.forward_evals,
        "seconds": meter.seconds,
        "mean_cosine": cosine,
    }


class Contest:
    """Everything one rule has to do in a comparison.

    Args:
        spec: what to do; written by ``bpfree compare``.
        send: reports what is done.
    """

    def __init__(self, spec: dict[str, Any], send: Send) -> None:
        self.spec, self.send = spec, send

    def run(self) -> None:
        """Profile, tune, and train for every seed and budget."""
        blueprint = self._blueprint({})
        self.send("begin", what="profile")
        profiled = profile(blueprint, self.spec["seeds"][0])
        self.send("profile", **profiled)
        chosen = self._tuned() if self.spec["grid"] else {}
        blueprint = self._blueprint(chosen)
        for seed in self.spec["seeds"]:
            self._seed(blueprint, seed, profiled)

    def _blueprint(self, values: dict[str, Any]) -> Blueprint:
        return Blueprint(["-c", self.spec["config"], *(f"--{key}={value}" for key, value in values.items())])

    def _tuned(self) -> dict[str, str]:
        """Return the values of the grid with the best validation metric, on a seed that is used for nothing else."""
        grid, metric = self.spec["grid"], self.spec["tuning_metric"]
        results: list[tuple[float, dict[str, str]]] = []
        for combination in itertools.product(*grid.values()):
            values = dict(zip(grid, combination, strict=True))
            self.send("begin", what=f"tune {_written(values)}")
            trial = self._attempt(lambda values=values: train(self._blueprint(values), self.spec["tuning_seed"], ("validate",)))
            value = self._value(trial, metric)
            self.send("trial", values=values, metric=metric, value=value, error=trial.get("error"))
            if value is not None:
                results.append((value if self.spec["larger_is_better"] else -value, values))
        if not results:
            raise MisconfigurationException("no trial of the tuning grid has given a metric")
        chosen = max(results, key=lambda result: result[0])[1]
        self.send("chosen", values=chosen)
        return chosen

    def _seed(self, blueprint: Blueprint, seed: int, profiled: dict[str, Any]) -> None:
        budgets, by_epochs = self.spec["budgets"], None
        is_backprop = profiled["rule"] == "Backprop"  # its epochs are what sets the budget of forwards
        if "epochs" in budgets or is_backprop:
            by_epochs = self._run(blueprint, seed, budget="epochs" if "epochs" in budgets else "forwards")
        if "forwards" not in budgets or (is_backprop and "epochs" not in budgets):
            return
        cost = profiled["forward_evals_per_batch"]
        if by_epochs is not None and by_epochs.get("batches"):
            cost = by_epochs["forward_evals"] / by_epochs["batches"]
        budget = self.spec["forward_budget"] or BACKPROP_COST * profiled["planned_batches"]
        steps = max(1, int(budget / (cost * profiled["accumulate_grad_batches"]) + 1e-9))
        if by_epochs is not None and (is_backprop or steps == by_epochs.get("steps")):
            self.send("run", **{**by_epochs, "budget": "forwards", "reused": True})
        else:
            self._run(blueprint, seed, budget="forwards", max_steps=steps, max_epochs=-1)

    def _run(self, blueprint: Blueprint, seed: int, budget: str, **limits: Any) -> dict[str, Any]:
        self.send("begin", what=f"seed {seed}, budget {budget}")
        result = self._attempt(lambda: train(blueprint, seed, ("validate", "test"), **limits))
        self._value(result, self.spec["metric"])
        done = {"budget": budget, "seed": seed, "reused": False, "error": None, **result}
        self.send("run", **done)
        return done

    def _attempt(self, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return run()
        except MisconfigurationException:
            raise  # the same for every seed
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def _value(self, result: dict[str, Any], metric: str) -> float | None:
        if "metrics" not in result:
            return None
        if metric not in result["metrics"]:
            known = ", ".join(sorted(result["metrics"])) or "nothing"
            raise MetricMissingError(f"the metric {metric} is not logged by the module, which logs: {known}")
        value: float | None = result["metrics"][metric]
        return value


def _written(values: dict[str, str]) -> str:
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in values.items())


@contextlib.contextmanager
def _reports() -> Iterator[Send]:
    """Keep the standard output for reports: what Lightning and the module print goes to the standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        os.dup2(2, 1)

        def send(kind: str, **fields: Any) -> None:
            output.write(json.dumps({"kind": kind, **fields}) + "\n")
            output.flush()

        yield send


def main(path: str) -> None:
    """Do what the JSON file at ``path`` says; errors are reported, not raised."""
    with _reports() as send:
        try:
            Contest(json.loads(Path(path).read_text(encoding="utf-8")), send).run()
        except MetricMissingError as error:
            send("fatal", message=str(error))
        except MisconfigurationException as error:
            send("refused", message=str(error))
        except Exception as error:
            send("refused", message=f"{type(error).__name__}: {error}")
            raise


if __name__ == "__main__":
    main(sys.argv[1])
