"""Runs the recipe of the control task for ten seeds: what return it comes to, after how many generations.

pip install -c constraints.txt -e '.[recipes,control]'
python tests/benchmarks/control.py --out docs/results/control_benchmarks.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
from pathlib import Path

from run import row, write

from lightning_bpfree.cli.common import recipes
from lightning_bpfree.cli.common.configured import Blueprint
from lightning_bpfree.cli.common.evaluation import evaluated
from lightning_bpfree.cli.compare.runs import Stopwatch
from lightning_bpfree.training.quiet_lightning import quiet_lightning

RECIPE, SEEDS = "papers/es_control", range(10)


def trained(blueprint: Blueprint, seed: int) -> tuple[float, int, float]:
    """Return the mean return of 100 test episodes, the generations and the seconds that led to it."""
    watch = Stopwatch()
    built = blueprint.build(seed=seed, callbacks=[watch])
    built.trainer.fit(built.module, datamodule=built.data)
    generations = built.trainer.global_step
    metrics = evaluated("test", built.trainer, built.module, built.data)
    return metrics["test_return"], generations, watch.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rows, returns, lengths = [], [], []
    with quiet_lightning():
        blueprint = Blueprint(recipes.config_arguments([RECIPE]))
        for seed in SEEDS:
            value, generations, seconds = trained(blueprint, seed)
            what = f"mean return of 100 test episodes, at most 500, after {generations} generations ({seconds:.0f} s)"
            rows.append(row(f"CartPole, seed {seed}", what, value, unit=""))
            returns.append(value)
            lengths.append(generations)
    what = f"mean over seeds; {min(lengths)} to {max(lengths)} generations"
    rows.append(row("CartPole, all seeds", what, statistics.fmean(returns), unit=""))
    command = "python tests/benchmarks/control.py --out docs/results/control_benchmarks.json"
    write(rows, command, options.out, gymnasium=importlib.metadata.version("gymnasium"))


if __name__ == "__main__":
    main()
