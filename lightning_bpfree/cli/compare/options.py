"""The options of ``bpfree compare``."""

from __future__ import annotations

from pathlib import Path

from lightning_bpfree.cli.common.arguments import Parser


def parser() -> Parser:
    """Return the parser of the command's own options; all others are those of the configuration."""
    made = Parser(
        "bpfree compare",
        "Train the same module under each rule, and under backprop, from one configuration; print one table.\n"
        "Runs on one device, each rule in its own process. Rules of the base configuration are removed; if it has a\n"
        "GradientAlignment, this measures every rule. Finished runs are kept in --out: the same command continues.\n"
        "Other options are those of bpfree fit.",
        [
            "bpfree compare -c quickstart --rules rules/forward_gradient rules/zeroth_order --out comparison",
            "bpfree compare -c mine.yaml --rules 'my_rules/*.yaml' --tune model.init_args.lr=0.001,0.01 --out out",
            "bpfree compare -c mine.yaml --rules rules/zeroth_order --metric test_loss --seeds 0 1 2 3 4 --out out",
        ],
        usage="bpfree compare -c FILE --rules FILE ... --out DIR [option ...]",
    )
    add = made.add_argument
    add("-c", "--config", action="append", required=True, metavar="FILE", help="base: YAML files or recipes")
    add("--rules", nargs="+", required=True, metavar="FILE", help="overlays with one rule each: YAML files or recipes")
    add(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2],
        metavar="N",
        help="one training for each seed (default: 0 1 2)",
    )
    add(
        "--out", type=Path, required=True, metavar="DIR", help="folder of comparison.json, .csv, .png and finished runs"
    )
    add("--overwrite", action="store_true", help="delete what an earlier comparison left in --out, and train all again")
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
        help="grid for every rule, such as model.init_args.lr=0.01,0.1; the best validation metric is chosen. "
        "With the name of an overlay, as in zeroth_order:model.init_args.lr=0.01,0.1, it is for this rule only",
    )
    add(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="repeat the comparison for each value, such as data.init_args.corruption=none,gaussian; rules are tuned "
        "at the first value",
    )
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="rules that train at the same time, which increases their seconds (default: 1)",
    )
    add("--epochs", type=int, metavar="N", help="replaces trainer.max_epochs of the base")
    _add_metrics(made)
    return made


def _add_metrics(made: Parser) -> None:
    add = made.add_argument
    add(
        "--metric",
        default="test_acc",
        metavar="NAME",
        help="the metric to compare; tuning uses its val_... form (default: test_acc)",
    )
    add("--curve", metavar="NAME", help="metric to record at every validation, such as val_acc (default: none)")
    add(
        "--tune-by",
        choices=("last", "curve"),
        default="last",
        help="tune by the metric of the last weights (default), or by the mean of --curve, which prefers fast learning",
    )
    add("--reach", nargs="+", type=float, metavar="V", help="report after how many batches --curve reaches each value")
