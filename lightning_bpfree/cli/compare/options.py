"""The options of ``bpfree compare``."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's own options; all others are those of ``bpfree fit``."""
    made = argparse.ArgumentParser(
        "bpfree compare",
        allow_abbrev=False,
        description="Train the same module under each rule, and under backprop, from one configuration. On one device, "
        "each rule in a process of its own. Rules of the base are left out; its GradientAlignment, if any, measures "
        "every rule. Further options, such as --trainer.precision=bf16-mixed, are those of bpfree fit.",
    )
    add = made.add_argument
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
        metavar="[LABEL:]KEY=V1,V2",
        help="grid for every rule, such as model.init_args.lr=0.01,0.1; the best by the validation metric is taken. "
        "With the name of an overlay, such as zeroth_order:model.init_args.lr=0.01,0.1: for that rule, in their place",
    )
    add(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="repeat it all for every value, such as data.init_args.corruption=none,gaussian; tuned at the first",
    )
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="rules that train at once; seconds then say little (default: 1)",
    )
    add("--epochs", type=int, metavar="N", help="in place of the base's trainer.max_epochs")
    _add_metrics(made)
    return made


def _add_metrics(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--metric", default="test_acc", help="default: test_acc; tuned by its namesake with val for test")
    add("--curve", metavar="METRIC", help="noted at every validation of the training, such as val_acc; default: none")
    add(
        "--tune-by",
        choices=("last", "curve"),
        default="last",
        help="the metric of the last weights (default), or the mean of --curve, which fast learners win",
    )
    add("--reach", nargs="+", type=float, metavar="V", help="after how many batches --curve is as good as each")
