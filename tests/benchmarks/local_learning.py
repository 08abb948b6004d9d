"""Measures what Forward-Forward and local guesses cost beside backprop: time of a step, and memory against depth.

python tests/benchmarks/local_learning.py --out docs/results/local_learning_benchmarks.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
from memory import peak_bytes
from run import Checkpointed, Classifier, backprop, batch, estimator, mlp, plain_forward, row, seconds, write
from torch import nn

import lightning_bpfree as bpf
from lightning_bpfree.core.params import ParameterSlots


def ruled(rule: bpf.ForwardForward, module: pl.LightningModule, data: list[torch.Tensor]) -> Callable[[], None]:
    """A step of the rule, on a module of its own: it changes the network's forward pass."""
    rule.install(module)
    return estimator(rule, module, data)


def with_adam(step: Callable[[], None], module: nn.Module) -> Callable[[], None]:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

    def stepped() -> None:
        step()
        optimizer.step()

    return stepped


RULES = {
    "Forward-Forward": lambda: bpf.ForwardForward(),
    "Integrated Forward-Forward": lambda: bpf.ForwardForward(blocks=3),
    "Forward-Forward, readout": lambda: bpf.ForwardForward(prediction="readout"),
    "Forward-Forward, readout and hard negatives": lambda: bpf.ForwardForward(prediction="readout", negatives="hard"),
}


def time_of_a_step() -> list[dict[str, object]]:
    """A step over a backprop step of the same network: 784-1000-1000-1000-10."""
    rows = []
    data, net = batch(128), mlp(1000, 3)
    makes = {name: ruled(make(), Classifier(mlp(1000, 3)), data) for name, make in RULES.items()}
    bare, checkpointed = Classifier(net), Classifier(Checkpointed(net))
    bare.log = checkpointed.log = lambda *a, **k: None  # type: ignore[method-assign]  # there is no Trainer here
    makes |= {"checkpointed backprop": backprop(checkpointed, data)}
    best = seconds({"f": plain_forward(bare, data), "backprop": backprop(bare, data), **makes}, repeats=20)
    unit = f"backprop: {best['backprop'] / best['f']:.2f} forwards"
    for name in makes:
        limit = 1.5 if name == "Forward-Forward" else None
        what = f"without the optimizer, over backprop, 784-1000-1000-1000-10, batch 128 ({unit})"
        rows.append(row(f"step, {name}", what, best[name] / best["backprop"], limit))
    module, other = Classifier(mlp(1000, 3)), Classifier(mlp(1000, 3))
    best = seconds(
        {
            "backprop": with_adam(backprop(module, data), module),
            "rule": with_adam(ruled(bpf.ForwardForward(), other, data), other),
        },
        repeats=20,
    )
    what = "with Adam, over backprop with Adam, 784-1000-1000-1000-10, batch 128"
    return [*rows, row("step with Adam, Forward-Forward", what, best["rule"] / best["backprop"], 1.5)]


GUESSES = {
    "local learning (target local)": lambda: bpf.ForwardGradient(guess=bpf.LocalLoss(), target="local"),
    "local guess, weights, network": lambda: bpf.ForwardGradient(guess=bpf.LocalLoss(), scope="network"),
    "local guess, weights, block": lambda: bpf.ForwardGradient(guess=bpf.LocalLoss()),
    "local guess, activations, block": lambda: bpf.ForwardGradient(guess=bpf.LocalLoss(), space="activations"),
}


def time_of_guesses() -> list[dict[str, object]]:
    """A step along local guesses over a backprop step, 3 blocks; heads do not step here."""
    data, runs = batch(128), {}
    for name, make in GUESSES.items():
        rule, module = make(), Classifier(mlp(1000, 3))
        rule._local_guesses.check(module, ParameterSlots(module))
        runs[name] = estimator(rule, module, data)
    module = Classifier(mlp(1000, 3))
    best = seconds({"backprop": backprop(module, data), **runs}, repeats=12)
    what = "without the optimizer, over backprop, 784-1000-1000-1000-10 in 3 blocks, batch 128"
    limits = {"local learning (target local)": 1.6}
    return [row(f"step, {n}", what, best[n] / best["backprop"], limits.get(n)) for n in GUESSES]


def time_of_a_prediction() -> list[dict[str, object]]:
    """A prediction over a plain forward pass."""
    rows, data = [], batch(128)
    bare = Classifier(mlp(1000, 3))
    runs = {"f": plain_forward(bare, data)}
    for name, rule in {"goodness": bpf.ForwardForward(), "readout": bpf.ForwardForward(prediction="readout")}.items():
        module = Classifier(mlp(1000, 3))
        rule.install(module)
        module.log = lambda *a, **k: None  # type: ignore[method-assign]
        runs[name] = plain_forward(module, data)
    best = seconds(runs)
    for name in ("goodness", "readout"):
        rows.append(row(f"prediction by {name}", "over a plain forward pass, 10 labels", best[name] / best["f"]))
    return rows


def memory_against_depth() -> list[dict[str, object]]:
    """Peak of live tensors over what parameters and gradients take, in activations of one layer."""
    rows = []
    for depth in (4, 8, 16, 32):
        width, size = 128, 1024
        net, data = mlp(width, depth, width), batch(size, width)
        unit = size * width * 4
        gradients = sum(p.nbytes for p in net.parameters())
        modules = [Classifier(mlp(width, depth, width)) for _ in range(2)]
        runs = {
            "Forward-Forward": ruled(bpf.ForwardForward(), modules[0], data),
            "Integrated Forward-Forward, 4 layers a block": ruled(bpf.ForwardForward(blocks=4), modules[1], data),
            "backprop": backprop(Classifier(net), data),
            "checkpointed backprop": backprop(Classifier(Checkpointed(net)), data),
        }
        for name, run in runs.items():
            run_peak = peak_bytes(run) - gradients
            what = f"peak of live tensors above the gradients, in activations of one layer, {depth} hidden layers of {width}, batch {size}"
            rows.append(row(f"activations, {name}, depth {depth}", what, run_peak / unit, unit="layers"))
    return rows


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [*time_of_a_step(), *time_of_guesses(), *time_of_a_prediction(), *memory_against_depth()]
    write(rows, f"python tests/benchmarks/local_learning.py --out {out}", out)


if __name__ == "__main__":
    main()
