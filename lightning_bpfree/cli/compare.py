"""``bpfree compare``: the same module under several rules and backprop, by equal epochs and by equal forward passes."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_bpfree.cli.compare_plan import Contender, contenders, settings, tuning_grid
from lightning_bpfree.cli.compare_results import plot, show, write
from lightning_bpfree.cli.preconditions import CommandError, require, require_writable
from lightning_bpfree.cli.tables import console

Event = dict[str, Any]


def compare(plan: dict[str, Any], rules: Sequence[Contender], out: Path) -> dict[str, Any]:
    """Train every rule in a process of its own, write what is known after each, and return everything.

    Args:
        plan: settings of the comparison.
        rules: the rules, backprop first.
        out: folder of the results.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    comparison: dict[str, Any] = {**plan, "rules": []}
    trials = math.prod(len(values) for values in plan["grid"].values()) if plan["grid"] else 0
    runs = trials + len(plan["seeds"]) * len(plan["budgets"])
    write(comparison, out)
    texts = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeElapsedColumn(),
    )
    with Progress(*texts, console=console()) as progress:
        task = progress.add_task("compare", total=runs * len(rules))
        for index, contender in enumerate(rules):
            comparison["rules"].append({"label": contender.label, "trials": [], "runs": [], "error": None})
            for event in rule_events(plan, contender, _forward_budgets(comparison), out):
                _take(comparison["rules"][-1], event)
                if event["kind"] == "begin":
                    progress.update(task, description=f"{contender.label}: {event['what']}")
                elif event["kind"] in ("run", "trial"):
                    progress.advance(task)
            progress.update(task, completed=runs * (index + 1))
            write(comparison, out)
    return comparison


def _forward_budgets(comparison: dict[str, Any]) -> dict[str, float]:
    """Return how many forward passes backprop has used, by seed; empty before it has been trained."""
    return {
        str(run["seed"]): run["forward_evals"]
        for rule in comparison["rules"]
        if rule.get("rule") == "Backprop"
        for run in rule["runs"]
        if run["error"] is None
    }


def _take(result: dict[str, Any], event: Event) -> None:
    """Add what a rule's process has reported to the rule's results."""
    kind, fields = event["kind"], {key: value for key, value in event.items() if key != "kind"}
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


def rule_events(plan: dict[str, Any], contender: Contender, budgets: dict[str, float], out: Path) -> Iterator[Event]:
    """Run one rule's process, and yield what it reports; a crash is reported too."""
    folder = out / "rules"
    folder.mkdir(exist_ok=True)
    config, log = folder / f"{contender.label}.yaml", folder / f"{contender.label}.log"
    config.write_text(contender.config, encoding="utf-8")
    spec = {**plan, "config": str(config), "forward_budgets": budgets}
    with tempfile.TemporaryDirectory() as temporary, log.open("w", encoding="utf-8") as errors:
        file = Path(temporary) / "spec.json"
        file.write_text(json.dumps(spec), encoding="utf-8")
        command = [sys.executable, "-m", "lightning_bpfree.cli.compare_worker", str(file)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8")
        assert process.stdout is not None
        reported: Event = {"kind": "begin"}
        try:
            for line in process.stdout:
                reported = json.loads(line)
                yield reported
        except BaseException:
            process.kill()
            raise
        finally:
            process.stdout.close()
            code = process.wait()
    if reported["kind"] not in ("end", "refused", "fatal"):
        why = "was killed, most likely for want of memory" if code == -9 else f"ended with code {code}"
        yield {"kind": "refused", "message": f"its process {why}: see {log}"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bpfree compare",
        allow_abbrev=False,
        description="Train the same module under each rule, and under backprop, from one configuration. On one device, "
        "each rule in a process of its own. Rules of the base are left out; its GradientAlignment, if any, measures "
        "every rule. Further options, such as --trainer.precision=bf16-mixed, are those of bpfree fit.",
    )
    add = parser.add_argument
    add("-c", "--config", action="append", required=True, metavar="FILE", help="base: YAML files or recipes")
    add("--rules", nargs="+", required=True, metavar="FILE", help="overlays with one rule each: YAML files or recipes")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of comparison.json, .csv and .png")
    add(
        "--budget",
        nargs="+",
        choices=("epochs", "forwards"),
        default=["epochs", "forwards"],
        help="what is equal for all: epochs, or the forward passes that backprop uses in them (default: both)",
    )
    add(
        "--tune",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="grid for every rule, such as model.init_args.lr=0.01,0.1; the best by the validation metric is taken",
    )
    add("--metric", default="test_acc", help="default: test_acc; tuned by its namesake with val for test")
    add("--epochs", type=int, metavar="N", help="in place of the base's trainer.max_epochs")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run ``bpfree compare``; the code is 1 if no rule has given a result."""
    options, overrides = _parser().parse_known_args(arguments)
    require("rich", "matplotlib")
    if options.epochs is not None:
        overrides.append(f"--trainer.max_epochs={options.epochs}")
    rules = contenders(options, overrides)
    grid = tuning_grid(options, rules[0].config)
    require_writable(options.out, "--out DIR")
    comparison = compare(settings(options, grid, arguments), rules, options.out)
    plot(comparison, options.out / "comparison.png")
    show(comparison)
    for name in ("comparison.json", "comparison.csv", "comparison.png"):
        console().print(str(options.out / name), soft_wrap=True, highlight=False, markup=False)
    succeeded = any(run["error"] is None for rule in comparison["rules"] for run in rule["runs"])
    return 0 if succeeded else 1
