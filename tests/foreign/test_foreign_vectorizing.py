"""A vectorized route that a later step cannot take ends in the loop, with one line, and never the run."""

from __future__ import annotations

import logging
import re

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from foreign_problems import Small, vector_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import fitted
from torch import Tensor, nn

import lightning_bpfree as bpf


class Base(Small):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)
        self.kept: list[float] = []

    def later(self, loss: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return loss if batch_idx < 2 else self.later(loss)


class Item(Base):
    def later(self, loss):
        loss.item()
        return loss


class Branch(Base):
    def later(self, loss):
        return loss if loss > 0 else loss * 2


class Float(Base):
    def later(self, loss):
        return loss * 1 if float(loss) > 0 else loss


class Lists(Base):
    def later(self, loss):
        self.kept.append(float(loss))
        return loss * (1 if max(self.kept) > 0 else 2)


class ToList(Base):
    def later(self, loss):
        assert loss.reshape(1).tolist()
        return loss


class Numpy(Base):
    def later(self, loss):
        self.net.weight.detach().numpy()
        return loss


class Shapes(Base):
    def later(self, loss):
        return loss + 0 * self.net.weight[self.net.weight > 0].sum()


LATER = [Item, Branch, Float, Lists, ToList, Numpy, Shapes]
# A forward gradient has tangents, and no losses, for each direction: it reads numbers and branches in one pass too.
ONE_PASS_DOES = {("forward_gradient", kind) for kind in LATER if kind is not Numpy}
VECTORIZED = {
    "forward_gradient": lambda size: bpf.ForwardGradient(4, chunk_size=size),
    "evolution": lambda size: bpf.EvolutionStrategy(population_size=8, chunk_size=size),
    "low_rank": lambda size: bpf.EvolutionStrategy(population_size=8, chunk_size=size, rank=1),
}
every_route = pytest.mark.parametrize("rule", VECTORIZED)


def trained(kind: type[pl.LightningModule], rule: bpf.TrainingRule, **settings) -> tuple[pl.LightningModule, Tensor]:
    torch.manual_seed(3)
    module = kind()
    fitted(module, vector_data(), rule, max_epochs=2, **settings)
    return module, torch.cat([p.detach().flatten() for p in module.parameters()])


@every_route
@pytest.mark.parametrize("kind", LATER)
def test_a_later_step_that_cannot_be_vectorised_goes_on_in_the_loop(kind, rule, caplog):
    with caplog.at_level(logging.INFO):
        module, found = trained(kind, VECTORIZED[rule]("auto"), precision="64-true")
    said = [r.message for r in caplog.records if "one by one" in r.message]
    assert len(said) == (0 if (rule, kind) in ONE_PASS_DOES else 1)
    assert all(re.search("vectorizing fails", line) for line in said)
    assert len(module.kept) == (2 if kind is Lists else 0)  # once a batch, in two epochs
    # Fitness is compared in float32; equal math in another order.
    _, looped = trained(kind, VECTORIZED[rule](1), precision="64-true")
    torch.testing.assert_close(found, looped, rtol=1e-5, atol=1e-7)


@every_route
@pytest.mark.parametrize("kind", [Item, Branch, Lists, Numpy])
def test_a_chunk_size_that_stops_working_is_refused_with_the_cure(kind, rule):
    if (rule, kind) in ONE_PASS_DOES:
        trained(kind, VECTORIZED[rule](2))
        return
    with pytest.raises(MisconfigurationException, match=r"chunk_size=2\).*cannot be vectorized.*chunk_size=1"):
        trained(kind, VECTORIZED[rule](2))


class AtOnce(Item):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, 2)
        self.net.bias.detach().numpy()
        return loss


@every_route
def test_a_chunk_size_that_cannot_work_is_refused_at_the_first_batch(rule):
    module = AtOnce()
    before = module.net.weight.detach().clone()
    with pytest.raises(MisconfigurationException, match=r"chunk_size=4\).*chunk_size=1"):
        fitted(module, vector_data(), VECTORIZED[rule](4))
    assert torch.equal(module.net.weight, before)


class Breaks(Base):
    def later(self, loss):
        raise ValueError("the user's own")


@every_route
@pytest.mark.parametrize("size", ["auto", 4])
def test_an_error_of_the_step_itself_stays_the_same(rule, size):
    with pytest.raises(ValueError, match="the user's own"):
        trained(Breaks, VECTORIZED[rule](size))


class Skips(Base):
    def later(self, loss):
        return None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@every_route
def test_a_later_step_without_a_loss_is_left_out(rule, caplog):
    with caplog.at_level(logging.INFO):
        trained(Skips, VECTORIZED[rule]("auto"))
    assert not [r for r in caplog.records if re.search("vectorizing fails", r.message)]


class WritesToFrozen(Base):
    """A teacher follows the student in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(6, 3).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.teacher.weight.lerp_(self.net.weight, 0.1)
        return F.mse_loss(self.net(batch[0]), self.teacher(batch[0]))


@every_route
def test_a_step_that_writes_to_parameters_takes_the_loop(rule):
    found = [trained(WritesToFrozen, VECTORIZED[rule](size))[1] for size in ("auto", 1)]
    assert torch.equal(*found)  # the same route
    with pytest.raises(MisconfigurationException, match=r"chunk_size=4\).*writes to parameters.*chunk_size=1"):
        trained(WritesToFrozen, VECTORIZED[rule](4))
