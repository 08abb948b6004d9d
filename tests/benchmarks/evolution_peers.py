"""Measures a generation of evolution strategies beside evotorch and EvoX, on one thread, in forward passes.

    python -m venv peers
    peers/bin/pip install torch==2.13.0 lightning==2.6.6 evotorch==0.6.1 evox==1.4.0
    PYTHONPATH=. peers/bin/python tests/benchmarks/evolution_peers.py --out docs/results/evolution_peers_benchmarks.json

(the build of torch for CPUs will do). The peers need an environment of their own: their requirements are many.

All train the same network from the same weights on the same batch of 128 samples, with populations of the same size, and
the same settings where they have the same ones. Each peer is used in two ways: as its documentation shows (``SupervisedNE``
of evotorch; ``SupervisedLearningProblem`` of EvoX), and in the fastest way that we have found: a fitness function of
our own that vectorizes over all members, over 8, or goes one by one, whichever takes least time. Nothing is compiled.
Ours runs in a Trainer, whose time counts.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from evolution import NETWORKS, SGD_1, Data, Optimizer, Work, fitted, forwards, quiet
from evotorch import Problem
from evotorch import algorithms as evotorch_algorithms
from evotorch.neuroevolution import SupervisedNE
from evotorch.neuroevolution.net import make_functional_module
from evox import algorithms as evox_algorithms
from evox.algorithms.so.es_variants.virtual_lora_es import VirtualLoRAES
from evox.core import Algorithm
from evox.core import Problem as EvoXProblem
from evox.problems.neuroevolution.supervised_learning import SupervisedLearningProblem
from evox.problems.neuroevolution.virtual_lora_problem import VirtualLoRAProblem
from evox.utils import ParamsAndVector
from evox.workflows import StdWorkflow
from run import batch, row, write
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.methods.evolution_strategy.search.openai_es import OpenAIES
from lightning_bpfree.methods.evolution_strategy.search.pgpe import PGPE
from lightning_bpfree.methods.evolution_strategy.search.snes import SNES

SIGMA, RATE, SAMPLES = 0.05, 0.002, 128
ADAM: Optimizer = partial(torch.optim.Adam, lr=RATE)
Chunk = int | None  # members in one vectorized pass: None for all, 0 for a loop over members


@dataclasses.dataclass
class Peer:
    """One run of a peer: a generation, the center of its search, how many evaluations it has made, and how."""

    step: Work
    center: Callable[[], torch.Tensor]
    evaluations: Callable[[], int]
    how: str


class Task:
    """What all have to do: a network, from its present weights, on one batch, with so many members."""

    def __init__(self, net: nn.Module, data: Data, size: int) -> None:
        self.net, self.data, self.size = net, data, size
        self.start = parameters_to_vector(net.parameters()).detach().clone()

    def loss_at(self, center: torch.Tensor) -> float:
        net = copy.deepcopy(self.net)
        vector_to_parameters(center, net.parameters())
        with torch.no_grad():
            return float(F.cross_entropy(net(self.data[0]), self.data[1]))

    def loader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.data), batch_size=SAMPLES)


def route(chunk: Chunk) -> str:
    return "one by one" if chunk == 0 else "all at once" if chunk is None else f"{chunk} at a time"


# --- evotorch ---


def evotorch_search(task: Task, kind: str, problem: Problem, evaluations: Callable[[], int], how: str) -> Peer:
    common = {"popsize": task.size, "stdev_init": SIGMA, "center_init": task.start.clone()}
    if kind == "SNES":
        search = evotorch_algorithms.SNES(problem, **common)
    else:
        search = evotorch_algorithms.PGPE(
            problem, center_learning_rate=RATE, stdev_learning_rate=0.1, optimizer="adam", **common
        )  # fmt: skip
    return Peer(search.step, lambda: search.status["center"], evaluations, how)


def evotorch_documented(task: Task, kind: str) -> Peer:
    """A data set, a network and a loss."""
    calls = []

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return F.cross_entropy(outputs, labels)

    problem = SupervisedNE(TensorDataset(*task.data), copy.deepcopy(task.net), loss, minibatch_size=SAMPLES)
    return evotorch_search(task, kind, problem, lambda: len(calls), "SupervisedNE")


def evotorch_vectorised(task: Task, kind: str, chunk: Chunk) -> Peer:
    """A fitness function over the whole population, by the library's functional modules."""
    net, calls = make_functional_module(task.net), []

    def fitness(population: torch.Tensor) -> torch.Tensor:
        calls.append(len(population))

        def one(flat: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(net(flat, task.data[0]), task.data[1])

        with torch.no_grad():
            if chunk == 0:
                return torch.stack([one(flat) for flat in population])
            return torch.vmap(one, chunk_size=chunk)(population)

    problem = Problem(
        "min", fitness, solution_length=len(task.start), initial_bounds=(-1e-5, 1e-5), dtype=torch.float32, vectorized=True
    )  # fmt: skip
    return evotorch_search(task, kind, problem, lambda: sum(calls), f"Problem(vectorized=True), {route(chunk)}")


# --- EvoX ---


class Loss(nn.CrossEntropyLoss):
    """Cross-entropy of each sample."""

    def __init__(self) -> None:
        super().__init__(reduction="none")


class Centered(nn.Module):
    """Fitness less its mean: without mirrored members, the noise of raw fitness drowns the search gradient."""

    def forward(self, fitness: torch.Tensor) -> torch.Tensor:
        return fitness - fitness.mean()


class Fitness(EvoXProblem):
    """The loss of every member, by vmap over a number of them or in a loop."""

    def __init__(self, task: Task, chunk: Chunk) -> None:
        super().__init__()
        self.task, self.chunk = task, chunk

    def evaluate(self, population: dict[str, torch.Tensor]) -> torch.Tensor:
        x, y = self.task.data

        def one(params: dict[str, torch.Tensor]) -> torch.Tensor:
            return F.cross_entropy(functional_call(self.task.net, params, (x,)), y)

        with torch.no_grad():
            if self.chunk == 0:
                members = zip(*population.values(), strict=True)
                return torch.stack([one(dict(zip(population, tensors, strict=True))) for tensors in members])
            return torch.vmap(one, chunk_size=self.chunk)(population)


def evox_algorithm(task: Task, kind: str) -> Algorithm:
    center = task.start.clone()
    if kind == "OpenAI-ES":
        return evox_algorithms.OpenES(task.size, center, RATE, SIGMA, optimizer="adam")
    return evox_algorithms.SNES(task.size, center, sigma=SIGMA, weight_type="recomb")


def evox_search(algorithm: Algorithm, problem: EvoXProblem, how: str, **transforms: nn.Module) -> Peer:
    evaluations = [0]
    evaluate = problem.evaluate

    def counted(population: object) -> torch.Tensor:
        fitness = evaluate(population)
        evaluations[0] += len(fitness)
        return fitness

    problem.evaluate = counted
    workflow = StdWorkflow(algorithm, problem, **transforms)
    return Peer(workflow.step, lambda: workflow.algorithm.center, lambda: evaluations[0], how)


def evox_documented(task: Task, kind: str) -> Peer:
    """A network, a loader and a criterion, vmapped over the whole population."""
    net = copy.deepcopy(task.net)
    problem = SupervisedLearningProblem(net, task.loader(), Loss(), pop_size=task.size)
    how, transform = "SupervisedLearningProblem", ParamsAndVector(net)
    return evox_search(evox_algorithm(task, kind), problem, how, solution_transform=transform)


def evox_vectorised(task: Task, kind: str, chunk: Chunk) -> Peer:
    transform = ParamsAndVector(copy.deepcopy(task.net))
    problem, how = Fitness(task, chunk), f"Problem, {route(chunk)}"
    return evox_search(evox_algorithm(task, kind), problem, how, solution_transform=transform)


def evox_low_rank(task: Task, kind: str) -> Peer:
    """Its own low-rank strategy, which takes a stack of dense layers."""
    shapes = [tuple(p.shape) for p in task.net.parameters()]
    net = copy.deepcopy(task.net)
    algorithm = VirtualLoRAES(shapes, 1, task.size, task.start.clone(), RATE, SIGMA, optimizer="adam")
    problem, how = VirtualLoRAProblem(net, task.loader(), Loss(), lora_rank=1), "VirtualLoRAES, fitness less its mean"
    return evox_search(algorithm, problem, how, fitness_transform=Centered())


# --- together ---

Make = Callable[[Task, str], Peer]
CHUNKS: tuple[Chunk, ...] = (None, 8, 0)


def fastest(vectorized: Callable[[Task, str, Chunk], Peer]) -> Make:
    """Return how to make the run whose generation takes the least time."""

    def make(task: Task, kind: str) -> Peer:
        seconds: dict[Chunk, float] = {}
        for chunk in CHUNKS:
            peer, best = vectorized(task, kind, chunk), float("inf")
            for _ in range(3):  # the first warms up
                start = time.process_time()
                peer.step()
                best = min(best, time.process_time() - start)
            seconds[chunk] = best
        return vectorized(task, kind, min(CHUNKS, key=lambda chunk: seconds[chunk]))

    return make


@dataclasses.dataclass
class Contest:
    """One algorithm: our rule, and the runs of peers."""

    kind: str
    rule: Callable[[int], bpf.EvolutionStrategy]
    optimizer: Optimizer
    peers: dict[str, Make]

    def rows(self, name: str, net: nn.Module, data: Data, size: int, repeats: int) -> Iterator[dict[str, object]]:
        task, own = Task(net, data, size), copy.deepcopy(net)
        peers = {label: make(task, self.kind) for label, make in self.peers.items()}
        works: dict[str, Work] = {"forwards": forwards(net, data, size)}
        works |= {label: peer.step for label, peer in peers.items()}
        rule = self.rule(size)
        rounds = fitted(rule, own, data, self.optimizer, works, repeats, warmup=1)
        generations = len(rounds.times["step"])
        where, before = f"{name}, N = {size}", task.loss_at(task.start)
        for label, peer in peers.items():
            check_evaluations(label, peer.evaluations(), generations * size)
            after = descended(label, before, task.loss_at(peer.center()))
            what = (
                f"{peer.how}; one generation over {size} forwards of {SAMPLES} samples; loss {before:.3f} -> {after:.3f} in "
                f"{generations} generations"
            )
            yield row(f"{self.kind}, {label}, {where}", what, rounds.ratio(label, "forwards"))
        check_evaluations("ours", int(rule.record.forward_evals), generations * (size + 1))
        after = descended("ours", before, task.loss_at(parameters_to_vector(own.parameters()).detach()))
        what = (
            f"EvolutionStrategy in a Trainer ({rounds.ratio('loop', 'forwards'):.2f} with the fetching of the batch); one generation, "
            f"of one forward more, over {size} forwards; loss {before:.3f} -> {after:.3f} in {generations} generations"
        )
        yield row(f"{self.kind}, lightning_bpfree, {where}", what, rounds.ratio("step", "forwards"))
        for label, peer in peers.items():
            limit = 0.5 if label.startswith("evotorch") else None
            what = f"time of a generation over that of {label} ({peer.how})"
            yield row(f"{self.kind}, ours over {label}, {where}", what, rounds.ratio("step", label), limit)


def check_evaluations(label: str, made: int, due: int) -> None:
    if made != due:
        raise RuntimeError(f"{label} made {made} evaluations, where {due} were due: it does not do the same work.")


def descended(label: str, before: float, after: float) -> float:
    if not after < before:
        print(f"note: the loss of {label} went from {before:.4f} to {after:.4f}")
    return after


CONTESTS = [
    Contest(
        "SNES", lambda size: bpf.EvolutionStrategy(SNES(sigma=SIGMA), population_size=size), SGD_1,
        {
            "evotorch, as documented": evotorch_documented, "evotorch, vectorized": fastest(evotorch_vectorised),
            "EvoX, as documented": evox_documented, "EvoX, best chunk": fastest(evox_vectorised),
        },
    ),
    Contest(
        "PGPE", lambda size: bpf.EvolutionStrategy(PGPE(sigma=SIGMA), population_size=size), ADAM,
        {"evotorch, as documented": evotorch_documented, "evotorch, vectorized": fastest(evotorch_vectorised)},
    ),
    Contest(
        "OpenAI-ES", lambda size: bpf.EvolutionStrategy(OpenAIES(sigma=SIGMA), population_size=size), ADAM,
        {"EvoX, as documented": evox_documented, "EvoX, best chunk": fastest(evox_vectorised)},
    ),
    Contest(
        "OpenAI-ES of rank 1", lambda size: bpf.EvolutionStrategy(OpenAIES(sigma=SIGMA), population_size=size, rank=1), ADAM,
        {"EvoX": evox_low_rank},
    ),
]  # fmt: skip


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="small populations, few rounds: only to see that it runs")
    chosen = parser.parse_args()
    rows: list[dict[str, object]] = []
    with quiet():
        logging.disable(logging.WARNING)
        for name in ("MLP 784-256-10", "MLP 64-256-256-256-10"):
            make, inputs = NETWORKS[name]
            net, data = make(), batch(SAMPLES, inputs)
            for size in (8, 16) if chosen.quick else (64, 512):
                repeats = 2 if chosen.quick else 9 if size < 256 else 5
                for contest in CONTESTS:
                    rows += contest.rows(name, net, data, size, repeats)
                    gc.collect()  # the populations of peers take gigabytes
    options = [*(["--quick"] if chosen.quick else []), *([f"--out {chosen.out}"] if chosen.out else [])]
    command = " ".join(["PYTHONPATH=. python tests/benchmarks/evolution_peers.py", *options])
    versions = {name: importlib.metadata.version(name) for name in ("evotorch", "evox")}
    write(rows, command, chosen.out, **versions)
    print(f"missed: {', '.join(str(made['name']) for made in rows if made['reached'] is False) or 'none'}")


if __name__ == "__main__":
    main()
