"""How long ensembles of small networks train, and what they hold, against one network and against other packages.

    python tests/benchmarks/deep_ensemble.py OUT.json [--peers FOLDER] [--repeats 5] [--threads 1]
    python tests/benchmarks/deep_ensemble.py OUT.json [--peers FOLDER] --memory

FOLDER is what `pip install --no-deps --target FOLDER torchensemble==0.2.0` has made; without it the two peers are left
out. All train networks of the same layers on the same rows, with the same batch size and number of epochs, by Adam.

The first command measures time, all ways in turn in one process, so that a repeat compares what ran within seconds of
each other. Seconds are those of one epoch, the shortest of several; CPU seconds do not count what other programs do
meanwhile. It adds to the repeats that OUT.json has. The second command measures memory, each way in a process of its
own: by how much the largest resident size grew while the networks trained.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROWS, FEATURES, CLASSES, HIDDEN, BATCH, EPOCHS = 2048, 64, 10, (64, 64), 64, 6
COUNTS = (1, 3, 10, 30)
WAYS = ("one", "stacked", "sequential", "torchensemble", "scikit-learn")


def rows():
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    return x, (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)


def network():
    from torch import nn

    sizes = [FEATURES, *HIDDEN]
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], CLASSES))


def batches():
    from torch.utils.data import DataLoader, TensorDataset

    return DataLoader(TensorDataset(*rows()), BATCH, shuffle=True)


def by_lightning(members: int, way: str) -> list[tuple[float, float]]:
    import lightning.pytorch as pl
    import torch
    import torch.nn.functional as F

    import lightning_bpfree as bpf

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-3)

    class Clock(pl.Callback):
        def __init__(self) -> None:
            self.marks: list[tuple[float, float]] = []

        def on_train_epoch_start(self, trainer, pl_module) -> None:
            self.start = time.perf_counter(), time.process_time()

        def on_train_epoch_end(self, trainer, pl_module) -> None:
            self.marks.append((time.perf_counter() - self.start[0], time.process_time() - self.start[1]))

    clock = Clock()
    ensemble = [] if way == "one" else [bpf.DeepEnsemble(members, route=way)]
    pl.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*ensemble, clock],
    ).fit(Module(), batches())  # fmt: skip
    return clock.marks[1:]


def by_torchensemble(members: int) -> list[tuple[float, float]]:
    import types

    import torch
    from torch import nn

    # Its package imports a logger of TensorBoard at the top, which it uses on request only.
    missing = "torch.utils.tensorboard" not in sys.modules
    if missing:
        sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=None)  # type: ignore[assignment]
    from torchensemble import VotingClassifier

    if missing:
        del sys.modules["torch.utils.tensorboard"]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x)

    marks = []
    for _ in range(2):
        model = VotingClassifier(estimator=Net, n_estimators=members, cuda=False, n_jobs=1)
        model.set_criterion(nn.CrossEntropyLoss())
        model.set_optimizer("Adam", lr=1e-3)
        start = time.perf_counter(), time.process_time()
        model.fit(batches(), epochs=EPOCHS, log_interval=10**9, save_model=False)
        marks.append(((time.perf_counter() - start[0]) / EPOCHS, (time.process_time() - start[1]) / EPOCHS))
        torch.manual_seed(0)
    return marks


def by_scikit_learn(members: int) -> list[tuple[float, float]]:
    from sklearn.ensemble import BaggingClassifier
    from sklearn.neural_network import MLPClassifier

    x, y = (tensor.numpy() for tensor in rows())
    marks = []
    for _ in range(3):
        net = MLPClassifier(HIDDEN, batch_size=BATCH, max_iter=EPOCHS, n_iter_no_change=EPOCHS, alpha=0.0, tol=0.0)
        start = time.perf_counter(), time.process_time()
        BaggingClassifier(net, members).fit(x, y)
        marks.append(((time.perf_counter() - start[0]) / EPOCHS, (time.process_time() - start[1]) / EPOCHS))
    return marks


def trained(way: str, members: int) -> list[tuple[float, float]]:
    """Return wall and CPU seconds of an epoch, several times."""
    run = {"torchensemble": by_torchensemble, "scikit-learn": by_scikit_learn}.get(way)
    return run(members) if run else by_lightning(members, way)


def arms(options: argparse.Namespace) -> list[tuple[str, int]]:
    ways = options.ways or (WAYS if options.peers else WAYS[:3])
    return [(way, members) for way in ways for members in ((1,) if way == "one" else COUNTS)]


def times(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one repeat: every way once, in one process."""
    found = []
    for way, members in arms(options):
        marks = trained(way, members)
        seconds, cpu_seconds = (min(mark) for mark in zip(*marks, strict=True))
        found.append({"way": way, "members": members, "seconds": seconds, "cpu_seconds": cpu_seconds})
    return found


def resident(key: str) -> float:
    """Return a size of this process in MiB: ``VmRSS`` now, ``VmHWM`` the largest since it was reset."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def memory(way: str, members: int) -> dict[str, float]:
    trained(way, 1)  # imports, caches
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the largest size so far
    before = resident("VmRSS")
    trained(way, members)
    return {"grown_mib": resident("VmHWM") - before, "resident_mib": resident("VmHWM")}


def memories(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what every way holds, each in a process of its own."""
    found = []
    for way, members in arms(options):
        peers = ["--peers", options.peers] if options.peers else []
        command = [sys.executable, __file__, options.out, *peers, "--one", way, str(members)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found.append({"way": way, "members": members, **json.loads(done.stdout.strip().splitlines()[-1])})
        print(found[-1], flush=True)
    return found


def prepare(options: argparse.Namespace) -> None:
    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    # For layers of this size a second thread gains little, and its waiting counts as CPU time.
    torch.set_num_threads(options.threads)
    if options.peers:
        sys.path.append(options.peers)


def header(options: argparse.Namespace) -> dict[str, Any]:
    import lightning
    import sklearn
    import torch

    return {
        "command": "python tests/benchmarks/deep_ensemble.py OUT.json --peers FOLDER",
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__, "scikit-learn": sklearn.__version__,
                     "torchensemble": "0.2.0" if options.peers else None},
        "setting": {"rows": ROWS, "features": FEATURES, "hidden": HIDDEN, "classes": CLASSES, "batch_size": BATCH,
                    "threads": options.threads, "cores": os.cpu_count(),
                    "parameters": sum(p.numel() for p in network().parameters())},
        "runs": [],
        "memory": [],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--peers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "MEMBERS"))
    options = parser.parse_args()
    prepare(options)
    if options.one:
        print(json.dumps(memory(options.one[0], int(options.one[1]))))
        return
    report = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else header(options)
    if report["setting"]["threads"] != options.threads:
        raise SystemExit(f"{options.out} was measured with {report['setting']['threads']} threads: give another file.")
    if options.memory:
        report["memory"] = memories(options)
    else:
        for way in dict.fromkeys(way for way, _ in arms(options)):
            trained(way, 1)  # not counted: imports, caches
        for _ in range(options.repeats):
            repeat = 1 + max((run["repeat"] for run in report["runs"]), default=-1)
            report["runs"] += [{"repeat": repeat, **run} for run in times(options)]
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
