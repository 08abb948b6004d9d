"""One rule of a comparison, in its own process, which isolates its peak memory and its crashes.

The process reads its tasks from a JSON file, and writes one JSON object per result as a line to the standard output.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_bpfree.cli.common.configured import Blueprint
from lightning_bpfree.cli.common.preconditions import CommandError, did_you_mean
from lightning_bpfree.cli.compare.kept import KeptRuns
from lightning_bpfree.cli.compare.runs import MetricMissingError, profile, step_limits, train
from lightning_bpfree.training.training_rule import BACKPROP_COST

Send = Callable[..., None]
Result = dict[str, Any]


class RefusedError(Exception):
    """The rule cannot train the module with any seed."""


class Contest:
    """All tasks of one rule in a comparison.

    Args:
        spec: the tasks, written by ``bpfree compare``.
        send: reports the results.
    """

    def __init__(self, spec: dict[str, Any], send: Send) -> None:
        self.spec, self.send = spec, send
        self.curve = spec["curve"]["metric"] if "curve" in spec else None
        self.kept = KeptRuns(Path(spec["kept"]) if "kept" in spec else None)

    def run(self) -> None:
        """Profile, tune, and train for every seed and budget."""
        blueprint = self._blueprint({})
        self.send("begin", what="profile")
        seed = self.spec["seeds"][0]
        profiled, _ = self.kept.get(partial(profile, blueprint, seed), "profile", blueprint.dump(), seed)
        self._check_metrics(profiled.pop("logged"))
        self.send("profile", **profiled)
        if self.spec["grid"]:
            blueprint = self._blueprint(self._tuned())
        for seed in self.spec["seeds"]:
            self._budgets(blueprint, seed, profiled)

    def _check_metrics(self, logged: dict[str, list[str]] | None) -> None:
        """Raise MetricMissingError, before any training, if the module does not log what is asked for."""
        if logged is None:  # the module cannot be evaluated on one batch
            return
        spec, tuned = self.spec, bool(self.spec["grid"]) and self.spec.get("tuned_by") == "last"
        everything = sorted({name for names in logged.values() for name in names})
        _check_logged("--metric", spec["metric"], everything)
        if self.curve is not None:
            _check_logged("--curve", self.curve, logged["validate"])
        if tuned:
            _check_logged("--tune", spec["tuning_metric"], sorted({*logged["fit"], *logged["validate"]}))

    def _blueprint(self, values: dict[str, str]) -> Blueprint:
        values = {**self.spec.get("values", {}), **values}  # the former where a key is varied
        return Blueprint(["-c", self.spec["config"], *(f"--{key}={value}" for key, value in values.items())])

    def _tuned(self) -> dict[str, str]:
        """Return the values of the grid with the best validation metric, on a seed that is used for nothing else.

        Of those with the same metric the one with the least loss is taken, and then the first.
        """
        grid, metric = self.spec["grid"], self.spec["tuning_metric"]
        noted = self.spec["curve"] if self.spec.get("tuned_by") == "curve" else self.spec
        sign = 1 if noted["larger_is_better"] else -1
        best: tuple[tuple[float, float], dict[str, str]] | None = None
        for combination in itertools.product(*grid.values()):
            values = dict(zip(grid, combination, strict=True))
            self.send("begin", what=f"tune {_written(values)}")
            trial = _attempted(partial(self._trial, values))
            kept, value = trial.pop("kept", False), _metric(trial, metric)
            self.send("trial", values=values, metric=metric, value=value, error=trial["error"], kept=kept)
            if value is None:
                continue
            rank = (sign * value, -_loss_beside(metric, trial["metrics"]))
            if best is None or rank > best[0]:
                best = (rank, values)
        if best is None:
            raise RefusedError(f"no trial of the tuning grid has given {metric}; the last: {trial['error']}")
        self.send("chosen", values=best[1])
        return best[1]

    def _trial(self, values: dict[str, str]) -> Result:
        # The curve is not kept, but one that validation does not log is found before hours of tuning.
        trial = self._trained(self._blueprint(values), self.spec["tuning_seed"], ("validate",))
        if self.spec.get("tuned_by") == "curve":
            values_of_curve = [value for _, value in trial["curve"]]
            known = values_of_curve and None not in values_of_curve
            trial["metrics"][self.spec["tuning_metric"]] = statistics.fmean(values_of_curve) if known else None
        return trial

    def _trained(self, blueprint: Blueprint, seed: int, stages: tuple[str, ...], **limits: Any) -> Result:
        """Return the result of a training, which may have been finished before."""
        run = partial(train, blueprint, seed, stages, self.curve, **limits)
        found, kept = self.kept.get(run, "train", blueprint.dump(), seed, stages, self.curve, limits)
        return {**found, "kept": kept}

    def _budgets(self, blueprint: Blueprint, seed: int, profiled: Result) -> None:
        budgets, is_backprop = self.spec["budgets"], profiled["rule"] == "Backprop"
        by_epochs: Result | None = None
        if "epochs" in budgets or is_backprop:  # whose epochs are what sets the budget of forwards
            by_epochs = self._run(blueprint, seed, "epochs" if "epochs" in budgets else "forwards")
        if "forwards" not in budgets or (by_epochs is not None and by_epochs["budget"] == "forwards"):
            return
        budget, cost = self._forwards(seed, profiled, by_epochs)
        if by_epochs is not None and (is_backprop or abs(by_epochs.get("forward_evals", 0.0) - budget) < cost):
            self.send("run", **{**by_epochs, "budget": "forwards", "reused": True})  # the same run, to within a batch
        else:
            steps = max(1, int(budget / (cost * blueprint.config.trainer.accumulate_grad_batches) + 1e-9))
            self._run(blueprint, seed, "forwards", **step_limits(blueprint, steps))

    def _forwards(self, seed: int, profiled: Result, by_epochs: Result | None) -> tuple[float, float]:
        """Return the budget of forward passes, which is what backprop used, and what a batch costs this rule."""
        cost, batches = profiled["forward_evals_per_batch"], 0
        if by_epochs is not None and "batches" in by_epochs:
            batches = by_epochs["batches"]
            cost = by_epochs["forward_evals"] / batches
        known = self.spec["forward_budgets"]
        # Where backprop failed: what it used on other seeds, or would have used in the epochs of this rule.
        budget = known.get(str(seed)) or max(known.values(), default=BACKPROP_COST * batches)
        if not budget and profiled["rule"] != "Backprop":
            raise RefusedError("backprop was not trained, so the number of forward passes of the budget is not known")
        return budget, cost

    def _run(self, blueprint: Blueprint, seed: int, budget: str, **limits: Any) -> Result:
        self.send("begin", what=f"seed {seed}, budget {budget}")
        result = _attempted(partial(self._trained, blueprint, seed, ("validate", "test"), **limits))
        if result.get("refused"):
            raise RefusedError(result["error"])
        if _metric(result, self.spec["metric"]) is None and result["error"] is None:
            result["error"] = f"{self.spec['metric']} is not finite"
        done = {"budget": budget, "seed": seed, "reused": False, **result}
        self.send("run", **done)
        return done


def _attempted(run: Callable[[], Result]) -> Result:
    """Return what ``run`` returns, or its error."""
    try:
        return {**run(), "error": None}
    except MetricMissingError:
        raise
    except Exception as error:
        traceback.print_exc()  # to the log
        known = isinstance(error, MisconfigurationException | CommandError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        return {"error": message, "refused": isinstance(error, MisconfigurationException)}


def _metric(result: Result, metric: str) -> float | None:
    if "metrics" not in result:
        return None
    _check_logged("--metric", metric, sorted(result["metrics"]))
    value: float | None = result["metrics"][metric]
    return value


def _check_logged(option: str, metric: str, known: Sequence[str]) -> None:
    if metric not in known:
        stage = " in validation" if option == "--curve" else ""
        raise MetricMissingError(
            f"{option} {metric}: the module does not log this metric{stage}.{did_you_mean(metric, known)} It logs: "
            f"{', '.join(known) or 'nothing'}."
        )


def _loss_beside(metric: str, metrics: dict[str, float | None]) -> float:
    """Return the loss that is named like an accuracy: `val_loss` for `val_acc`; infinity where there is none."""
    name = re.sub("acc(uracy)?", "loss", metric, count=1)
    loss = metrics.get(name) if name != metric else None
    return math.inf if loss is None else loss


def _written(values: dict[str, str]) -> str:
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in values.items())


@contextlib.contextmanager
def _reports() -> Iterator[Send]:
    """Keep the standard output for reports: what Lightning and the module print goes to the standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        os.dup2(2, 1)

        def send(kind: str, **fields: Any) -> None:
            output.write(json.dumps({"kind": kind, **fields}, allow_nan=False) + "\n")
            output.flush()

        yield send


def work(spec: dict[str, Any], send: Send) -> None:
    """Run the tasks in ``spec``, and report an error that stops them."""
    try:
        Contest(spec, send).run()
        send("end")
    except MetricMissingError as error:
        send("fatal", message=str(error))
    except (RefusedError, MisconfigurationException, CommandError) as error:
        send("refused", message=str(error))
    except Exception as error:
        traceback.print_exc()
        send("refused", message=f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    """End this process, and those that it has started, when the one that reads its reports has ended."""

    def wait() -> None:
        sys.stdin.buffer.read()  # the other end of the pipe is closed, be it by SIGKILL
        if hasattr(os, "killpg"):
            os.killpg(os.getpgrp(), signal.SIGKILL)  # `bpfree compare` gives each worker a group of its own
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(path: str) -> None:
    """Run the tasks in the JSON file at ``path``."""
    _end_with_parent()
    with _reports() as send:
        work(json.loads(Path(path).read_text(encoding="utf-8")), send)


if __name__ == "__main__":
    main(sys.argv[1])
