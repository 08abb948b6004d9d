"""Steps that keep something: counters, teachers, queues, metrics, random sources, hidden states."""

from __future__ import annotations

import collections
import copy
import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from suite_base import CLASSES, FEATURES, Foreign, case, loader, mlp, table
from torch import Tensor, nn
from torchmetrics import MeanMetric, MinMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix


@case
class OutputsCollected(Foreign):
    """The pattern that replaced `training_epoch_end`."""

    def prepare(self) -> None:
        self.outputs: list[Tensor] = []
        self.means: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(*batch)
        self.outputs.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.means.append(float(torch.stack(self.outputs).sum()))
        self.outputs.clear()


@case
class Helper(Foreign):
    """Keeps counts in an object of its own class, two levels down."""

    class Tracker:
        def __init__(self) -> None:
            self.seen = {"calls": 0, "rows": collections.Counter()}
            self.best = float("inf")

    def prepare(self) -> None:
        self.tracker = self.Tracker()
        self.last = collections.deque(maxlen=2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(*batch)
        self.tracker.seen["calls"] += 1
        self.tracker.seen["rows"].update(batch[1].tolist())
        self.tracker.best = min(self.tracker.best, float(loss.detach()))
        self.last.append(batch_idx)
        return loss


@case
class MomentumTeacher(Foreign):
    """A teacher that follows the student within the step."""

    rough = True  # finite differences see through what stops gradients

    def prepare(self) -> None:
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        for parameter in self.teacher.parameters():
            parameter.data.mul_(0.7)

    @torch.no_grad()
    def follow(self) -> None:
        for ours, theirs in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            ours.data.mul_(0.9).add_(theirs.detach(), alpha=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.follow()
        with torch.no_grad():
            target = self.teacher(x).softmax(1)
        return self.loss(x, y) + F.kl_div(self.net(x).log_softmax(1), target, reduction="batchmean")


@case
class TeacherAfterTheBatch(MomentumTeacher):
    """Follows where it does no harm, once a batch."""

    def follow(self) -> None:
        pass

    def on_train_batch_end(self, *_: Any) -> None:
        MomentumTeacher.follow(self)


@case
class TeacherHidden(Foreign):
    """A teacher that is not registered, as those hide it who do not want it in checkpoints."""

    def prepare(self) -> None:
        self.__dict__["teacher"] = [copy.deepcopy(self.net)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (teacher,) = self.__dict__["teacher"]
        teacher.to(self.dtype)
        for ours, theirs in zip(teacher.parameters(), self.net.parameters(), strict=True):
            ours.data = 0.9 * ours.data + 0.1 * theirs.data + 0.01
        with torch.no_grad():
            target = teacher(batch[0])
        return self.loss(*batch) + F.mse_loss(self.net(batch[0]), target)


@case
class QueueOfNegatives(Foreign):
    """Contrastive: keys of former batches wait in a buffer with a pointer."""

    rough = True  # finite differences see through what stops gradients

    def prepare(self) -> None:
        self.net = nn.Sequential(nn.Linear(FEATURES, 5), nn.ReLU(), nn.Linear(5, 4))
        self.register_buffer("queue", F.normalize(torch.randn(4, 12), dim=0))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        queries = F.normalize(self.net(x), dim=1)
        with torch.no_grad():
            keys = F.normalize(self.net(x + 0.1 * torch.randn_like(x)), dim=1)
        positive, negative = (queries * keys).sum(1, keepdim=True), queries @ self.queue.clone()
        start = int(self.pointer)
        self.queue[:, start : start + len(x)] = keys.T
        self.pointer[0] = (start + len(x)) % 12
        logits = torch.cat([positive, negative], 1) / 0.2
        return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))


@case
class Centers(Foreign):
    """Center loss: class centers that move with the features, in the step."""

    def prepare(self) -> None:
        self.register_buffer("centers", torch.zeros(CLASSES, 5))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        features = self.net[1](self.net[0](x))
        loss = F.cross_entropy(self.net[2](features), y) + 0.1 * (features - self.centers[y]).square().mean()
        self.centers.index_add_(0, y, 0.1 * (features.detach() - self.centers[y]))
        return loss


@case
class BaselineOfRewards(Foreign):
    """A running mean kept as a Python number, with which the loss is centered."""

    rough = True  # finite differences see through what stops gradients

    def prepare(self) -> None:
        self.mean, self.count = 0.0, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(*batch)
        self.count += 1
        self.mean += (float(loss.detach()) - self.mean) / self.count
        return (loss - self.mean).square() + loss


@case
class MetricsOfAllKinds(Foreign):
    """Registered, in a list, and of a running kind."""

    def prepare(self) -> None:
        self.accuracy, self.mean = MulticlassAccuracy(CLASSES, average="micro"), MeanMetric()
        self.hidden = [MulticlassConfusionMatrix(CLASSES)]
        self.lowest = MinMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.mean.update(loss.detach())
        self.hidden[0].update(logits.detach(), y)
        self.log("lowest", self.lowest(loss.detach()))
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("mean", self.mean, on_epoch=True)
        return loss


@case
class LogsOtherwise(Foreign):
    """Logs through a method kept before the fit, through `super()`, and by `log_dict`."""

    def prepare(self) -> None:
        self.say = self.log

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(*batch)
        self.say("said", loss.detach())
        super().log("above", loss.detach() * 2, on_epoch=True, on_step=True)
        self.log_dict({"a": loss.detach(), "b": torch.rand(())}, prog_bar=True)
        return loss


@case
class RandomSources(Foreign):
    """NumPy's, Python's and torch's generators of its own, beside the global streams."""

    def prepare(self) -> None:
        self.numpy, self.python = np.random.default_rng(1), random.Random(2)
        self.torch = torch.Generator().manual_seed(3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        noise = self.numpy.standard_normal() + self.python.gauss(0, 1) + np.random.rand() + random.random()
        kept = torch.rand(x.shape, generator=self.torch) > 0.3
        return self.loss(x * kept.to(x) + 0.1 * noise, y)


@case
class SecondLoader(Foreign):
    """Draws from an iterator of its own, and begins again at its end."""

    def prepare(self) -> None:
        self.more = loader(table()[0][:8].double(), shuffle=True)
        self.drawn = iter(self.more)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        try:
            (x,) = next(self.drawn)
        except StopIteration:
            self.drawn = iter(self.more)
            (x,) = next(self.drawn)
        x = x.to(self.net[0].weight)
        return self.loss(*batch) + 0.1 * (self.net(x) - self.net(x.flip(1))).square().mean()


@case
class HiddenStateCarried(Foreign):
    """Recurrent, truncated: the state of a batch is the start of the next."""

    def prepare(self) -> None:
        self.net = nn.GRU(1, 4, batch_first=True)
        self.head, self.state = nn.Linear(4, CLASSES), None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out, state = self.net(x.unsqueeze(-1), self.state)
        self.state = state.detach()
        return F.cross_entropy(self.head(out[:, -1]), y)


@case
class MemoryBank(Foreign):
    """Keeps features of rows in a dict by their number, and draws them to the new ones."""

    def prepare(self) -> None:
        self.bank: dict[int, Tensor] = {}

    settings = {"max_epochs": 2}  # noqa: RUF012

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        features = self.net(x)
        before = self.bank.get(batch_idx)
        self.bank[batch_idx] = features.detach()
        pull = 0.0 if before is None else (features - before).square().mean()
        return F.cross_entropy(features, y) + pull


@case
class Curriculum(Foreign):
    """Counts its own steps, and makes the task harder by them."""

    def prepare(self) -> None:
        self.steps = 0
        self.drop = nn.Dropout(0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        self.drop.p = min(0.5, 0.2 * self.steps)
        x, y = batch
        return self.loss(self.drop(x), y)


@case
class Distilled(Foreign):
    """A frozen teacher with BatchNorm, put into evaluation mode in the step."""

    def prepare(self) -> None:
        self.teacher = nn.Sequential(nn.BatchNorm1d(FEATURES), mlp()).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.teacher.eval()
        x, y = batch
        return self.loss(x, y) + F.mse_loss(self.net(x), self.teacher(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=0.01)
