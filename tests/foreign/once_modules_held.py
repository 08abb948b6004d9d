"""Modules whose step changes modules that they hold: metrics, and teachers that follow."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
import torchmetrics
from once_modules_state import Meter
from once_problems import (
    Once,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# --- metrics and logging ----


class UnregisteredMetrics(Once):
    """Metrics in a list, in a dict and in a helper object, where Lightning does not find them."""

    def prepare(self):
        self.listed, self.kept = [torchmetrics.MeanMetric()], {"sum": torchmetrics.SumMetric()}
        self.meter = Meter()
        self.meter.metric = torchmetrics.CatMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for metric in (self.listed[0], self.kept["sum"], self.meter.metric):
            metric.update(loss.detach())
        return loss

    def trace(self):
        return self.listed[0].compute(), self.kept["sum"].compute(), self.meter.metric.compute()


class RunningMetrics(Once):
    def prepare(self):
        self.mean, self.sum = torchmetrics.RunningMean(window=3), torchmetrics.RunningSum(window=2)
        self.extremes = torchmetrics.MinMaxMetric(torchmetrics.MeanMetric())
        self.tracker = torchmetrics.MetricTracker(torchmetrics.MeanMetric(), maximize=False)
        self.tracker.increment()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("now", self.mean(loss.detach()), on_step=True)
        self.sum.update(loss.detach())
        self.extremes(loss.detach())  # a forward call computes, and so moves minimum and maximum
        self.tracker.update(loss.detach())
        return loss

    def trace(self):
        return self.mean.compute(), self.sum.compute(), self.extremes.compute(), self.tracker.compute()


class LogsInEveryWay(Once):
    def prepare(self):
        self.say, self.say_all = self.log, self.log_dict

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        common = {"on_step": False, "on_epoch": True, "reduce_fx": "sum"}
        self.log("one", 1.0, **common)
        self.say("two", loss, **common)
        super().log("three", loss, **common)
        self.say_all({"four": loss}, **common)
        super().log_dict({"five": 1.0}, **common)
        return loss


class MetricOfAChild(Once):
    """A child that counts its own calls in a metric, logged by the parent as an object."""

    def prepare(self):
        self.accuracy = torchmetrics.classification.BinaryAccuracy()

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.accuracy(logits.argmax(1), y)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, y)


METRICS = [UnregisteredMetrics, RunningMetrics, LogsInEveryWay, MetricOfAChild]


# --- parameters that the step changes ----


class Teacher(Once):
    """A frozen copy that follows in the step; ``follow`` says in which way."""

    def prepare(self):
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        nn.init.zeros_(self.teacher.weight)

    def follow(self, slow, fast):
        slow.lerp_(fast, 0.1)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                self.follow(slow, fast)
        return F.mse_loss(self.net(batch[0]), self.teacher(batch[0]))


class TeacherByData(Teacher):
    def follow(self, slow, fast):
        slow.data = 0.9 * slow.data + 0.1 * fast.detach()


class TeacherByCopy(Teacher):
    def follow(self, slow, fast):
        slow.copy_(0.9 * slow + 0.1 * fast)


class TeacherByDataInPlace(Teacher):
    def follow(self, slow, fast):
        slow.data.mul_(0.9).add_(fast.data, alpha=0.1)


class TeacherByStateDict(Teacher):
    def training_step(self, batch, batch_idx):
        mixed = {k: 0.9 * v + 0.1 * self.net.state_dict()[k] for k, v in self.teacher.state_dict().items()}
        self.teacher.load_state_dict(mixed)
        return F.mse_loss(self.net(batch[0]), self.teacher(batch[0]))


class TeacherOutside(Teacher):
    """Held in a list, so that it is neither saved nor moved with the module."""

    def prepare(self):
        self.held = [copy.deepcopy(self.net).requires_grad_(False).double()]
        nn.init.zeros_(self.held[0].weight)

    @property
    def teacher(self):
        return self.held[0]

    def trace(self):
        return [p.detach() for p in self.teacher.parameters()]


class Averaged(Once):
    def prepare(self):
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.average.requires_grad_(False)
        nn.init.zeros_(self.average.module.weight)
        self.average.n_averaged += 1  # the first update would copy

    def training_step(self, batch, batch_idx):
        self.average.update_parameters(self.net)
        return F.mse_loss(self.net(batch[0]), self.average(batch[0]))


TEACHERS = [Teacher, TeacherByData, TeacherByCopy, TeacherByDataInPlace, TeacherByStateDict, TeacherOutside, Averaged]
