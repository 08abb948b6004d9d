"""What evaluating a step several times cannot hide, as `docs/limits.md` says."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from once_problems import Once, fitted, pairs
from torch import nn

import lightning_bpfree as bpf

REACHED: list[int] = []


class ReachesOutside(Once):
    """Fills a list of its file, and counts at its class."""

    count: ClassVar[int] = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        REACHED.append(batch_idx)
        type(self).count += 1
        return self.loss(*batch)


def test_side_effects_outside_of_the_module_repeat() -> None:
    REACHED.clear()
    ReachesOutside.count = 0
    fitted(ReachesOutside(), pairs(), bpf.ZerothOrder(1), precision="64-true")
    # Three evaluations in each of four batches, and rehearsals of the first and the fourth.
    assert len(REACHED) == ReachesOutside.count == 3 * 4 + 2


class WritesLate(Once):
    """Begins to double its batch, unseen by torch, in the third batch: between two rehearsals."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        if batch_idx >= 2:
            x.numpy()[...] *= 2
        return self.loss(x, y)


def test_unseen_writes_between_rehearsals_are_noticed_at_the_next() -> None:
    def losses(*callbacks: Any) -> list[float]:
        torch.manual_seed(0)
        module, found = WritesLate(), []
        module.on_train_batch_end = lambda outputs, *_: found.append(float(outputs["loss"]))  # type: ignore[method-assign]
        fitted(module, pairs(), *callbacks, precision="64-true")
        return found

    plain, ruled = losses(), losses(bpf.ForwardGradient(3, chunk_size=1))
    assert ruled[:2] == pytest.approx(plain[:2])
    assert ruled[2] == pytest.approx(plain[2])  # the recorded evaluation comes first
    assert ruled[3] == pytest.approx(plain[3])  # the fourth step is rehearsed


class FollowsItself(Once):
    """A target of its own weights, through which no gradient flows."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, _ = batch
        return F.mse_loss(self.net(x), self.net(x).detach() + 1)


def test_finite_differences_see_a_target_that_is_cut_from_the_graph() -> None:
    def gradient(rule: bpf.TrainingRule) -> torch.Tensor:
        torch.manual_seed(0)
        module, found = FollowsItself(), []
        module.on_before_optimizer_step = lambda _: found.append(module.net.weight.grad.clone())  # type: ignore[method-assign]
        fitted(module, pairs(), rule, precision="64-true", max_steps=1)
        return found[0]

    # The loss is 1 wherever the weights are, so that differences are nothing but rounding.
    with pytest.warns(UserWarning, match="flat along all"):
        assert float(gradient(bpf.ZerothOrder(2, sigma=0.25)).norm()) < 1e-12
    assert float(gradient(bpf.ForwardGradient(2)).norm()) > 0.1


class CountsItsCalls(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner, self.calls = nn.Linear(size, size), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(1)
        return torch.tanh(self.inner(x))


def test_lists_of_modules_in_a_reversible_stack_grow_twice() -> None:
    blocks = [bpf.ReversibleBlock(CountsItsCalls(3), nn.Linear(3, 3)) for _ in range(2)]
    stack = bpf.ReversibleSequential(blocks)
    stack(torch.randn(2, 3, requires_grad=True)).sum().backward()
    counted = [part for part in stack.modules() if isinstance(part, CountsItsCalls)]
    assert [len(part.calls) for part in counted] == [2, 2]
    assert len(copy.deepcopy(counted[0]).calls) == 2


class MadeOfABag(Once):
    """Makes a layer that has no forward derivative in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = None

    def configure_model(self) -> None:
        if self.bag is None:
            self.bag = nn.EmbeddingBag(5, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("unreachable")


def test_layers_of_configure_model_are_looked_at_before_the_first_batch() -> None:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    with pytest.raises(MisconfigurationException, match="bag"):
        fitted(MadeOfABag(), pairs(), bpf.ForwardGradient())
