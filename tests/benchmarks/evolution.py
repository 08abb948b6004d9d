"""Measures what a generation of an evolution strategy costs, in forward passes, and the memory it takes.

    python tests/benchmarks/evolution.py --out docs/results/evolution_benchmarks.json

Times are CPU time of one thread. What is compared runs in turns, once a round, and the median over the rounds of their
ratio is reported: other load on the machine moves both alike. A generation is a whole training step of a real Trainer,
from the start of the batch to its end: the members, the gradient, the optimizer, and Lightning's own work around them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from memory import peak_bytes
from run import Classifier, batch, mlp, row, write
from torch import nn
from torch.utils.data import DataLoader

import lightning_bpfree as bpf
from lightning_bpfree.core.step import Step
from lightning_bpfree.methods.evolution_strategy.search.algorithm import SearchAlgorithm
from lightning_bpfree.methods.evolution_strategy.search.openai_es import OpenAIES
from lightning_bpfree.methods.evolution_strategy.search.snes import SNES
from lightning_bpfree.training.module_state import ModuleState
from lightning_bpfree.training.step_swap import with_injected_gradients

Data = list[torch.Tensor]
Work = Callable[[], object]
Optimizer = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]

ADAM: Optimizer = partial(torch.optim.Adam, lr=1e-4)  # small, for a batch that is learned by heart gives flat fitness
SGD_1: Optimizer = partial(torch.optim.SGD, lr=1.0)
ALGORITHMS: dict[str, tuple[type[SearchAlgorithm], Optimizer, str]] = {
    "OpenAI-ES": (OpenAIES, ADAM, "mirrored, Adam"),
    "SNES": (SNES, SGD_1, "not mirrored, SGD(lr=1)"),
}


def small_cnn() -> nn.Module:
    """Two convolutions of 5x5 with pooling, one dense layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 16, 10),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # with the number of inputs
    "MLP 784-256-10": (lambda: mlp(256, 1, 784), 784),
    "MLP 64-256-256-256-10": (lambda: mlp(256, 3, 64), 64),
    "CNN": (small_cnn, 784),
}


class Searched(Classifier):
    """The classifier of all benchmarks, with the optimizer that an algorithm is usually run with."""

    def __init__(self, net: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(net)
        self.optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


# --- clocks ---


class Rounds(pl.Callback):
    """Before each batch does other work, once each, and takes the time of that work, of the step, and of the loop.

    It must stand before the rule in the Trainer's list, so that the rule's own hooks count as part of the step.
    """

    def __init__(self, others: dict[str, Work], warmup: int) -> None:
        self.others, self.warmup = others, warmup
        self.times: dict[str, list[float]] = {name: [] for name in [*others, "step", "loop"]}
        self._start: float | None = None

    def on_train_batch_start(self, *_args: Any) -> None:
        if self._start is not None:
            self.times["loop"].append(time.process_time() - self._start)
        for name, work in self.others.items():
            start = time.process_time()
            work()
            self.times[name].append(time.process_time() - start)
        self._start = time.process_time()

    def on_train_batch_end(self, *_args: Any) -> None:
        self.times["step"].append(time.process_time() - (self._start or 0.0))

    def ratio(self, name: str, over: str) -> float:
        """Return the median of the ratio in the same round; the first rounds warm up."""
        pairs = list(zip(self.times[name], self.times[over], strict=False))[self.warmup :]
        return statistics.median(a / b for a, b in pairs)

    def milliseconds(self, name: str) -> float:
        return 1000 * statistics.median(self.times[name][self.warmup :])


def fitted(
    rule: bpf.EvolutionStrategy,
    net: nn.Module,
    data: Data,
    optimizer: Optimizer,
    others: dict[str, Work],
    repeats: int,
    warmup: int = 2,
) -> Rounds:
    """Train on one batch for some generations, with other work in turns."""
    rounds = Rounds(others, warmup)
    loader = DataLoader([data] * (repeats + warmup + 1), batch_size=None)  # the loop of the last is never closed
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[rounds, rule],
    )  # fmt: skip
    trainer.fit(Searched(net, optimizer), loader)
    if rule.record.skipped:
        raise RuntimeError(f"{rule.record.skipped} generations were skipped, so that their time says nothing")
    return rounds


