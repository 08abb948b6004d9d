"""Modules whose step changes containers and objects that they hold, or that are born during the fit."""

from __future__ import annotations

import collections

import numpy as np
import torch
import torchmetrics
from once_problems import (
    BATCHES,
    FEATURES,
    Once,
)

# --- containers and objects that modules hold ----


class Lists(Once):
    def prepare(self):
        self.losses, self.nested = [], {"a": [[]]}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        self.nested["a"][0].append(float(loss.detach()))
        return loss

    def trace(self):
        return self.losses, self.nested

    def on_train_epoch_end(self):
        self.log("mean", torch.stack(self.losses).mean())


class Dicts(Once):
    def prepare(self):
        self.by_batch, self.counts, self.lists = {}, collections.Counter(), collections.defaultdict(list)
        self.ordered = collections.OrderedDict()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.by_batch[len(self.by_batch)] = loss.detach()
        self.counts[batch_idx % 2] += 1
        self.lists[batch_idx].append(float(loss.detach()))
        self.ordered[batch_idx % 3] = batch_idx
        self.ordered.move_to_end(batch_idx % 3)
        return loss

    def trace(self):
        return self.by_batch, dict(self.counts), dict(self.lists), list(self.ordered.items())


class SetsAndDeques(Once):
    def prepare(self):
        self.seen, self.recent, self.bytes = set(), collections.deque(maxlen=3), bytearray()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen.add(len(self.seen))
        self.recent.append(loss.detach())
        self.bytes.append(batch_idx)
        return loss * (1 + len(self.recent))

    def trace(self):
        return sorted(self.seen), list(self.recent), self.recent.maxlen, bytes(self.bytes)


class Meter:
    def __init__(self):
        self.count, self.values = 0, []

    def update(self, value):
        self.count += 1
        self.values.append(value)


class SlottedMeter:
    __slots__ = ("count", "values")

    def __init__(self):
        self.count, self.values = 0, []

    update = Meter.update


class Owner:
    """A helper that holds helpers, and the module that holds it."""

    def __init__(self, module):
        self.module, self.meters = module, (Meter(), {"slotted": SlottedMeter()})


class HelperObjects(Once):
    def prepare(self):
        self.meter, self.slotted, self.owner = Meter(), SlottedMeter(), Owner(self)

    def meters(self):
        return self.meter, self.slotted, self.owner.meters[0], self.owner.meters[1]["slotted"]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for meter in self.meters():
            meter.update(float(loss.detach()))
        return loss

    def trace(self):
        return [(meter.count, meter.values) for meter in self.meters()]


class ClassLevel(Once):
    """Counts in a list that the class holds, not the module."""

    losses: list[float] = []  # noqa: RUF012  # the habit that is tried

    def prepare(self):
        self.losses.clear()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss.detach()))
        return loss

    def trace(self):
        return list(self.losses)


class HeldTensors(Once):
    """Tensors and arrays that are no buffers: small ones, one above a megabyte, in a list and a tuple."""

    def prepare(self):
        self.total, self.bank, self.array = torch.zeros(2), torch.zeros(1 << 18), np.zeros(2)
        self.listed, self.packed = [torch.zeros(2)], (torch.zeros(2), 1)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            self.total += loss
            self.bank[batch_idx::BATCHES] += 1
            self.listed[0].add_(loss)
            self.packed[0].add_(loss)
        self.array += float(loss.detach())
        return loss * (1 + self.total.sum())

    def trace(self):
        return self.total, self.bank.sum(), torch.from_numpy(self.array), self.listed[0], self.packed[0]


class HiddenState(Once):
    """A state that is assigned, detached, from step to step: truncated backpropagation through time."""

    def prepare(self):
        self.hidden, self.steps = torch.zeros(4, FEATURES), 0

    def training_step(self, batch, batch_idx):
        x = batch[0] + 0.5 * self.hidden
        self.hidden = x.detach()
        self.steps += 1
        return self.loss(x, batch[1])

    def trace(self):
        return self.hidden, self.steps


class EmptiedAtEpochEnd(Once):
    """Tensors in a list that a hook empties: the second epoch begins without them."""

    epochs = 2

    def prepare(self):
        self.outputs, self.means = [], []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss.detach().clone())
        self.outputs[-1] *= 2
        return loss

    def on_train_epoch_end(self):
        self.means.append(torch.stack(self.outputs).mean())
        self.outputs.clear()

    def trace(self):
        return self.means


CONTAINERS = [EmptiedAtEpochEnd, Lists, Dicts, SetsAndDeques, HelperObjects, ClassLevel, HeldTensors, HiddenState]


# --- born during the fit ----


class MetricInTheFirstForward(Once):
    def prepare(self):
        self.metric = None

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.metric is None:
            self.metric = torchmetrics.SumMetric()
        self.metric.update(loss.detach())
        return loss

    def trace(self):
        return self.metric.compute()


class ThingsInTheFirstForward(Once):
    """A buffer, a list, a generator, a helper: none of them there when the fit began."""

    def training_step(self, batch, batch_idx):
        if not hasattr(self, "steps"):
            self.register_buffer("steps", torch.zeros(()))
            self.losses, self.rng, self.meter = [], np.random.default_rng(0), Meter()
        loss = self.loss(batch[0] + self.rng.random(), batch[1])
        self.steps += 1
        self.losses.append(float(loss.detach()))
        self.meter.update(float(loss.detach()))
        return loss

    def trace(self):
        return self.losses, self.rng.random(), self.meter.count, self.meter.values


class ThingsAtEpochStart(ThingsInTheFirstForward):
    def on_train_epoch_start(self):
        self.register_buffer("steps", torch.zeros(()))
        self.losses, self.rng, self.meter = [], np.random.default_rng(0), Meter()


class ThingsInAContainer(Once):
    """A dict that gets a list of its own for every batch, into which later batches write."""

    def prepare(self):
        self.by_key = {}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for key in range(batch_idx + 1):
            self.by_key.setdefault(key, []).append(float(loss.detach()))
        return loss

    def trace(self):
        return self.by_key


BORN = [MetricInTheFirstForward, ThingsInTheFirstForward, ThingsAtEpochStart, ThingsInAContainer]
