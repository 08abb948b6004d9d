"""Searches whose answer is known: do learned sizes follow what is planted in the data?

    python tests/benchmarks/dnarch_toys.py --out docs/results/dnarch_toys.json

A network of full size is trained, then the budget, that of the smallest network, pulls its one size down. Where it
stops is decided by the pull's weight beside the loss, and by how fast the weights move meanwhile. Runs that the file
has already are not repeated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import sys
import warnings
from pathlib import Path

import lightning
import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "methods/learnable_architecture"))

from toy_searches import PlantedLag, PlantedRank, found

TASKS = {"one lag": (PlantedLag, (3, 10, 20)), "rank": (PlantedRank, (2, 5, 8))}
ARMS = {
    "weak pull, weights at a hundredth": {"weight": 0.001, "lr": 0.05, "share": 0.01},
    "weak pull, weights at a tenth": {"weight": 0.001, "lr": 0.05, "share": 0.1},
    "weak pull": {"weight": 0.001, "lr": 0.05, "share": 1.0},
    "strong pull": {"weight": 0.01, "lr": 0.01, "share": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    result = json.loads(options.out.read_text()) if options.out.exists() else {"runs": []}
    result |= {
        "command": "python tests/benchmarks/dnarch_toys.py --out docs/results/dnarch_toys.json",
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
        "seeds": options.seeds,
        "arms": ARMS,
    }
    for arm, settings in ARMS.items():
        for seed in options.seeds:
            for name, (make, planted) in TASKS.items():
                for value in planted:
                    run_once(result, options.out, name, make, value, arm, settings, seed)


def run_once(result, out, name, make, value, arm, settings, seed) -> None:
    """Add a run to the file, unless it is there."""
    key = {"task": name, "planted": value, "arm": arm, "seed": seed}
    if any(key.items() <= run.items() for run in result["runs"]):
        return
    pl.seed_everything(seed, verbose=False)
    task = make(value)
    size, score = found(task, **settings)
    result["runs"].append({**key, "suffices": task.suffices, "size": size, "score": round(score, 4)})
    print(result["runs"][-1], flush=True)
    out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
