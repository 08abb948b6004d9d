"""What a comparison is to do: its rules with their whole configurations, its tuning grid, its settings."""

from __future__ import annotations

import argparse
import importlib
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from lightning_bpfree.cli import recipes
from lightning_bpfree.cli.configured import Blueprint
from lightning_bpfree.cli.evaluation import larger_is_better
from lightning_bpfree.cli.preconditions import CommandError
from lightning_bpfree.cli.records import provenance
from lightning_bpfree.rules.backprop import Backprop
from lightning_bpfree.rules.training_rule import TrainingRule

TUNING_SEED = 1000  # used for nothing else, lest a rule be tuned on the seeds by which it is judged


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


def contenders(options: argparse.Namespace, overrides: Sequence[str]) -> list[Contender]:
    """Return the rules to compare, backprop first, each with its whole configuration.

    Raises:
        CommandError: a configuration is broken, or an overlay does not hold one rule.
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
            raise CommandError(f"--rules {name}: no file fits the pattern.")
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
        raise CommandError(f"the overlay {label} must bring one training rule to trainer.callbacks; it brings {names}.")
    return Contender(label, rules[0], blueprint.dump())


def _kind(callback: Any) -> type:
    module, _, name = callback.class_path.rpartition(".")
    kind: type = getattr(importlib.import_module(module), name)
    return kind


def tuning_grid(options: argparse.Namespace, config: str) -> dict[str, list[str]]:
    """Return the values of each tuned key, having parsed each of them with a configuration."""
    grid = dict(_key_and_values("--tune", entry, "model.init_args.lr=0.01,0.1") for entry in options.tune)
    _parse(grid, config)
    return grid


def variation(options: argparse.Namespace, config: str) -> dict[str, Any] | None:
    """Return the key that is varied and its values, having parsed each of them; None if nothing is varied.

    Raises:
        CommandError: they cannot be used, or are tuned as well.
    """
    if not options.vary:
        return None
    if len(options.vary) > 1:
        raise CommandError(f"--vary is given {len(options.vary)} times; vary one key in a comparison.")
    entry = options.vary[0]
    key, values = _key_and_values("--vary", entry, "data.init_args.corruption=none,gaussian")
    if len(values) < 2 or len(set(values)) < len(values):
        raise CommandError(f"--vary {entry}: give two or more values, each once; the first is compared with.")
    if any(tuned.partition("=")[0] == key for tuned in options.tune):
        raise CommandError(f"--vary {entry}: {key} is tuned as well; take it out of --vary or of --tune.")
    _parse({key: values}, config)
    return {"key": key, "values": values}


def _key_and_values(option: str, entry: str, example: str) -> tuple[str, list[str]]:
    key, equals, rest = entry.partition("=")
    values = [value for value in rest.split(",") if value]
    if not key or not equals or not values:
        raise CommandError(f"{option} {entry}: give KEY=V1,V2,..., such as {example}.")
    return key, values


def _parse(grid: dict[str, list[str]], config: str) -> None:
    """Raise CommandError if a configuration cannot take a value of ``grid``."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(config, encoding="utf-8")
        for key, values in grid.items():
            for value in values:
                Blueprint(["-c", str(file), f"--{key}={value}"])


def settings(options: argparse.Namespace, grid: dict[str, list[str]], argv: Sequence[str]) -> dict[str, Any]:
    """Return what comparison.json says of a comparison before its results.

    Args:
        options: of the command line.
        grid: see :func:`tuning_grid`.
        argv: the command line behind ``bpfree compare``.
    """
    tuning_metric = options.metric.replace("test", "val", 1)
    return {
        **provenance("compare", argv),
        "metric": options.metric,
        "larger_is_better": larger_is_better(options.metric),
        "seeds": options.seeds,
        "budgets": options.budget,
        "grid": grid,
        "tuning_metric": tuning_metric,
        "tuning_seed": max(TUNING_SEED, max(options.seeds) + 1),
    }
