"""``bpfree compare``: the same module under several rules and backprop, at equal epochs and equal forward passes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from lightning_bpfree.cli.common.arguments import configuration_options
from lightning_bpfree.cli.common.preconditions import CommandError, require, require_writable
from lightning_bpfree.cli.common.signals import sigterm_raises
from lightning_bpfree.cli.common.tables import console
from lightning_bpfree.cli.compare import conditions as compare_conditions
from lightning_bpfree.cli.compare import curves as compare_curves
from lightning_bpfree.cli.compare import results as compare_results
from lightning_bpfree.cli.compare.kept import identity, protect
from lightning_bpfree.cli.compare.options import parser
from lightning_bpfree.cli.compare.plan import (
    Contender,
    check_length,
    check_numbers,
    contenders,
    curve,
    settings,
    tuning,
    variation,
)
from lightning_bpfree.cli.compare.processes import Event, end_all, rule_events
from lightning_bpfree.cli.compare.progress import RunsLeft


class Part(NamedTuple):
    """A comparison of all rules: the whole comparison, or the part for one value of a varied key.

    Args:
        plan: settings for the processes of the rules.
        results: the dict that receives ``rules``.
        folder: folder for the configurations and logs of the rules.
        name: the value; empty if nothing is varied.
    """

    plan: dict[str, Any]
    results: dict[str, Any]
    folder: Path
    name: str

    def runs(self, label: str) -> int:
        """Return the number of a rule's trainings."""
        trials: int = self.plan["trials"].get(label, 0)
        return trials + len(self.plan["seeds"]) * len(self.plan["budgets"])


def compare(plan: dict[str, Any], rules: Sequence[Contender], out: Path, jobs: int = 1) -> dict[str, Any]:
    """Train every rule in its own process, write intermediate results after each, and return all results.

    Args:
        plan: settings of the comparison.
        rules: the rules, backprop first.
        out: folder of the results.
        jobs: number of rules that train at the same time.
    """
    shown = {key: value for key, value in plan.items() if key != "kept"}
    comparison: dict[str, Any] = {**shown, **({"conditions": []} if "vary" in plan else {"rules": []})}
    parts, files = _parts(plan, comparison, out / "rules"), _files(plan)
    writing, order = threading.Lock(), [contender.label for contender in rules]
    left = {rule.label: sum(part.runs(rule.label) for part in parts) for rule in rules}

    def write(part: Part) -> None:
        with writing:
            part.results["rules"].sort(key=lambda rule: order.index(rule["label"]))
            files.write(comparison, out)

    with RunsLeft(left, plan["metric"], jobs) as progress:

        def train(part: Part, contender: Contender, stop: threading.Event) -> None:
            label, missing = contender.label, part.runs(contender.label)
            for event in _rule_in(part, contender, parts[0]):
                if stop.is_set():
                    return  # leaving the generator ends its process
                if event["kind"] == "begin":
                    what = ", ".join(filter(None, (part.name, event["what"])))
                    progress.begin(label, what)
                elif event["kind"] in ("run", "trial"):
                    missing -= 1
                    progress.end(label, what if event["kind"] == "trial" else _named(part, event), event)
                    write(part)
            progress.drop(label, missing)  # of a rule that was refused
            write(part)

        try:
            for part in parts:
                if part.results is not comparison:
                    comparison["conditions"].append(part.results)
                # Backprop sets the budget of forward passes, so that it goes first.
                _side_by_side(rules[:1], 1, partial(train, part))
                _side_by_side(rules[1:], jobs, partial(train, part))
        except KeyboardInterrupt as error:
            end_all()
            raise type(error)(
                f"{progress.done} of {progress.total} runs are finished and kept in {out}. The same command continues."
            ) from None
        finally:
            end_all()
    return comparison


def _named(part: Part, run: Event) -> str:
    """Return what a run is called in its line."""
    return ", ".join(filter(None, (part.name, f"seed {run['seed']}", f"budget {run['budget']}")))


def _side_by_side(rules: Sequence[Contender], jobs: int, train: Callable[[Contender, threading.Event], None]) -> None:
    """Train rules, ``jobs`` at a time; the first error stops all."""
    stop = threading.Event()
    if jobs == 1:
        for contender in rules:
            train(contender, stop)
        return
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for done in as_completed([pool.submit(train, contender, stop) for contender in rules]):
                done.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _of(results: dict[str, Any], label: str) -> dict[str, Any]:
    """Return what is known of a rule."""
    return next(rule for rule in results["rules"] if rule["label"] == label)


