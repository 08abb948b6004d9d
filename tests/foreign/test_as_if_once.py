"""Evaluating a step several times looks, to the step and to all it touches, as if it had run once."""

from __future__ import annotations

import collections
import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.fabric.utilities.exceptions import MisconfigurationException
from once_problems import (
    BATCHES,
    CLASSES,
    FEATURES,
    RULES,
    Once,
    Seen,
    batches,
    difference,
    exact_rule,
    first_gradient,
    loaded,
    outcome,
    pairs,
    table,
)
from problems import fitted
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf

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
    """The usual way to go through unlabelled data beside labelled ones: start again at the end."""

    def prepare(self):
        self.unlabelled = torch.utils.data.DataLoader(torch.arange(6.0).double(), batch_size=2, shuffle=True)
        self.drawn = iter(self.unlabelled)

    def training_step(self, batch, batch_idx):
        try:
            more = next(self.drawn)
        except StopIteration:
            self.drawn = iter(self.unlabelled)
            more = next(self.drawn)
        return self.loss(batch[0] * more.mean(), batch[1])

    def trace(self):
        return next(self.drawn)


ITERATORS = [DrawsFromAnIterator, DrawsFromASecondLoader]

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

# --- the tests ----

CASES = [*BATCH, *CONTAINERS, *METRICS, *RANDOM, *TEACHERS, *ITERATORS, *BORN]
of_each = pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
PLAIN: dict[Callable[[], Once], dict[str, Any]] = {}


def plain(make: Callable[[], Once]) -> dict[str, Any]:
    if make not in PLAIN:
        PLAIN[make] = outcome(make, max_epochs=getattr(make, "epochs", 1))
    return PLAIN[make]


@pytest.mark.parametrize("rule", RULES)
@of_each
def test_all_is_left_behind_as_by_a_plain_fit(make, rule):
    found = outcome(make, RULES[rule](), max_epochs=getattr(make, "epochs", 1))
    assert not difference(found, plain(make))


@of_each
def test_measuring_the_alignment_leaves_no_trace(make):
    found = outcome(make, bpf.Backprop(), bpf.GradientAlignment(every_n_steps=1), max_epochs=getattr(make, "epochs", 1))
    assert not difference(found, plain(make))


@of_each
def test_every_evaluation_is_of_the_same_function(make):
    expected = first_gradient(make)
    found = first_gradient(make, exact_rule(make))
    # As many orthonormal directions as coordinates: the gradient itself, up to the solution of a small linear system.
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


# Finite differences see what no derivative sees: a loss that depends on the weights through a teacher, or a sum.
STOPPED = [*TEACHERS, HeldTensors]


@pytest.mark.parametrize("make", [make for make in CASES if make not in STOPPED], ids=lambda make: make.__name__)
def test_finite_differences_are_of_the_same_function(make):
    directions = {"num_directions": 2, "seed": 1}
    exact = first_gradient(make, bpf.ForwardGradient(**directions))
    found = first_gradient(make, bpf.ZerothOrder(**directions, sigma=1e-4))
    # Central differences: O(sigma^2) times a third derivative of a few units, and rounding of 1e-16 / sigma.
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


# --- parameters that are trained, and that the step changes itself ----------------------------------------------------


class NormalizesItsWeights(Once):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.net.weight.div_(self.net.weight.norm())
        return super().training_step(batch, batch_idx)


class ClampsItsWeights(Once):
    def training_step(self, batch, batch_idx):
        self.net.weight.data.clamp_(-0.1, 0.1)
        return super().training_step(batch, batch_idx)


class AssignsItsWeights(Once):
    def training_step(self, batch, batch_idx):
        self.net.weight.data = F.normalize(self.net.weight.data, dim=0)
        return super().training_step(batch, batch_idx)


class ReplacesItsWeights(Once):
    def training_step(self, batch, batch_idx):
        self.net.load_state_dict({key: 0.9 * value for key, value in self.net.state_dict().items()})
        return super().training_step(batch, batch_idx)


CHANGING = [NormalizesItsWeights, ClampsItsWeights, AssignsItsWeights, ReplacesItsWeights]


@pytest.mark.parametrize("rule", [name for name in RULES if name != "backprop"])
@pytest.mark.parametrize("make", CHANGING, ids=lambda make: make.__name__)
def test_weights_that_the_step_changes_are_refused_before_they_change(make, rule):
    module = make()
    before = module.net.weight.detach().clone()
    with pytest.raises(MisconfigurationException, match=r"net\.weight.*on_train_batch_start"):
        fitted(module, module.data(), RULES[rule](), precision="64-true")
    assert torch.equal(module.net.weight, before.double())


@pytest.mark.parametrize("make", CHANGING, ids=lambda make: make.__name__)
def test_backprop_lets_the_step_change_weights(make):
    assert not difference(outcome(make, bpf.Backprop()), outcome(make))


