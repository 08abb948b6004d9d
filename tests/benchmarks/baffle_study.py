"""BAFFLE against federated backprop on digits: python tests/benchmarks/baffle_study.py OUT.json.

Ten clients, split evenly and by Dirichlet(0.3); K from 20 to 500; three seeds. Learning rates are chosen for each family
on a seed of its own, by validation loss. The file is written after every run, and runs that it has are not repeated.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_bpfree.demos.data import DigitsDataModule
from lightning_bpfree.demos.modules import MLP, Classifier
from lightning_bpfree.federated.fedavg import FedAvg
from lightning_bpfree.federated.federation import Federation
from lightning_bpfree.federated.in_process import InProcessFederation
from lightning_bpfree.federated.privacy import Privacy
from lightning_bpfree.federated.settings import Baffle

ROUNDS, EVERY, TUNING_SEED = 100, 5, 100
RATES = (0.01, 0.03, 0.1)
SPLITS = {"iid": None, "dirichlet": 0.3}


def baffle(num, **kwargs):
    return Baffle(num, chunk_size=50, **{"batches": 1, **kwargs})


ARMS = {f"K={num}": ("baffle", baffle(num), {}) for num in (20, 50, 100, 200, 500)}
ARMS["central K=50"] = ("baffle", baffle(50, scheme="central"), {})
ARMS["per client K=20"] = ("baffle", baffle(20, noise="per_client"), {})
ARMS["per client K=100"] = ("baffle", baffle(100, noise="per_client"), {})
ARMS["backprop, gradients"] = ("gradients", FedAvg("gradients", 1), {})
ARMS["backprop, FedAvg"] = ("fedavg", FedAvg(), {})
PRIVATE = {"private K=100": ("baffle", baffle(100, batches=None), {"privacy": Privacy(8.0, 1e-5, 0.0005, seed=1)})}
FAMILIES = {"baffle": ARMS["K=100"], "gradients": ARMS["backprop, gradients"], "fedavg": ARMS["backprop, FedAvg"]}


def train(arm, split, seed, lr, rounds):
    """Return curves of test and validation metrics, and what was sent."""
    _, method, further = arm
    pl.seed_everything(seed, verbose=False)
    module = Classifier(MLP(64, [32], 10, activation="hardswish"), lr=lr, optimizer="adam")
    settings = {"alpha": SPLITS[split], "seed": seed, "split_seed": seed, "ema": 0.9, **further}
    run = InProcessFederation(
        module, DigitsDataModule(batch_size=32), Federation(method, **settings), rounds, evaluate_every=EVERY
    )
    found = {"rounds": [], "val_loss": [], "val_acc": [], "test_acc": []}

    def each(row):
        if "val_acc" in row:
            found["rounds"].append(row["round"])
            found["test_acc"].append(run.test()["test_acc"])
            for name in ("val_loss", "val_acc"):
                found[name].append(row[name])

    started = time.process_time()
    history = run.fit(each)
    last = history[-1]
    return {
        **found,
        "bytes_up": last["bytes_up"],
        "bytes_down": last["bytes_down"],
        "forward_passes": last["forward_passes"],
        "epsilon": last.get("epsilon"),
        "cpu_seconds": time.process_time() - started,
    }


def tuned():
    """Return, by family, the validation loss of every rate, and the rate of the lowest."""
    chosen = {}
    for family, arm in FAMILIES.items():
        losses = {lr: train(arm, "iid", TUNING_SEED, lr, 60)["val_loss"][-1] for lr in RATES}
        chosen[family] = {"losses": {str(lr): loss for lr, loss in losses.items()}, "lr": min(losses, key=losses.get)}
    return chosen


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    found = json.loads(options.out.read_text()) if options.out.exists() else {"runs": []}
    found |= {
        "command": "python tests/benchmarks/baffle_study.py OUT.json",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "lightning": pl.__version__},
        "setting": {
            "rounds": ROUNDS,
            "clients": 10,
            "batch_size": 32,
            "hidden": 32,
            "seeds": options.seeds,
            "ema": 0.9,
        },
    }
    if "tuning" not in found:
        found["tuning"] = tuned()
    plan = [(split, name, arm, seed) for seed in options.seeds for split in SPLITS for name, arm in ARMS.items()]
    plan += [("iid", name, arm, seed) for seed in options.seeds for name, arm in PRIVATE.items()]
    done = {(run["split"], run["arm"], run["seed"]) for run in found["runs"]}
    for split, name, arm, seed in plan:
        if (split, name, seed) in done:
            continue
        rounds = 60 if name in PRIVATE else ROUNDS
        result = train(arm, split, seed, found["tuning"][arm[0]]["lr"], rounds)
        found["runs"].append({"split": split, "arm": name, "seed": seed, **result})
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        sys.stdout.write(f"{seed} {split} {name}: {result['test_acc'][-1]:.4f} {result['cpu_seconds']:.1f} s\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