def _files(plan: dict[str, Any]) -> ModuleType:
    """Return what writes and shows a comparison."""
    if "vary" in plan:
        return compare_conditions
    return compare_curves if "curve" in plan else compare_results


def _parts(plan: dict[str, Any], comparison: dict[str, Any], folder: Path) -> list[Part]:
    """Return the comparison itself, or one for each value of the varied key, of which the first alone is tuned."""
    if "vary" not in plan:
        return [Part(plan, comparison, folder, "")]
    parts = []
    for place, value in enumerate(plan["vary"]["values"]):
        own = {**plan, "values": {plan["vary"]["key"]: value}}
        if place:
            own |= {"grids": {}, "trials": {}}
        name = f"{place + 1}-" + re.sub(r"[^\w.+-]+", "_", value)
        parts.append(Part(own, {"value": value, "rules": []}, folder / name, value))
    return parts


def _rule_in(part: Part, contender: Contender, first: Part) -> Iterator[Event]:
    """Train a rule with what it was tuned to in the first part, put what it reports into ``part``, and yield it."""
    result: dict[str, Any] = {"label": contender.label, "trials": [], "runs": [], "error": None}
    part.results["rules"].append(result)
    budgets, plan = _forward_budgets(part.results), {**part.plan, "grid": part.plan["grids"].get(contender.label, {})}
    if part is not first and first.plan["grids"][contender.label]:
        tuned = _of(first.results, contender.label)
        if "chosen" not in tuned:
            result["error"] = f"not tuned: {tuned['error']}"
            return
        result["chosen"] = tuned["chosen"]
        plan = {**plan, "values": {**plan["values"], **tuned["chosen"]}}
    for event in rule_events(plan, contender, budgets, part.folder):
        _take(result, event)
        yield event


def _forward_budgets(results: dict[str, Any]) -> dict[str, float]:
    """Return how many forward passes backprop has used, by seed; empty before it has been trained."""
    return {
        str(run["seed"]): run["forward_evals"]
        for rule in results["rules"]
        if rule.get("rule") == "Backprop"
        for run in rule["runs"]
        if run["error"] is None
    }


def _take(result: dict[str, Any], event: Event) -> None:
    """Add what a rule's process has reported to the rule's results."""
    kind, fields = event["kind"], {key: value for key, value in event.items() if key not in ("kind", "kept")}
    if kind == "profile":
        result.update(fields)
    elif kind == "chosen":
        result["chosen"] = fields["values"]
    elif kind in ("trial", "run"):
        result[f"{kind}s"].append(fields)
    elif kind == "refused":
        result["error"] = fields["message"]
    elif kind == "fatal":
        raise CommandError(fields["message"])


def run(arguments: Sequence[str]) -> int:
    """Run ``bpfree compare``; the exit code is 1 if no rule has a result."""
    made = parser()
    options, given = made.parse_known_args(arguments)
    overrides = configuration_options(given, made.options())
    require("rich", "matplotlib")
    check_numbers(options)
    if options.epochs is not None:
        overrides.append(f"--trainer.max_epochs={options.epochs}")
    noted, rules = curve(options), contenders(options, overrides)
    check_length(rules[0].config)
    tuned, vary = tuning(options, rules), variation(options, rules[0].config)
    plan = {**settings(options, tuned, arguments), **noted, **({} if vary is None else {"vary": vary})}
    plan["identity"] = identity(plan, {rule.label: rule.config for rule in rules}, vary)
    protect(options.out, plan["identity"], options.overwrite)
    require_writable(options.out, "--out DIR")
    with sigterm_raises():
        comparison = compare({**plan, "kept": str(options.out / "runs")}, rules, options.out, options.jobs)
    files = _files(comparison)
    files.plot(comparison, options.out / "comparison.png")
    files.show(comparison)
    curves = ["comparison_curves.png"] if noted else []
    for name in ("comparison.json", "comparison.csv", "comparison.png", *curves):
        console().print(str(options.out / name), soft_wrap=True, highlight=False, markup=False)
    parts = comparison["conditions"] if vary else [comparison]
    succeeded = any(run["error"] is None for part in parts for rule in part["rules"] for run in rule["runs"])
    return 0 if succeeded else 1
