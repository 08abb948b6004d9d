"""A small study of tickets: its configuration and data, how its results are read, and a study written by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_bpfree import Ticket
from lightning_bpfree.core.params import Params

SPARSITIES = [0.0, 0.3, 0.5]
ES = """
    - class_path: lightning_bpfree.EvolutionStrategy
      init_args:
        algorithm: {class_path: lightning_bpfree.SNES, init_args: {sigma: 0.05}}
        population_size: 4
"""
LEVELS = f"    - {{class_path: lightning_bpfree.LotteryTicket, init_args: {{sparsities: {SPARSITIES}}}}}\n"
PARTS = """
seed_everything: 0
model:
  class_path: lightning_bpfree.demos.modules.Classifier
  init_args:
    net: {class_path: lightning_bpfree.demos.modules.MLP, init_args: {in_features: 4, hidden: [8], num_classes: 3}}
    num_classes: 3
    lr: 1.0
data: {class_path: ticket_problems.Blobs}
trainer:
  accelerator: cpu
  logger: false
  callbacks:
"""
BACKPROP = """
model: {init_args: {optimizer: adam, lr: 0.01}}
trainer: {callbacks+: [{class_path: lightning_bpfree.Backprop}]}
"""


WEIGHTS = 4 * 8 + 8 * 3


def blobs(seed: int, samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    return torch.eye(4)[labels] + 0.7 * torch.randn(samples, 4, generator=generator), labels


class Blobs(LightningDataModule):
    """Three clouds of points; test batches are equal, so that means over batches are means over samples."""

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*blobs(0, 96)), batch_size=32, shuffle=True)

    def test_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*blobs(1, 200)), batch_size=100)


class Normed(torch.nn.Sequential):
    """A network with running statistics."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


def write_parts() -> None:
    Path("base.yaml").write_text(PARTS + ES + LEVELS)
    Path("bp.yaml").write_text(BACKPROP)


def results(out: str | Path = "out") -> Any:
    return json.loads((Path(out) / "tickets.json").read_text())


def ticket(study: dict[str, Any], kind: str, level: int, rule: str = "EvolutionStrategy") -> Ticket:
    (file,) = [run["file"] for run in runs(study, kind, rule) if run["level"] == level]
    return Ticket.load(file)


def runs(study: dict[str, Any], kind: str, rule: str = "EvolutionStrategy") -> list[dict[str, Any]]:
    return [run for run in study["runs"] if (run["rule"], run["tickets"]) == (rule, kind)]


def equal(one: Params, other: Params) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


OUT = ["--seeds", "3", "--out"]


class Counted:
    """Stands in for a rule, and trains nothing."""

    def __init__(self, rule: str, levels: int) -> None:
        self.rule, self.num_levels = rule, levels

    def levels(self, kind: str, seed: int) -> Iterator[dict[str, Any]]:
        for level in range(self.num_levels):
            yield {"rule": self.rule, "tickets": kind, "seed": seed, "level": level, "weights_left": 1.0, "file": "no"}

    def again(self, ticket: Path, name: str, seed: int) -> dict[str, Any]:
        return {"rule": self.rule, "tickets": name, "seed": seed, "level": 0, "weights_left": 1.0, "file": str(ticket)}

    def barriers(self, one: Path, other: Path) -> dict[str, Any]:
        return {}


VALUES = {  # (rule, tickets, level): one a seed
    ("ES", "snr", 0): [0.9, 0.8, 0.7],
    ("ES", "snr", 1): [0.8, 0.7, 0.9],
    ("ES", "random", 0): [0.9, 0.8, 0.7],
    ("ES", "random", 1): [0.5, 0.6, 0.7],
    ("ES", "snr_again", 1): [0.1, 0.1, 0.1],
    ("bp", "magnitude", 0): [1.0, 1.0, 1.0],
    ("bp", "magnitude", 1): [0.5, 0.6, 0.7],
    ("bp", "snr_of_ES", 1): [0.6, 0.6, 0.6],
}
LEFT = [1.0, 0.25]


def by_hand() -> dict[str, Any]:
    """A study of two levels and three seeds, whose statistics are easy to calculate."""
    entries = [
        {
            "rule": rule,
            "tickets": kind,
            "seed": seed,
            "level": level,
            "weights_left": LEFT[level],
            "kept": 100 * LEFT[level],
            "value": values[seed],
            "forward_evals": 10.0,
            "seconds": 1.0,
        }
        for seed in range(3)
        for (rule, kind, level), values in VALUES.items()
    ]
    lines = [
        {
            "rule": "ES",
            "tickets": "snr",
            "between": between,
            "seed": seed,
            "level": level,
            "weights_left": LEFT[level],
            "metric": {"barrier": 0.01 * seed + 0.1 * level},
            "loss": {"barrier": 0.5},
        }
        for seed in range(3)
        for between, level in (("levels", 1), ("seeds", 0), ("seeds", 1))
    ]
    settings = {"metric": "test_acc", "seeds": [0, 1, 2], "rule": "ES", "kinds": ["snr", "random"]}
    where = {"command": ["bpfree", "tickets"], "date": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.13.0"}}
    return {**settings, **where, "machine": {"threads": 1}, "runs": entries, "barriers": lines}