@pytest.mark.parametrize("rule", RULES)
def test_what_the_step_freezes_does_not_move(rule):
    class Freezes(Once):
        def prepare(self):
            self.lr, self.last = 0.1, nn.Linear(CLASSES, CLASSES)

        def training_step(self, batch, batch_idx):
            self.net.requires_grad_(False)
            return F.cross_entropy(self.last(self.net(batch[0])), batch[1])

    module = Freezes()
    first, last = (part.weight.detach().double() for part in (module.net, module.last))
    fitted(module, module.data(), RULES[rule](), precision="64-true")
    assert torch.equal(module.net.weight, first)
    assert not torch.equal(module.last.weight, last)
    assert not module.net.weight.requires_grad  # as the step has left it


@pytest.mark.parametrize("rule", RULES)
def test_what_the_step_thaws_moves(rule):
    class Thaws(Once):
        def prepare(self):
            self.lr, self.last = 0.1, nn.Linear(CLASSES, CLASSES).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            self.last.requires_grad_(batch_idx >= 2)
            return F.cross_entropy(self.last(self.net(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.lr)

    module, seen = Thaws(), []

    class Looks(pl.Callback):
        def on_train_batch_end(self, *_):
            seen.append(module.last.weight.detach().clone())

    fitted(module, module.data(), RULES[rule](), Looks(), precision="64-true")
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[2], seen[3])


# --- weights that the step reaches in other ways than through the module ----


class FromAList(Once):
    def prepare(self):
        self.penalized = list(self.net.parameters())

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + sum(p.square().sum() for p in self.penalized)


class FromADict(Once):
    """Calls its network by a dict that it has kept."""

    def prepare(self):
        self.weights = dict(self.net.named_parameters())

    def training_step(self, batch, batch_idx):
        logits = torch.func.functional_call(self.net, self.weights, (batch[0],))
        return F.cross_entropy(logits, batch[1]) + self.net.weight.square().sum()


class FromATuple(Once):
    def prepare(self):
        self.packed = (("weights", (self.net.weight, self.net.bias)), 1.0)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(F.linear(batch[0], *self.packed[0][1]), batch[1])


class FromAHelper(Once):
    def prepare(self):
        self.meter, self.slotted = Meter(), SlottedMeter()
        self.meter.weight, self.slotted.values = self.net.weight, [self.net.bias]

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(F.linear(batch[0], self.meter.weight, self.slotted.values[0]), batch[1])


class FromAnUnregisteredModule(Once):
    """A list holds a module that shares the weights."""

    def prepare(self):
        self.held = [nn.Linear(FEATURES, CLASSES)]
        self.held[0].weight, self.held[0].bias = self.net.weight, self.net.bias

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.held[0](batch[0]), batch[1])


class FromTheOptimizer(Once):
    def training_step(self, batch, batch_idx):
        groups = self.trainer.optimizers[0].param_groups
        penalty = sum(p.square().sum() for group in groups for p in group["params"])
        return super().training_step(batch, batch_idx) + penalty


class FromAModuleAttribute(Once):
    """Tied by hand: the attribute of another object, and a child that is there twice."""

    def prepare(self):
        self.same, self.net_again = Owner(self), self.net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net_again(batch[0]), batch[1]) + self.same.module.net.weight.square().sum()


ELSEWHERE = [
    FromAList, FromADict, FromATuple, FromAHelper, FromAnUnregisteredModule, FromTheOptimizer, FromAModuleAttribute,
]  # fmt: skip


@pytest.mark.parametrize("make", ELSEWHERE, ids=lambda make: make.__name__)
def test_weights_are_perturbed_wherever_the_step_takes_them_from(make):
    expected = first_gradient(make)
    # As many orthonormal directions as coordinates: the gradient itself, up to the solution of a small linear system.
    torch.testing.assert_close(first_gradient(make, exact_rule(make)), expected, rtol=1e-7, atol=1e-9)
    directions = {"num_directions": 2, "seed": 1}
    exact = first_gradient(make, bpf.ForwardGradient(**directions))
    found = first_gradient(make, bpf.ZerothOrder(**directions, sigma=1e-4))
    # Central differences: O(sigma^2) times a third derivative of a few units, and rounding of 1e-16 / sigma.
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", ELSEWHERE, ids=lambda make: make.__name__)
def test_what_holds_the_weights_holds_them_behind_the_fit(make, rule):
    torch.manual_seed(0)
    module = make()
    kept = module.net.weight, module.net.bias
    fitted(module, module.data(), RULES[rule](), precision="64-true")
    assert module.net.weight is kept[0]
    assert module.net.bias is kept[1]
    for holder in ("penalized", "weights", "packed", "held"):
        assert all(any(p is k for k in kept) for p in _parameters_in(getattr(module, holder, ()))), holder


def _parameters_in(value: Any) -> list[Any]:
    if isinstance(value, nn.Module):
        return list(value.parameters())
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [value] if isinstance(value, Tensor) else [p for item in items for p in _parameters_in(item)]


# --- parameters that are born during the fit ----


class Grows(Once):
    """Gets a second layer at the start of its second epoch, and tells the optimizer."""

    def prepare(self):
        self.lr, self.more = 0.1, None

    def grow(self):
        self.more = nn.Linear(CLASSES, CLASSES).double()
        self.trainer.optimizers[0].add_param_group({"params": list(self.more.parameters())})
        self.born = self.more.weight.detach().clone()

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.grow()

    def loss(self, x, y):
        logits = self.net(x)
        return F.cross_entropy(logits if self.more is None else self.more(logits), y)


