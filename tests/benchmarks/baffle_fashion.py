"""BAFFLE's recipe for Fashion-MNIST, cut short: python tests/benchmarks/baffle_fashion.py docs/results/baffle_fashion.json.

LeNet, ten clients, one batch of 32 a round, by `bpfree federate` with the overlays of the recipe. The first rounds
alone: 200 directions take half a minute a round on one core. The file is written after every run, and runs that it has
are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import torch

RECIPES = ["-c", "papers/baffle", "-c", "papers/baffle/fashion_mnist"]
ARMS = {f"K={num}": [f"--federation.method.init_args.num_directions={num}"] for num in (20, 50, 200)}
ARMS["backprop, gradients"] = [
    "-c",
    "papers/baffle/fedavg",
    "--federation.method.init_args.upload=gradients",
    "--federation.method.init_args.local_steps=1",
]
ARMS["backprop, FedAvg"] = ["-c", "papers/baffle/fedavg"]
GRADIENTS, AVERAGED = "backprop, gradients", "backprop, FedAvg"
# Rounds of 200 directions cost as much as four of 50; a round of averaging is an epoch.
PLAN = [("K=20", 20), ("K=50", 20), ("K=200", 20), (GRADIENTS, 20), ("K=50", 80), (GRADIENTS, 80), (AVERAGED, 2)]


def train(arm, seed, rounds, every):
    """Return the curve of validation accuracy, the test accuracy, and what was sent."""
    told = [f"--seed_everything={seed}", f"--rounds={rounds}", f"--evaluate_every={every}", "--trainer.logger=false"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with tempfile.TemporaryDirectory() as folder:
        program = Path(sys.executable).parent / "bpfree"
        command = [str(program), "federate", *RECIPES, *ARMS[arm], *told, "--out", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        with (Path(folder) / "rounds.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    measured = [row for row in rows if row.get("val_acc")]
    return {
        "rounds": [int(row["round"]) for row in measured],
        "val_acc": [float(row["val_acc"]) for row in measured],
        "test_acc": result["test"]["test_acc"],
        "bytes_up": int(float(rows[-1]["bytes_up"])),
        "forward_passes": float(rows[-1]["forward_passes"]),
        "cpu_seconds": resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args(argv)
    found = json.loads(options.out.read_text()) if options.out.exists() else {"runs": []}
    found |= {
        "command": "python tests/benchmarks/baffle_fashion.py docs/results/baffle_fashion.json",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"lightning": importlib.metadata.version("lightning")},
        "setting": {"clients": 10, "batch_size": 32, "parameters": 26_730},
    }
    done = {(run["arm"], run["seed"], run["rounds"][-1]) for run in found["runs"]}
    for seed in options.seeds:
        for arm, rounds in PLAN:
            if (arm, seed, rounds) in done:
                continue
            run = train(arm, seed, rounds, max(1, rounds // 4))
            found["runs"].append({"arm": arm, "seed": seed, **run})
            options.out.write_text(json.dumps(found, indent=1) + "\n")
            sys.stdout.write(f"{seed} {arm}: {run['test_acc']:.4f} {run['cpu_seconds']:.0f} s\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
