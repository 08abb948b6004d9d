"""``bpfree tickets``: lottery tickets of several kinds, their transfer to other rules, and the lines between them."""

from __future__ import annotations

import argparse
import itertools
import os
import platform
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning
import torch

import lightning_bpfree
from lightning_bpfree.cli import recipes, tickets_results
from lightning_bpfree.cli.compare_plan import contenders
from lightning_bpfree.cli.configured import Blueprint, silence
from lightning_bpfree.cli.preconditions import CommandError, require, require_writable
from lightning_bpfree.cli.tables import console
from lightning_bpfree.cli.tickets_runs import AGAIN, KINDS, Result, Study, plan_of

OWN, OTHER = "magnitude", "random"  # what a transfer is compared with: the target's own tickets, and fresh ones


def parts(base: Study, targets: Sequence[Study], options: argparse.Namespace) -> Iterator[tuple[str, Result]]:
    """Train and measure everything, and yield ``("run", ...)`` a trained level and ``("barrier", ...)`` a line.

    Args:
        base: the rule whose tickets are found in all ways.
        targets: rules that its tickets are transferred to.
        options: of the command line.
    """
    for seed in options.seeds:
        found: dict[tuple[str, str], list[Result]] = {}
        own = [(base, kind) for kind in options.kinds]
        for study, kind in [*own, *((target, kind) for target in targets for kind in (OWN, OTHER))]:
            for result in study.levels(kind, seed):
                found.setdefault((study.rule, kind), []).append(result)
                yield "run", result
        given = found[base.rule, options.kinds[0]]
        for target in targets:
            for result in given[1:]:
                yield "run", target.again(Path(result["file"]), f"{options.kinds[0]}_of_{base.rule}", seed)
        if not options.no_connectivity:
            for study, kind in ((base, options.kinds[0]), *((target, OWN) for target in targets)):
                yield from _lines(study, kind, seed, found[study.rule, kind])


def _lines(study: Study, kind: str, seed: int, levels: list[Result]) -> Iterator[tuple[str, Result]]:
    """Yield barriers between neighbouring levels, and between two trainings of each ticket."""
    for one, other in itertools.pairwise(levels):
        yield "barrier", _barrier(study, "levels", one, other)
    for result in levels:
        again = study.again(Path(result["file"]), f"{kind}_again", seed + AGAIN)
        yield "run", again
        yield "barrier", _barrier(study, "seeds", result, again)


def _barrier(study: Study, between: str, one: Result, other: Result) -> Result:
    barriers = study.barriers(Path(one["file"]), Path(other["file"]))
    shared = {"rule": study.rule, "tickets": one["tickets"], "between": between, "seed": one["seed"]}
    place = {"level": other["level"], "weights_left": other["weights_left"]}
    return {**shared, **place, **{name: barrier._asdict() for name, barrier in barriers.items()}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bpfree tickets",
        allow_abbrev=False,
        description="Find lottery tickets in several ways, from a configuration with a rule and a LotteryTicket; train "
        "the first kind under other rules; measure how the loss rises on the lines between trained networks. On one "
        "device. Further options, such as --trainer.max_epochs=80, are those of bpfree fit.",
    )
    add = parser.add_argument
    add("-c", "--config", action="append", required=True, metavar="FILE", help="base: YAML files or recipes")
    add(
        "--kinds",
        nargs="+",
        choices=tuple(KINDS),
        default=["snr", "magnitude", "random"],
        help="ways to find tickets; the first is what is transferred (default: snr magnitude random)",
    )
    add("--transfer", nargs="+", default=[], metavar="FILE", help="overlays with another rule each")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--no-connectivity", action="store_true", help="leave out the lines between networks")
    add("--metric", default="test_acc", help="default: test_acc")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of tickets.json, tickets.csv, plots and tickets")
    return parser


def _studies(options: argparse.Namespace, overrides: list[str]) -> tuple[Study, list[Study]]:
    base = Blueprint([*recipes.config_arguments(options.config), *overrides])
    rules = [callback.class_path.rpartition(".")[2] for callback in base.callbacks]
    folder, metric = options.out / "tickets", options.metric
    named = next((name for name in rules if hasattr(lightning_bpfree, name) and name != "LotteryTicket"), None)
    if named is None:
        raise CommandError("the configuration has no training rule among trainer.callbacks: give one that has.")
    study = Study(base, named, folder, metric)
    targets = []
    for contender in contenders(argparse.Namespace(config=options.config, rules=options.transfer), overrides):
        if contender.label in [Path(overlay).stem for overlay in options.transfer]:
            targets.append(Study(_read(contender.config, options.out), contender.label, folder, metric))
    return study, targets


def _read(config: str, folder: Path) -> Blueprint:
    file = folder / "transfer.yaml"
    file.write_text(config, encoding="utf-8")
    return Blueprint(["-c", str(file)])


def settings(options: argparse.Namespace, base: Study, argv: Sequence[str]) -> dict[str, Any]:
    """Return what tickets.json says of a study before its results."""
    return {
        "command": ["bpfree", "tickets", *argv],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "lightning_bpfree": lightning_bpfree.__version__,
        },
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "metric": options.metric,
        "larger_is_better": "loss" not in options.metric,
        "seeds": options.seeds,
        "rule": base.rule,
        "kinds": options.kinds,
        "epochs_per_level": base.arguments["epochs_per_level"],
    }


def run(arguments: Sequence[str]) -> int:
    """Run ``bpfree tickets``."""
    options, overrides = _parser().parse_known_args(arguments)
    require("rich", "matplotlib")
    require_writable(options.out, "--out DIR")
    base, targets = _studies(options, overrides)
    study: dict[str, Any] = {**settings(options, base, arguments), "runs": [], "barriers": []}
    with silence(), tickets_results.progress() as bar:
        plan = {"connectivity": not options.no_connectivity, "transfers": len(targets), "seeds": options.seeds}
        task = bar.add_task("tickets", total=plan_of(options.kinds, levels=base.num_levels, **plan))
        for kind, result in parts(base, targets, options):
            study[f"{kind}s"].append(result)
            if kind == "run":
                what = f"{result['rule']}, {result['tickets']}, seed {result['seed']}, level {result['level']}"
                bar.update(task, description=what, advance=1)
            tickets_results.write(study, options.out)
    tickets_results.show(study)
    for file in [*tickets_results.plots(study, options.out), options.out / "tickets.json", options.out / "tickets.csv"]:
        console().print(str(file), soft_wrap=True, highlight=False, markup=False)
    return 0