class GrowsInASequential(Grows):
    def prepare(self):
        super().prepare()
        self.net = nn.Sequential(self.net)

    def grow(self):
        self.net.append(nn.Linear(CLASSES, CLASSES).double())
        self.more = None
        self.trainer.optimizers[0].add_param_group({"params": list(self.net[1].parameters())})
        self.born = self.net[1].weight.detach().clone()

    def newest(self):
        return self.net[1].weight


class Grown(Grows):
    """Grown by a callback."""

    def on_train_epoch_start(self):
        pass


class GrowsInTheStep(Grows):
    """Gets its second layer in the first step: a step later it trains."""

    def on_train_epoch_start(self):
        pass

    def training_step(self, batch, batch_idx):
        if self.more is None:
            self.grow()
        return super().training_step(batch, batch_idx)


class Growing(pl.Callback):
    def __init__(self, hook):
        setattr(self, hook, self.grow)

    def grow(self, trainer, pl_module, *_):
        if isinstance(pl_module, Grown) and pl_module.more is None:
            pl_module.grow()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [Grows, GrowsInASequential, GrowsInTheStep], ids=lambda make: make.__name__)
def test_what_is_born_during_the_fit_is_trained(make, rule):
    torch.manual_seed(0)
    module = make()
    trainer = fitted(module, module.data(), RULES[rule](), max_epochs=2, precision="64-true")
    newest = module.newest() if hasattr(module, "newest") else module.more.weight
    assert not torch.equal(newest, module.born)
    assert len(trainer.optimizers[0].param_groups) == 2


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start", "on_train_start"])
@pytest.mark.parametrize("rule", RULES)
def test_what_callbacks_bring_is_trained(rule, hook, first):
    torch.manual_seed(0)
    module, grows, made = Grown(), Growing(hook), RULES[rule]()
    fitted(module, module.data(), *([grows, made] if first else [made, grows]), precision="64-true")
    assert not torch.equal(module.more.weight, module.born)


def test_the_gradient_of_what_is_born_is_exact():
    class GrowsAtOnce(Grows):
        def prepare(self):
            super().prepare()
            self.lr = 0.0

        def on_train_epoch_start(self):
            self.grow()

    torch.testing.assert_close(
        first_gradient(GrowsAtOnce, bpf.ForwardGradient(14, orthogonal=True)),  # 8 coordinates, and 6 of the new layer
        first_gradient(GrowsAtOnce),
        rtol=1e-7,
        atol=1e-9,
    )


# --- what transformers remembers on a module ----


class HiddenStates(Once):
    """Averages all hidden states, as probes and distillation do, and counts them."""

    def prepare(self):
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = BertConfig(vocab_size=20, max_position_embeddings=8, attn_implementation="eager", **sizes)
        self.bert, self.net, self.counts = BertModel(config), nn.Linear(8, CLASSES), []

    def data(self):
        return DataLoader(TensorDataset(torch.arange(64).reshape(16, 4) % 20, table()[1]), batch_size=4)

    def hidden(self, ids):
        return self.bert(input_ids=ids, output_hidden_states=True, output_attentions=True)

    def training_step(self, batch, batch_idx):
        output = self.hidden(batch[0])
        self.counts.append((len(output.hidden_states), len(output.attentions)))
        return F.cross_entropy(self.net(torch.stack(output.hidden_states).mean((0, 2))), batch[1])

    def trace(self):
        output = self.hidden(torch.ones(1, 4, dtype=torch.long))
        return [*self.counts, (len(output.hidden_states), len(output.attentions))]


@pytest.mark.parametrize("rule", RULES)
def test_transformers_returns_as_many_hidden_states_as_there_are(rule):
    found = outcome(HiddenStates, RULES[rule](), bpf.GradientAlignment(every_n_steps=2))
    assert found["trace"] == [(3, 2)] * (BATCHES + 1)


# --- what the datamodule holds ----


class Noisy(pl.LightningDataModule):
    """Adds noise on the device, in a hook that the step calls again."""

    def __init__(self):
        super().__init__()
        self.rng, self.calls = np.random.default_rng(3), []

    def train_dataloader(self):
        return pairs()

    def noisy(self, x):
        self.calls.append(len(x))
        return x + torch.from_numpy(self.rng.standard_normal(x.shape))


class FromTheDatamodule(Once):
    def data(self):
        return Noisy()

    def training_step(self, batch, batch_idx):
        return self.loss(self.trainer.datamodule.noisy(batch[0]), batch[1])


@pytest.mark.parametrize("rule", RULES)
def test_what_the_datamodule_holds_moves_once(rule):
    def run(*callbacks):
        torch.manual_seed(0)
        module, data, seen = FromTheDatamodule(), Noisy(), Seen()
        fitted(module, data, *callbacks, seen, precision="64-true")
        return data.calls, data.rng.random(), seen.losses

    assert not difference(run(RULES[rule]()), run())
