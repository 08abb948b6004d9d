"""Are ensembles better than their members? Several tables, ten splits each; every member is what it is alone.

    python tests/benchmarks/deep_ensemble_study.py OUT.json [--seeds 10]

The learning rate is chosen for single networks, by the mean validation loss of members on splits that the study does not
use. Scores are those of the test rows, by this package's pure functions and torchmetrics.
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
import torch.nn.functional as F
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_fbeta_score,
)

import lightning_bpfree as bpf
from lightning_bpfree import functional
from lightning_bpfree.demos.modules import MLP
from lightning_bpfree.demos.pillars import CoalPillarDataModule
from lightning_bpfree.demos.tables import ScikitTableDataModule, TableClassifier
from lightning_bpfree.methods.deep_ensemble.combining.aggregation import vote_probabilities

TABLES = {
    "pillars, simulated": (CoalPillarDataModule, {"batch_size": 64}, 5, 4),
    "pillars, simulated, 5 x": (CoalPillarDataModule, {"batch_size": 256, "num_failed": 430, "num_intact": 1685}, 5, 4),
    "breast cancer": (ScikitTableDataModule, {"batch_size": 64, "name": "breast_cancer"}, 30, 2),
    "wine": (ScikitTableDataModule, {"batch_size": 64, "name": "wine"}, 13, 3),
    "digits": (ScikitTableDataModule, {"batch_size": 256, "name": "digits"}, 64, 10),
}
ARMS = {
    "3 activations": {"activations": ["relu", "elu", "gelu"]},
    "3 seeds, relu": {"members": 3},
    "30: 10 x 3 activations": {"members": 30, "activations": ["relu", "elu", "gelu"]},
}
RATES = (3e-3, 1e-2, 3e-2)
EPOCHS, TUNED_ON = 40, (100, 101)


def trained(table: str, seed: int, lr: float, arm: dict):
    make, arguments, features, classes = TABLES[table]
    data = make(seed=seed, **arguments)
    pl.seed_everything(seed, verbose=False)
    model = TableClassifier(MLP(features, [32, 32], classes), classes, lr=lr, optimizer="adam")
    ensemble = bpf.DeepEnsemble(network="", **arm)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[ensemble], limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, data)
    exported = ensemble.export()
    with torch.no_grad():
        parts = {
            split: (exported.predictions(data.dataset(split).tensors[0]).softmax(-1), data.dataset(split).tensors[1])
            for split in ("val", "test")
        }
    return parts, ensemble.route


def scores(probabilities: torch.Tensor, labels: torch.Tensor) -> dict:
    classes = probabilities.shape[-1]
    f2 = multiclass_fbeta_score(probabilities, labels, 2.0, classes, average="none")
    rows = torch.bincount(labels, minlength=classes)
    own = multiclass_accuracy(probabilities, labels, classes, average="none")
    failed = {}
    if classes == 4:  # pillars: the outcome alone, without the safety factor's part
        outcome = (probabilities[:, 2:].sum(-1) > 0.5) == (labels >= 2)
        failed = {"two_class_acc": float(outcome.float().mean())}
    return {
        "acc": float(multiclass_accuracy(probabilities, labels, classes, average="micro")),
        "nll": float(F.nll_loss(probabilities.clamp_min(1e-30).log(), labels)),
        "brier": float(((probabilities - F.one_hot(labels, classes)) ** 2).sum(-1).mean()),
        "ece": float(multiclass_calibration_error(probabilities, labels, classes, n_bins=15)),
        "f2": [float(value) if count else None for value, count in zip(f2, rows, strict=True)],
        "class_acc": [float(value) if count else None for value, count in zip(own, rows, strict=True)],
        "rows": rows.tolist(),
        **failed,
    }


def tuned(table: str) -> tuple[float, dict[str, float]]:
    losses = {}
    for lr in RATES:
        found = []
        for seed in TUNED_ON:
            members, labels = trained(table, seed, lr, ARMS["3 activations"])[0]["val"]
            found += [float(F.nll_loss(own.clamp_min(1e-30).log(), labels)) for own in members]
        losses[str(lr)] = sum(found) / len(found)
    return min(RATES, key=lambda lr: losses[str(lr)]), losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning_utilities.core.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    report: dict = {
        "command": " ".join(["python", *map(str, sys.argv)]).replace(str(options.out), "OUT.json"),
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
        "epochs": EPOCHS,
        "hidden": [32, 32],
        "tables": {},
    }
    for arm, settings in ARMS.items():
        for table in TABLES:
            if table not in report["tables"]:
                lr, losses = tuned(table)
                report["tables"][table] = {"lr": lr, "tuning": losses, "arms": {}}
            entry, runs = report["tables"][table], []
            lr = entry["lr"]
            for seed in range(options.seeds):
                parts, route = trained(table, seed, lr, settings)
                members, labels = parts["test"]
                weights = functional.stacking_weights(*parts["val"])
                runs.append(
                    {
                        "seed": seed,
                        "members": [scores(own, labels) for own in members],
                        "mean": scores(functional.mean_probability(members), labels),
                        "vote": scores(vote_probabilities(members), labels),
                        "stack": scores(functional.mean_probability(members, weights), labels),
                        "disagreement": float(functional.disagreement(members).mean()),
                    }
                )
            entry["arms"][arm] = {"route": route, "runs": runs}
            print(table, arm, lr, flush=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
