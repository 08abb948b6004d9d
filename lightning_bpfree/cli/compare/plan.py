"""The plan of a comparison: rules with their whole configurations, tuning grid and settings."""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_bpfree.cli.common import recipes
from lightning_bpfree.cli.common.configured import Blueprint
from lightning_bpfree.cli.common.evaluation import larger_is_better
from lightning_bpfree.cli.common.preconditions import CommandError
from lightning_bpfree.cli.common.records import provenance
from lightning_bpfree.methods.backprop.rule import Backprop
from lightning_bpfree.training.training_rule import TrainingRule

Grid = dict[str, list[str]]  # the values of each key

_PLACE = re.compile(r"^\S+\.yaml, line \d+: ")  # of an error in a file
TUNING_SEED = 1000  # used for nothing else, so that no rule is tuned on the seeds of the comparison


class Contender(NamedTuple):
    """One rule of a comparison.

    Args:
        label: its name in tables.
        kind: its class.
        config: the whole configuration with this rule, as YAML.
    """

    label: str
    kind: type[TrainingRule]
    config: str


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise CommandError for a number that cannot seed a run."""
    for seed in seeds:
        if not 0 <= seed < 1 << 32:
            raise CommandError(f"--seeds {seed}: give whole numbers from 0 to {(1 << 32) - 1}.")


def check_numbers(options: argparse.Namespace) -> None:
    """Raise CommandError for numbers out of range, before any file is read."""
    if options.epochs is not None and options.epochs < 1:
        raise CommandError(f"--epochs {options.epochs}: give 1 or more.")
    if options.jobs < 1:
        raise CommandError(f"--jobs {options.jobs}: give 1 or more.")
    twice = [str(seed) for seed, times in Counter(options.seeds).items() if times > 1]
    if twice:
        raise CommandError(f"--seeds: {', '.join(twice)} is given more than once; each seed is one training.")
    check_seeds(options.seeds)
    options.budget = list(dict.fromkeys(options.budget))


def check_length(config: str) -> None:
    """Raise CommandError if training with this configuration has no end, or no epoch."""
    trainer = yaml.safe_load(config)["trainer"]
    epochs, ends = trainer["max_epochs"], trainer["max_time"] or trainer["max_steps"] not in (-1, None)
    if epochs == 0 or (epochs == -1 and not ends):
        raise CommandError(f"trainer.max_epochs={epochs}: give --epochs N, with N of 1 or more.")


def contenders(options: argparse.Namespace, overrides: Sequence[str]) -> list[Contender]:
    """Return the rules to compare, backprop first, each with its whole configuration.

    Raises:
        CommandError: if a configuration is invalid, or an overlay does not contain exactly one rule.
    """
    base = Blueprint([*recipes.config_arguments(options.config), *overrides])
    base.config.trainer.callbacks = [cb for cb in base.callbacks if not issubclass(_kind(cb), TrainingRule)]
    found: list[Contender] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "base.yaml"
        file.write_text(base.dump(), encoding="utf-8")
        for overlay in _overlays(options.rules):
            found.append(_contender(_label(overlay, found), ["-c", str(file), "-c", overlay]))
        if not any(contender.kind is Backprop for contender in found):
            added = ["-c", str(file), "--trainer.callbacks+=lightning_bpfree.Backprop"]
            found.insert(0, _contender("backprop", added))
    return sorted(found, key=lambda contender: contender.kind is not Backprop)


def _overlays(given: Sequence[str]) -> Iterator[str]:
    for name in given:
        is_pattern = any(mark in name for mark in "*?[")
        files = sorted(glob(name)) if is_pattern else [name]  # noqa: PTH207  # Path.glob takes no absolute pattern
        if not files:
            raise CommandError(f"--rules {name}: no file matches the pattern.")
        yield from (recipes.resolve(file) for file in files)


def _label(overlay: str, others: Sequence[Contender]) -> str:
    stem, taken = Path(overlay).stem, {contender.label for contender in others}
    numbered = (f"{stem}-{number}" for number in itertools.count(2))
    return next(label for label in itertools.chain([stem], numbered) if label not in taken)


def _contender(label: str, arguments: list[str]) -> Contender:
    blueprint = Blueprint(arguments)
    rules = [kind for kind in map(_kind, blueprint.callbacks) if issubclass(kind, TrainingRule)]
    if len(rules) != 1:
        names = ", ".join(kind.__name__ for kind in rules) or "none"
        raise CommandError(
            f"the overlay {label} must add exactly one training rule to trainer.callbacks; it adds {names}."
        )
    return Contender(label, rules[0], blueprint.dump())


def _kind(callback: Any) -> type:
    module, _, name = callback.class_path.rpartition(".")
    kind: type = getattr(importlib.import_module(module), name)
    return kind


def tuning(options: argparse.Namespace, rules: Sequence[Contender]) -> dict[str, Any]:
    """Return the grid for rules without their own, and the grid and the number of trials of every rule.

    Raises:
        CommandError: if a value cannot be parsed with the configuration of its rule, or no rule has the label.
    """
    grid, own = _grids(options.tune, [rule.label for rule in rules])
    general = [rule for rule in rules if rule.label not in own]
    _parse("--tune", grid, (general or rules)[0].config)  # the first stands for all: parsing takes its time
    for rule in rules:
        _parse("--tune", own.get(rule.label, {}), rule.config)
    grids = {rule.label: own.get(rule.label, grid) for rule in rules}
    return {"grid": grid, "grids": grids, "trials": {label: trials(each) for label, each in grids.items()}}


def trials(grid: Grid) -> int:
    """Return the number of trainings in a grid.

    Examples:
        >>> trials({"lr": ["0.01", "0.1"], "momentum": ["0", "0.5", "0.9"]}), trials({})
        (6, 0)
    """
    return math.prod(len(values) for values in grid.values()) if grid else 0


def _grids(entries: Sequence[str], labels: Sequence[str]) -> tuple[Grid, dict[str, Grid]]:
    """Return the grid of entries without a label, and that of each label."""
    grid: Grid = {}
    own: dict[str, Grid] = {}
    for entry in entries:
        label, rest = _labeled(entry)
        if label is not None and label not in labels:
            raise CommandError(f"--tune {entry}: no rule has the label {label!r}; labels are {', '.join(labels)}.")
        key, values = _key_and_values("--tune", rest, "model.init_args.lr=0.01,0.1", entry)
        (grid if label is None else own.setdefault(label, {}))[key] = values
    return grid, own


def _labeled(entry: str) -> tuple[str | None, str]:
    """Return the label of an entry of ``--tune``, None if it has none, and what stands behind.

    Examples:
        >>> _labeled("zeroth_order:model.init_args.lr=0.1"), _labeled("data.init_args.url=http://host")
        (('zeroth_order', 'model.init_args.lr=0.1'), (None, 'data.init_args.url=http://host'))
    """
    left, equals, values = entry.partition("=")
    label, colon, key = left.rpartition(":")  # a value may have colons too, a key has none
    return (label, key + equals + values) if colon else (None, entry)


def curve(options: argparse.Namespace) -> dict[str, Any]:
    """Return the learning curves to record, and the values they should reach; empty if none are requested.

    Raises:
        CommandError: if the options are incompatible.
    """
    metric, reach = options.curve, options.reach or []
    given = " ".join(f"{value:g}" for value in reach)
    if metric is None and options.tune_by == "curve":
        raise CommandError("--tune-by curve: name the validation metric, such as --curve val_acc.")
    if metric is None and reach:
        raise CommandError(f"--reach {given}: name the validation metric, such as --curve val_acc.")
    if metric is None:
        return {}
    if not all(map(math.isfinite, reach)):
        raise CommandError(f"--reach {given}: give finite numbers: the values that {metric} should reach.")
    if options.vary:
        raise CommandError(
            f"--curve {metric}: cannot be combined with --vary. Leave --vary out and run one comparison for each value "
            f"instead, with --{options.vary[0].partition('=')[0]}=VALUE."
        )
    return {"curve": {"metric": metric, "larger_is_better": larger_is_better(metric), "reach": reach}}


def variation(options: argparse.Namespace, config: str) -> dict[str, Any] | None:
    """Return the varied key and its values, after parsing each of them; None if nothing is varied.

    Raises:
        CommandError: if they cannot be used, or are tuned as well.
    """
    if not options.vary:
        return None
    if len(options.vary) > 1:
        raise CommandError(f"--vary is given {len(options.vary)} times; vary one key in a comparison.")
    entry = options.vary[0]
    key, values = _key_and_values("--vary", entry, "data.init_args.corruption=none,gaussian")
    if len(values) < 2 or len(set(values)) < len(values):
        raise CommandError(f"--vary {entry}: give two or more values, each once; the first one is the reference.")
    if any(_labeled(tuned)[1].partition("=")[0] == key for tuned in options.tune):
        raise CommandError(f"--vary {entry}: {key} is tuned as well; take it out of --vary or of --tune.")
    _parse("--vary", {key: values}, config)
    return {"key": key, "values": values}


def _key_and_values(option: str, entry: str, example: str, given: str | None = None) -> tuple[str, list[str]]:
    key, equals, rest = entry.partition("=")
    values = [value for value in rest.split(",") if value]
    if not key or not equals or not values:
        raise CommandError(f"{option} {given or entry}: give KEY=V1,V2,..., such as {example}.")
    return key, values


def _parse(option: str, grid: Grid, config: str) -> None:
    """Raise CommandError, which names the option, if a configuration cannot take a value of ``grid``."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(config, encoding="utf-8")
        for key, values in grid.items():
            for value in values:
                try:
                    Blueprint(["-c", str(file), f"--{key}={value}"])
                except CommandError as error:  # which may name a line of this file, that nobody else sees
                    raise CommandError(f"{option} {key}={value}: {_PLACE.sub('', str(error))}") from error


def settings(options: argparse.Namespace, tuned: dict[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a comparison, which comparison.json holds before the results.

    Args:
        options: options of the command line.
        tuned: see :func:`tuning`.
        argv: the arguments after ``bpfree compare``.
    """
    tuning_metric, by = options.metric.replace("test", "val", 1), "last"
    if options.tune_by == "curve":
        tuning_metric, by = f"mean {options.curve}", "curve"
    return {
        **provenance("compare", argv),
        "metric": options.metric,
        "larger_is_better": larger_is_better(options.metric),
        "seeds": options.seeds,
        "budgets": options.budget,
        **tuned,
        "tuning_metric": tuning_metric,
        "tuned_by": by,
        "tuning_seed": max(TUNING_SEED, max(options.seeds) + 1),
    }