def generation(rule: bpf.EvolutionStrategy, module: Searched, data: Data) -> Work:
    """One generation as the rule runs it, without a Trainer: estimate, hand over, backward, optimizer, deviation."""
    view, optimizer, seeds = ModuleState(module, None), module.configure_optimizers(), itertools.count()
    module.log = lambda *a, **k: None  # type: ignore[method-assign]  # there is no Trainer here

    def step() -> None:
        replay = view.replay()
        made = Step(
            module, module.training_step, view.slots, next(seeds), args=(data, 0), replay=replay,
            quiet=view.quiet, read=rule.read,
        )  # fmt: skip
        loss = with_injected_gradients(made, rule.estimate(made), [])
        made.finish()
        optimizer.zero_grad()
        loss.backward()
        rule.algorithm.step()
        optimizer.step()

    return step


def forwards(net: nn.Module, data: Data, num: int = 1) -> Work:
    """Inference with its loss, ``num`` times."""

    def run() -> None:
        with torch.no_grad():
            for _ in range(num):
                F.cross_entropy(net(data[0]), data[1])

    return run


def pieces(net: nn.Module, data: Data, length: int) -> Work:
    """Inference with its loss over all samples, ``length`` of them at a time."""
    parts = list(zip(*(tensor.split(length) for tensor in data), strict=True))

    def run() -> None:
        with torch.no_grad():
            for x, y in parts:
                F.cross_entropy(net(x), y)

    return run


# --- what is measured ---


class Plan:
    """How much is measured.

    Args:
        quick: small populations and few rounds, to see that all parts run; such figures mean nothing.
    """

    def __init__(self, quick: bool) -> None:
        self.sizes = (8, 16) if quick else (64, 512)
        self.memory_sizes = (8, 64) if quick else (64, 512, 2048)
        self._quick = quick

    def repeats(self, size: int) -> int:
        return 2 if self._quick else 15 if size < 256 else 7

    def cases(self) -> Iterator[tuple[str, int]]:
        """Yield the networks, with the sizes of their populations; of the CNN the smallest only."""
        for name in NETWORKS:
            for size in self.sizes[:1] if name == "CNN" else self.sizes:
                yield name, size


def full_rank(plan: Plan, noise: str = "table") -> list[dict[str, object]]:
    """A generation over 1 + N forwards of the same batch; noise of full rank."""
    rows = []
    label = "full rank" if noise == "table" else "full rank, noise drawn anew"
    for (name, size), (algorithm, made) in itertools.product(plan.cases(), ALGORITHMS.items()):
        if noise != "table" and size != plan.sizes[0]:
            continue  # a draw costs the same in a larger population
        (make, inputs), (kind, optimizer, how) = NETWORKS[name], made
        data, bare = batch(128, inputs), Searched(make(), optimizer)
        rule, alone = (bpf.EvolutionStrategy(kind(), population_size=size, noise=noise) for _ in range(2))
        others = {"forwards": forwards(make(), data, size + 1), "alone": generation(alone, bare, data)}
        rounds = fitted(rule, make(), data, optimizer, others, plan.repeats(size))
        loop, without = rounds.ratio("loop", "forwards"), rounds.ratio("alone", "forwards")
        parameters = sum(p.numel() for p in bare.parameters())
        what = (
            f"one generation over {size + 1} forwards of 128 samples ({rounds.milliseconds('forwards'):.1f} ms), {how}, "
            f"{parameters:,} parameters, {passes(rule)}; {without:.2f} without Lightning, {loop:.2f} with its fetching of the batch"
        )
        rows.append(row(f"{label}, {algorithm}, {name}, N = {size}", what, rounds.ratio("step", "forwards"), 1.25))
    return rows


def drawn_anew(plan: Plan) -> list[dict[str, object]]:
    """The same, with ``noise="independent"``."""
    return [{**made, "limit": None, "reached": None} for made in full_rank(plan, "independent")]


def passes(rule: bpf.EvolutionStrategy) -> str:
    chosen = rule._passes.chosen
    return "members one by one" if chosen == 1 else f"{chosen} members in one pass"


PIECE = 8192


