"""Memory of a client and time of directions: python tests/benchmarks/baffle_cost.py docs/results/baffle_cost.json.

Bytes of tensors alive at the peak, and those of inference on the same batch; and the time of the portable generator
over that of the device's. Ratios within one run; the memory is exact. Rows of other scripts in the file are kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import tracemalloc
from datetime import datetime, timezone
from pathlib import Path

import lightning.pytorch as pl
import torch
from memory import peak_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from lightning_bpfree.core.directions import Directions
from lightning_bpfree.federated.client import BaffleClient
from lightning_bpfree.federated.partition import LocalData
from lightning_bpfree.federated.settings import Baffle

WIDTH, BATCH, DEPTHS = 128, 1024, (2, 8, 32)


class Deep(pl.LightningModule):
    """A stack of layers, with activations that are large against a layer's weights."""

    def __init__(self, depth, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Hardswish()) for _ in range(depth)]
        self.layers, self.checkpointed, self.depth = nn.Sequential(*layers), checkpointed, depth

    def training_step(self, batch, batch_idx):
        x = batch
        if self.checkpointed:
            x = checkpoint_sequential(self.layers, max(1, round(self.depth**0.5)), x, use_reentrant=False)
        else:
            x = self.layers(x)
        return x.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def peaks(depth):
    """Return the peak of each way to use the module, without its parameters, in bytes; and the parameters' bytes."""
    x = torch.randn(BATCH, WIDTH)

    def client(**settings):
        module = Deep(depth)
        data = LocalData(x, range(BATCH), BATCH, lambda rows: x)
        own = BaffleClient(module, data, Baffle(3, 1e-2, **settings), 0)
        own.measured(1, 0)  # the first round finds out what the step writes to
        return peak_bytes(lambda: own.measured(2, 0))

    def inference():
        with torch.no_grad():
            Deep.training_step(module, x, 0)

    def backprop(checkpointed):
        own = Deep(depth, checkpointed)
        return peak_bytes(lambda: own.training_step(x, 0).backward())

    module = Deep(depth)
    return {
        "depth": depth,
        "parameters": sum(p.nbytes for p in module.parameters()),
        "inference": peak_bytes(inference),
        "BAFFLE": client(),
        "BAFFLE, copy": client(perturb="copy"),
        "backprop": backprop(False),
        "checkpointed backprop": backprop(True),
    }


def fastest(run, repeats):
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def buffers():
    """Return the most bytes that NumPy holds for one draw of the portable generator, by size of the tensor."""
    found = []
    for numel in (2_410, 16_384, 1_000_000):
        like = {"w": torch.zeros(numel)}
        Directions(like, 1, 0, "gaussian", "portable")[0]  # what is made once and kept
        tracemalloc.start()
        Directions(like, 1, 0, "gaussian", "portable")[0]
        found.append({"numbers": numel, "bytes": tracemalloc.get_traced_memory()[1]})
        tracemalloc.stop()
    return found


def times():
    """Return the time of the portable generator over the device's, by size and by how many directions are drawn."""
    rows = []
    for numel, num in ((2_410, 1), (2_410, 50), (26_730, 1), (26_730, 50), (1_000_000, 1), (10_000_000, 1)):
        for kind in ("gaussian", "rademacher"):
            like = {"w": torch.zeros(numel)}

            def together(generator, like=like, num=num, kind=kind):
                Directions(like, num, 0, kind, generator).stack(range(num))

            def one_by_one(generator, like=like, num=num, kind=kind):
                for _ in Directions(like, num, 0, kind, generator):
                    pass

            both = ("device", "portable")
            row = {"numbers": numel, "directions": num, "kind": kind}
            for name, way in {"together": together, "one by one": one_by_one}.items():
                for generator in both:
                    way(generator)
                repeats = 7 if numel * num > 1e6 else 60
                pairs = [[fastest(lambda g=g, way=way: way(g), 1) for g in both] for _ in range(repeats)]
                own = [min(column) for column in zip(*pairs, strict=True)]  # taken in turn: the load changes
                row |= {f"{name}, device seconds": own[0], f"{name}, ratio": own[1] / own[0]}
            rows.append(row)
            print(rows[-1], flush=True)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    found |= {
        "command": "python tests/benchmarks/baffle_cost.py docs/results/baffle_cost.json",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "setting": {"width": WIDTH, "batch": BATCH, "threads": 1},
        "memory": [peaks(depth) for depth in DEPTHS],
        "buffers": buffers(),
        "generators": times(),
    }
    for row in found["memory"]:
        print(row)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
