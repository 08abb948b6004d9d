"""Modules whose step changes what it is given: batches, random sources, iterators."""

from __future__ import annotations

import dataclasses
import random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from once_problems import (
    Once,
    batches,
    loaded,
)
from torch import Tensor

# --- the batch ----


class Popped(Once):
    def data(self):
        return loaded([{"x": x, "labels": y} for x, y in batches()])

    def training_step(self, batch, batch_idx):
        labels = batch.pop("labels")
        return self.loss(labels=labels, **batch)

    def loss(self, x, labels):
        return super().loss(x, labels)


class PoppedFromAList(Popped):
    def data(self):
        return loaded([[x, y] for x, y in batches()])

    def training_step(self, batch, batch_idx):
        labels = batch.pop()
        return self.loss(batch.pop(), labels)


class PoppedInside(Popped):
    def data(self):
        return loaded([{"inputs": [{"x": x}], "targets": {"labels": y}} for x, y in batches()])

    def training_step(self, batch, batch_idx):
        labels = batch["targets"].pop("labels")
        return self.loss(batch["inputs"].pop().pop("x"), labels)


class Filled(Once):
    """Puts what it has computed into the batch, and takes it where it finds it."""

    def data(self):
        return loaded([{"x": x, "y": y} for x, y in batches()])

    def training_step(self, batch, batch_idx):
        if "logits" not in batch:
            batch["logits"] = self.net(batch["x"])
        return F.cross_entropy(batch["logits"], batch["y"])


class MaskedInPlace(Once):
    def training_step(self, batch, batch_idx):
        x, y = batch
        x[torch.rand(x.shape) < 0.4] = 0.0
        return self.loss(x, y)


class NormalizedInPlace(Once):
    def training_step(self, batch, batch_idx):
        x, y = batch
        x.sub_(x.mean(0)).div_(x.std(0) * 3)
        return self.loss(x, y)


class DoubledInPlace(Once):
    """Twice the input, and twice again if it were evaluated again."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch[0].mul_(2), batch[1])


class DoubledThroughData(Once):
    def training_step(self, batch, batch_idx):
        batch[0].data.mul_(2)
        return self.loss(*batch)


class DoubledByNumPy(Once):
    def training_step(self, batch, batch_idx):
        batch[0].numpy()[...] *= 2
        return self.loss(*batch)


class ArrayDoubled(Once):
    def data(self):
        return loaded([(x.numpy(), y) for x, y in batches()])

    def training_step(self, batch, batch_idx):
        batch[0][...] *= 2
        return self.loss(torch.from_numpy(batch[0]), batch[1])


class DoubledInTwoEpochs(DoubledInPlace):
    """A loader that hands out the same tensors in each epoch: the second finds them doubled, as in a plain fit."""

    epochs = 2

    def data(self):
        self.kept = batches()
        return loaded(self.kept)

    def trace(self):
        return [x for x, _ in self.kept]


@dataclasses.dataclass
class Pair:
    x: Tensor
    labels: Tensor | None


class TakenFromADataclass(Once):
    def data(self):
        return loaded([Pair(x, y) for x, y in batches()])

    def training_step(self, batch, batch_idx):
        labels, batch.labels = batch.labels, None
        batch.x.mul_(2)
        return self.loss(batch.x, labels)


class Named(NamedTuple):
    tensors: dict[str, Tensor]
    labels: list[Tensor]


class TakenFromANamedTuple(Once):
    def data(self):
        return loaded([Named({"x": x}, [y]) for x, y in batches()])

    def training_step(self, batch, batch_idx):
        return self.loss(batch.tensors.pop("x"), batch.labels.pop())


BATCH = [
    Popped, PoppedFromAList, PoppedInside, Filled, MaskedInPlace, NormalizedInPlace, DoubledInPlace, DoubledThroughData,
    DoubledByNumPy, ArrayDoubled, DoubledInTwoEpochs, TakenFromADataclass, TakenFromANamedTuple,
]  # fmt: skip


# --- random sources ----

SHARED = np.random.default_rng(7)


class Transform:
    def __init__(self):
        self.rng = np.random.default_rng(1)

    def __call__(self, x):
        return x + torch.from_numpy(self.rng.standard_normal(x.shape))


class HeldGenerators(Once):
    def prepare(self):
        self.new, self.old = np.random.default_rng(0), np.random.RandomState(0)
        self.python, self.torch, self.transform = random.Random(0), torch.Generator().manual_seed(0), Transform()
        self.bits = np.random.PCG64(3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        noise = self.new.random() + self.old.standard_normal() + self.python.gauss(0, 1)  # odd numbers of normal ones
        noise += np.random.Generator(self.bits).random()
        return self.loss(self.transform(x) + noise + torch.randn(x.shape, generator=self.torch), y)

    def trace(self):
        return [self.new.random(), self.old.standard_normal(), self.python.gauss(0, 1), self.bits.random_raw()]


class GlobalGenerator(Once):
    def prepare(self):
        global SHARED
        SHARED = np.random.default_rng(7)

    def training_step(self, batch, batch_idx):
        return self.loss(batch[0] + SHARED.random(), batch[1])

    def trace(self):
        return SHARED.random()


def closed_over() -> Once:
    rng = random.Random(3)

    class InAClosure(Once):
        def training_step(self, batch, batch_idx):
            return self.loss(batch[0] * rng.random(), batch[1])

        def trace(self):
            return rng.random()

    return InAClosure()


class GlobalStreams(Once):
    """Python's and NumPy's global streams, with the normal number that each keeps for the next call."""

    def prepare(self):
        random.seed(0)
        np.random.seed(0)

    def training_step(self, batch, batch_idx):
        noise = random.gauss(0, 1) + np.random.standard_normal()
        return self.loss(batch[0] + noise, batch[1])

    def trace(self):
        return random.gauss(0, 1), np.random.standard_normal()


class DropoutAndNoise(Once):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(F.dropout(x, 0.4) + torch.randn_like(x), y)


RANDOM = [HeldGenerators, GlobalGenerator, closed_over, GlobalStreams, DropoutAndNoise]


# --- iterators ----


class DrawsFromAnIterator(Once):
    def prepare(self):
        self.drawn = iter(range(100))
        self.generator = (i for i in range(100))

    def training_step(self, batch, batch_idx):
        factor = next(self.drawn) + next(self.generator)
        return self.loss(batch[0] * factor, batch[1])

    def trace(self):
        return next(self.drawn), next(self.generator), type(self.drawn).__name__


class DrawsFromASecondLoader(Once):
    """The usual way to go through unlabeled data beside labeled ones: start again at the end."""

    def prepare(self):
        self.unlabeled = torch.utils.data.DataLoader(torch.arange(6.0).double(), batch_size=2, shuffle=True)
        self.drawn = iter(self.unlabeled)

    def training_step(self, batch, batch_idx):
        try:
            more = next(self.drawn)
        except StopIteration:
            self.drawn = iter(self.unlabeled)
            more = next(self.drawn)
        return self.loss(batch[0] * more.mean(), batch[1])

    def trace(self):
        return next(self.drawn)


ITERATORS = [DrawsFromAnIterator, DrawsFromASecondLoader]
