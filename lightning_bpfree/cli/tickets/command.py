"""``bpfree tickets``: lottery tickets of several kinds, their transfer to other rules, and the lines between them."""

from __future__ import annotations

import argparse
import itertools
import pkgutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_bpfree.cli.common import recipes
from lightning_bpfree.cli.common.arguments import configuration_options
from lightning_bpfree.cli.common.configured import Blueprint
from lightning_bpfree.cli.common.evaluation import larger_is_better
from lightning_bpfree.cli.common.preconditions import CommandError, require, require_writable
from lightning_bpfree.cli.common.records import finite, provenance
from lightning_bpfree.cli.common.tables import console
from lightning_bpfree.cli.compare.plan import check_seeds, contenders
from lightning_bpfree.cli.tickets import results as tickets_results
from lightning_bpfree.cli.tickets.options import KINDS, parser
from lightning_bpfree.cli.tickets.runs import AGAIN, Result, Study, plan_of
from lightning_bpfree.methods.backprop.rule import Backprop
from lightning_bpfree.training.quiet_lightning import quiet_lightning
from lightning_bpfree.training.training_rule import TrainingRule

OWN, OTHER = "magnitude", "random"  # what a transfer is compared with: the target's own tickets, and fresh ones


def parts(base: Study, targets: Sequence[Study], options: argparse.Namespace) -> Iterator[tuple[str, Result]]:
    """Train and measure everything; yield ``("run", ...)`` per trained level and ``("barrier", ...)`` per line.

    Args:
        base: the rule for which all kinds of tickets are found.
        targets: rules that its tickets are transferred to.
        options: options of the command line.
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
    """Yield barriers between neighboring levels, and between two trainings of each ticket."""
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
    found = {name: finite(barrier._asdict()) for name, barrier in barriers.items()}
    for barrier in found.values():
        if None in barrier["values"]:  # a maximum over NaN says nothing
            barrier.update(barrier=None, barrier_from_mean=None)
    return {**shared, **place, **found}


def _studies(options: argparse.Namespace, overrides: list[str]) -> tuple[Study, list[Study]]:
    base = Blueprint([*recipes.config_arguments(options.config), *overrides])
    kinds = [pkgutil.resolve_name(callback.class_path) for callback in base.callbacks]
    rules = [kind.__name__ for kind in kinds if issubclass(kind, TrainingRule)]
    if len(rules) != 1:
        names = ", ".join(rules) or "none"
        raise CommandError(f"trainer.callbacks must contain exactly one training rule; it contains {names}.")
    folder, metric = options.out / "tickets", options.metric
    study = Study(base, rules[0], folder, metric)
    for kind in options.kinds:
        study.tickets(kind)
    targets = [Study(_read(config), label, folder, metric) for label, config in _targets(options, overrides)]
    if rules[0] in [target.rule for target in targets]:
        raise CommandError(
            f"--transfer {rules[0]}: the rule of the base configuration has the same name. Rename the file."
        )
    first = options.kinds[0]
    if KINDS[first]["weights"] != "init" and (targets or not options.no_connectivity):
        good = ", ".join(kind for kind, arguments in KINDS.items() if arguments["weights"] == "init")
        raise CommandError(
            f"--kinds {first} ...: tickets of the first kind are trained a second time from the initial weights, and "
            f"{first} tickets do not keep these. Put one of {good} first, or leave --transfer out and give "
            "--no-connectivity."
        )
    return study, targets


def _targets(options: argparse.Namespace, overrides: list[str]) -> list[tuple[str, str]]:
    """Return label and configuration of each rule that tickets are transferred to."""
    if not options.transfer:
        return []
    # Backprop is always among contenders, if need be by itself: with one more at the end, which one is not asked for?
    named = argparse.Namespace(config=options.config, rules=[*options.transfer, "rules/backprop"])
    found = contenders(named, overrides)
    found.pop(max(i for i, contender in enumerate(found) if contender.kind is Backprop))
    return [(contender.label, contender.config) for contender in found]


def _read(config: str) -> Blueprint:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "transfer.yaml"
        file.write_text(config, encoding="utf-8")
        return Blueprint(["-c", str(file)])


def settings(options: argparse.Namespace, base: Study, argv: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a study, which tickets.json holds before the results."""
    return {
        **provenance("tickets", argv),
        "metric": options.metric,
        "larger_is_better": larger_is_better(options.metric),
        "seeds": options.seeds,
        "rule": base.rule,
        "kinds": options.kinds,
        "epochs_per_level": base.arguments["epochs_per_level"],
    }


def run(arguments: Sequence[str]) -> int:
    """Run ``bpfree tickets``."""
    made = parser()
    options, given = made.parse_known_args(arguments)
    overrides = configuration_options(given, made.options())
    require("rich", "matplotlib")
    options.kinds, options.seeds = (list(dict.fromkeys(given)) for given in (options.kinds, options.seeds))
    check_seeds(options.seeds)
    base, targets = _studies(options, overrides)
    require_writable(options.out, "--out DIR")
    if (options.out / "tickets.json").exists() and not options.overwrite:
        raise CommandError(
            f"{options.out} holds the results of an earlier study. Give another --out, or --overwrite to replace them."
        )
    with quiet_lightning():
        shapes = base.check(not options.no_connectivity)
        for target in targets:
            if target.check(not options.no_connectivity) != shapes:
                raise CommandError(f"--transfer {target.rule}: its network has other parameters than the base network.")
    study: dict[str, Any] = {**settings(options, base, arguments), "runs": [], "barriers": []}
    with quiet_lightning(), tickets_results.progress() as bar:
        plan = {"connectivity": not options.no_connectivity, "transfers": len(targets), "seeds": options.seeds}
        task = bar.add_task("tickets", total=plan_of(options.kinds, levels=base.num_levels, **plan))
        for kind, result in parts(base, targets, options):
            study[f"{kind}s"].append(finite(result))
            if kind == "run":
                what = f"{result['rule']}, {result['tickets']}, seed {result['seed']}, level {result['level']}"
                bar.update(task, description=what, advance=1)
            tickets_results.write(study, options.out)
    tickets_results.show(study)
    for file in [*tickets_results.plots(study, options.out), options.out / "tickets.json", options.out / "tickets.csv"]:
        console().print(str(file), soft_wrap=True, highlight=False, markup=False)
    return 0
