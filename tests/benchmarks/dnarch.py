"""Step times of networks whose sizes are learned, over those of the plain network, at shares of its multiply-accumulates.

    python tests/benchmarks/dnarch.py --out docs/results/dnarch_benchmarks.json

A step is forward and backward pass of one batch in training mode. Times are CPU time of one thread, the shortest of
rounds that run all shares one after the other; the plain network is without this package's hooks. Ratios are within a
repeat; the median over repeats is kept, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path

import torch

import lightning_bpfree as bpf
from lightning_bpfree.demos.learned_sizes import SmallResNet
from lightning_bpfree.functional import count_macs
from lightning_bpfree.methods.learnable_architecture.architecture import Architecture
from lightning_bpfree.methods.learnable_architecture.export import export
from lightning_bpfree.methods.learnable_architecture.sizes.axes import refresh
from lightning_bpfree.methods.learnable_architecture.sizes.cost import settle
from lightning_bpfree.methods.learnable_architecture.tracing.counting import CostBuilder
from lightning_bpfree.methods.learnable_architecture.tracing.probe import ExampleCall

SHARES = (1.0, 0.5, 0.25, 0.125)
NETWORKS = {
    "residual network, widths 32 64 128": (lambda: SmallResNet(widths=(32, 64, 128)), (1, 28, 28), ("width",)),
    "CCNN, width 48": (lambda: bpf.CCNN((1, 28, 28), 10, width=48, blocks=3, max_kernel=9, spread=0.4, crops=False),
                       (1, 28, 28), ("width", "kernel")),
}  # fmt: skip


def cropped(make, shape, dims, share):
    """Return a masked network near a share of its multiply-accumulates, all sizes smaller by one factor, and its sizes."""
    torch.manual_seed(0)
    network = make()
    architecture = Architecture(network, ExampleCall((torch.zeros(1, *shape),), {}), dims)
    cost = CostBuilder(architecture).macs()
    architecture.install()
    low, high = 0.0, 1.0
    for _ in range(20):
        factor = (low + high) / 2
        for axis in architecture.axes:
            crops = axis.crops
            axis.set_crop(min(crops, key=lambda crop, c=crops: abs(crop / c[-1] - factor)))
        low, high = (low, factor) if cost.number() > share * cost.full else (factor, high)
    if share < 1:
        settle(cost, architecture.axes, share * cost.full, 0.01)
    refresh(architecture.axes)
    return network, architecture, cost.full


def shortest(steps, x, rounds):
    """Return for each network the shortest of several CPU times of a step."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds + 1):
        for key, network in steps.items():
            start = time.process_time()
            network(x).sum().backward()
            best[key] = min(best[key], time.process_time() - start)
    return best


def over_plain(kind, share, times):
    """Return the median ratio to the plain network's time over repeats, and its range."""
    ratios = [best[f"{kind} {share}"] / best["plain"] for best in times]
    ends = [round(min(ratios), 3), round(max(ratios), 3)]
    return {f"{kind}_over_plain": round(statistics.median(ratios), 3), f"{kind}_range": ends}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "command": "python tests/benchmarks/dnarch.py --out docs/results/dnarch_benchmarks.json",
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__},
        "batch": options.batch,
        "rounds": options.rounds,
        "repeats": options.repeats,
        "networks": {},
    }
    for name, (make, shape, dims) in NETWORKS.items():
        x = torch.randn(options.batch, *shape)
        torch.manual_seed(0)
        steps = {"plain": make()}
        rows = {}
        for share in SHARES:
            network, architecture, full = cropped(make, shape, dims, share)
            steps[f"masked {share}"] = network
            plain = export(architecture).network
            steps[f"exported {share}"] = plain.train()
            rows[share] = count_macs(plain, x[:1]) / full
        times = [shortest(steps, x, options.rounds) for _ in range(options.repeats)]
        found["networks"][name] = {
            "full_macs": full,
            "plain_ms": round(1e3 * statistics.median(best["plain"] for best in times), 2),
            "shares": [
                {
                    "share": share,
                    "counted": round(rows[share], 4),
                    **over_plain("masked", share, times),
                    **over_plain("exported", share, times),
                }
                for share in SHARES
            ],
        }
        print(name, json.dumps(found["networks"][name], indent=1), flush=True)
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
