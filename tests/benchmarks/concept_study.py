"""The study of concept backpropagation: planted concepts, images, a table, a board, text, and networks of several rules.

    python tests/benchmarks/concept_study.py --out docs/results/concept_backprop_concepts.json [--parts planted rules]

Parts that are not run are kept from the file. Every part has three seeds, of the network and its training.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
import time
import warnings
from pathlib import Path

import lightning
import torch
from concept_images import run_images
from concept_networks import agreement, run_planted, run_rules
from concept_rows import run_board, run_table, run_text

SEEDS = (0, 1, 2)

PARTS = {
    "planted": run_planted,
    "digits": lambda seed: run_images(seed, "digits"),
    "fashion": lambda seed: run_images(seed, "fashion"),
    "table": run_table,
    "board": run_board,
    "text": run_text,
    "rules": run_rules,
}


def rounded(value):
    """The value with four digits behind the point, which is more than three seeds can tell."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/results/concept_backprop_concepts.json")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = Path(args.out)
    found = json.loads(path.read_text()) if path.exists() else {}
    for part in args.parts:
        start = time.perf_counter()
        runs = []
        for seed in args.seeds:
            runs.append(PARTS[part](seed))
            print(part, seed, round(time.perf_counter() - start, 1), "s", flush=True)
        if part == "rules":
            found["agreement"] = rounded(agreement(runs))
            for run in runs:
                del run["logits"]
        for run in runs[1:]:
            run.pop("pictures", None)  # one seed's are enough
        found[part] = rounded(runs)
        found |= {
            "command": "python tests/benchmarks/concept_study.py",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seeds": args.seeds,
            "machine": {"threads": 1, "processor": platform.machine()},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "lightning": lightning.__version__,
            },
        }
        path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
