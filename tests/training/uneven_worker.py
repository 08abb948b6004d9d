"""What two ranks with loaders of different lengths do; run by `test_uneven_ranks.py`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import worker
from torch.utils.data import DataLoader, Subset

import lightning_bpfree as bpf

RULES = {
    "backprop": bpf.Backprop,
    "zeroth": lambda: bpf.ZerothOrder(2),
}


def main(out: Path) -> None:
    for strategy in ("ddp", "scalar"):
        for name, make in RULES.items():
            if strategy == "scalar" and name != "zeroth":
                continue
            torch.manual_seed(worker.SEED)
            start = time.perf_counter()
            rows = Subset(worker.table(), range(8 if worker.RANK == 0 else 12))
            settings = {"strategy": "ddp"} if strategy == "ddp" else {"strategy": bpf.ScalarSyncStrategy()}
            try:
                worker.fit(worker.Net().double(), DataLoader(rows, batch_size=4), make(), devices=2, **settings)
                outcome = {"error": ""}
            except Exception as error:
                outcome = {"error": f"{type(error).__name__}: {error}"}
            outcome["seconds"] = time.perf_counter() - start
            torch.save(outcome, out / f"{strategy}_{name}.rank{worker.RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[2]))