def low_rank(plan: Plan) -> list[dict[str, object]]:
    """A generation over one forward pass of as many samples as all members see together."""
    rows = []
    for (name, size), samples, rank in itertools.product(plan.cases(), (128, 4), (1, 4)):
        make, inputs = NETWORKS[name]
        data, everything = batch(samples, inputs), batch(size * samples, inputs)
        rule, alone = (bpf.EvolutionStrategy(OpenAIES(), population_size=size, rank=rank) for _ in range(2))
        bare, net = Searched(make(), ADAM), make()
        others = {
            "forward": forwards(net, everything),
            "pieces": pieces(net, everything, PIECE),
            "alone": generation(alone, bare, data),
        }
        rounds = fitted(rule, make(), data, ADAM, others, plan.repeats(size))
        what = (
            f"one generation over one forward of {size * samples:,} samples ({rounds.milliseconds('forward'):.1f} ms), Adam, "
            f"{passes(rule)}; {rounds.ratio('alone', 'forward'):.2f} without Lightning"
        )
        if size * samples > PIECE:
            what += f"; {rounds.ratio('step', 'pieces'):.2f} over forwards of {PIECE:,} samples each"
        title = f"rank {rank}, {name}, N = {size}, {samples} samples a member"
        rows.append(row(title, what, rounds.ratio("step", "forward"), 1.3))
    return rows


# --- memory ---


def looped(size: int) -> tuple[bpf.EvolutionStrategy, Searched, Data]:
    make, inputs = NETWORKS["MLP 784-256-10"]
    rule = bpf.EvolutionStrategy(OpenAIES(), population_size=size, chunk_size=1)
    return rule, Searched(make(), ADAM), batch(128, inputs)


def resident() -> float:
    """Return the most MiB that this process has had in memory."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says there, a process inherits from the one that started it
        return float(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def print_peak(size: int) -> None:
    """In a process of its own: print the peak before and after generations of ``size`` members."""
    generation(*looped(2))()  # modules are loaded, the table of noise is made, Adam has its moments
    before = resident()
    step = generation(*looped(size))
    for _ in range(2):
        step()
    print(before, resident())


def memory(plan: Plan) -> list[dict[str, object]]:
    """Peak memory of members one by one, against their number."""
    rows: list[dict[str, object]] = []
    peaks, copies = {}, {}
    for size in plan.memory_sizes:
        command = [sys.executable, __file__, "--peak", str(size)]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(3)]
        before, peaks[size] = max((tuple(map(float, run)) for run in runs), key=lambda pair: pair[1])
        rule, module, data = looped(size)
        step, size_of_all = generation(rule, module, data), sum(p.nbytes for p in module.parameters())
        step()  # Adam's moments and the table are there
        inference = peak_bytes(forwards(module.net, data))
        copies[size] = (peak_bytes(step) - inference) / size_of_all
        what = (
            f"resident size of a process at its peak, the largest of three fresh ones, {peaks[size] - before:.1f} MiB above that of 2 members; live tensors "
            f"above inference: {copies[size]:.3f} copies of the parameters (a population would take {size}); MLP 784-256-10"
        )
        rows.append(row(f"memory, one by one, N = {size}", what, peaks[size], unit="MiB"))
    few, many = min(peaks), max(peaks)
    title = f"memory, one by one, N = {many} over N = {few}"
    what = "of peak memory, must not depend on N: "
    return [
        *rows,
        row(
            f"{title}, resident size",
            what + "the largest of three fresh processes each",
            peaks[many] / peaks[few],
            1.02,
        ),
        row(f"{title}, live tensors", what + "tensors above inference", copies[many] / copies[few], 1.02),
    ]


PARTS = {part.__name__: part for part in (full_rank, drawn_anew, low_rank, memory)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """One thread, one seed, and nothing said about how few workers there are."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_utilities.core.rank_zero").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="small populations, few rounds: only to see that it runs")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    with quiet():
        if chosen.peak is not None:
            print_peak(chosen.peak)
            return
        plan = Plan(chosen.quick)
        rows = [made for name in chosen.only for made in PARTS[name](plan)]
    options = [*(["--quick"] if chosen.quick else []), *([f"--out {chosen.out}"] if chosen.out else [])]
    write(rows, " ".join(["python tests/benchmarks/evolution.py", *options]), chosen.out)
    print(f"missed: {', '.join(str(made['name']) for made in rows if made['reached'] is False) or 'none'}")


if __name__ == "__main__":
    main()
