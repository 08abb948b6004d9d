"""What `conformance.py` tries rules on; subclass :class:`ConformanceProblem` for a rule that needs something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from problems import Chain, Problem, fitted, loader
from torch.utils.data import DataLoader

from lightning_bpfree import TrainingRule

MakeRule = Callable[..., TrainingRule]


class ConformanceProblem(Problem):
    """What a rule is tried on, unless it brings a problem of its own: subclass this, and override what differs.

    ``make_net`` and ``data`` say what is learned; ``head`` names the parameters that the rule trains alone once. The
    network should have, as far as the rule allows them, tied and frozen weights, dropout and BatchNorm: whatever it has
    is looked at.
    """

    head = "net.head.*"

    def make_net(self) -> torch.nn.Module:
        return Chain()

    @staticmethod
    def data(rows: int = 64, *, shuffle: bool = False, seed: int = 0) -> DataLoader:
        """Return batches of 16: four of them by default, whatever ``rows`` says otherwise."""
        return loader(rows=rows, shuffle=shuffle, seed=seed)


class Case(NamedTuple):
    """A rule and the problem on which it is tried.

    Args:
        make_rule: makes the rule, with further settings of :class:`TrainingRule`.
        problem: makes the module.
    """

    make_rule: MakeRule
    problem: type[ConformanceProblem] = ConformanceProblem

    def run(self, ruled: bool = True, *, lr: float = 0.1, data: DataLoader | None = None, seed: int = 0, **settings):
        """Fit a fresh problem; returns module and Trainer. Equal seeds give equal initial weights and dropout."""
        torch.manual_seed(seed)
        module = self.problem(lr=lr)
        data = self.problem.data() if data is None else data
        return module, fitted(module, data, *([self.make_rule()] if ruled else []), **settings)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"differ: {different}"
