"""Properties of rules in a fit that nothing else shows: weights of directions, records, streams, fingerprints."""

from __future__ import annotations

import itertools
import math
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from once_problems import CLASSES, FEATURES, Once, Seen, first_gradient, outcome, pairs
from problems import Problem, fitted, loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.core.directions import Directions
from lightning_bpfree.core.params import dot, norm
from lightning_bpfree.core.step import Estimate, Step
from lightning_bpfree.methods.evolution_strategy.search.snes import SNES
from lightning_bpfree.methods.forward_forward.negatives import hybrid_images
from lightning_bpfree.methods.lottery_ticket.masks import Masks
from lightning_bpfree.methods.lottery_ticket.rewinding import shuffled
from lightning_bpfree.training.record import Record
from lightning_bpfree.training.scalar_sync import _fingerprint


class Weights(pl.Callback):
    """Compares the first estimate with `sum_k a_k v_k`, for weights `a_k` from the slopes of backprop's gradient."""

    def __init__(self, weight) -> None:
        self.weight, self.error, self.plain = weight, None, None

    def setup(self, trainer, pl_module, stage) -> None:
        (self.rule,) = [callback for callback in trainer.callbacks if isinstance(callback, bpf.TrainingRule)]
        self.rule.observers.append(self)

    def due(self, trainer) -> bool:
        return True

    def observe(self, trainer, module, step, estimate) -> None:
        with torch.enable_grad():
            loss = step.loss(recorded=False)
            truth = torch.autograd.grad(loss, [slot.parameter for slot in step.trained])
        truth = {slot.name: grad for slot, grad in zip(step.trained, truth, strict=True)}
        directions = list(Directions(step.params, self.rule.num_directions, step.seed, "gaussian"))
        found = estimate.resolved()

        def error(weight) -> float:
            parts = [weight(float(dot(truth, v)), float(norm(v)) ** 2, v) for v in directions]
            return float(norm({n: found[n] - sum(a * v[n] for a, v in parts) for n in found}) / norm(found))

        self.error = error(lambda s, square, v: (self.weight(s, square, len(directions)), v))
        self.plain = error(lambda s, square, v: (s / len(directions), v))


@pytest.mark.parametrize("make", [bpf.ForwardGradient, bpf.ZerothOrder])
def test_normalized_directions_are_on_the_sphere(make):
    coordinates = FEATURES * CLASSES + CLASSES
    sigma = {"sigma": 1e-4} if make is bpf.ZerothOrder else {}
    seen = Weights(lambda slope, square, num: coordinates * slope / (num * square))
    fitted(Once(), pairs(), make(3, normalize=True, **sigma), seen, precision="64-true", max_steps=1)
    # Equal math in float64; central differences neglect O(sigma^2) of the slope.
    assert seen.error < (1e-6 if sigma else 1e-10)
    assert seen.plain > 1e-2  # without the norms it is another estimate


def test_utilities_with_a_temperature_are_a_softmax_over_ranks():
    temperature, num = 3.0, 5
    fitness = torch.tensor([0.3, -1.0, 7.0, 0.2, 100.0])  # losses: the ranks are 2, 0, 3, 1, 4
    parts = [math.exp(-temperature * (rank / (num - 1) - 0.5)) for rank in (2, 0, 3, 1, 4)]
    expected = torch.tensor([part / sum(parts) for part in parts], dtype=torch.float64)
    found = SNES(temperature=temperature).weights(fitness)
    for weights in found[:2]:
        torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0)  # float32
    sharper = SNES(temperature=2 * temperature).weights(fitness)[0]
    assert sharper.max() > found[0].max()


def test_snes_with_a_temperature_trains_otherwise():
    def weights(temperature):
        rule = bpf.EvolutionStrategy(SNES(temperature=temperature), population_size=8, seed=1)
        torch.manual_seed(0)
        module = Once()
        module.lr = 0.5
        fitted(module, pairs(), rule, precision="64-true")
        return module.net.weight.detach()

    assert not torch.equal(weights(1.0), weights(10.0))
    assert not torch.equal(weights(1.0), weights(None))


@pytest.mark.parametrize("space", ["weights", "activations"])
def test_heads_of_a_target_learn(space):
    local = bpf.LocalLoss(lr=0.1)
    rule = bpf.ForwardGradient(target=local, space=space, seed=1)
    torch.manual_seed(0)
    states = []

    class Keeps(pl.Callback):
        def on_train_batch_end(self, *_):
            (saved,) = rule.rule_state()["guided"]["target"].values()
            states.append({name: value.clone() for name, value in saved["module"].items()})

    fitted(Problem(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))), loader(), rule, Keeps())
    for before, after in itertools.pairwise(states):
        moved = [
            name for name in before if before[name].is_floating_point() and not torch.equal(before[name], after[name])
        ]
        assert moved
    assert len(states) == 4


class Noisy(Once):
    """Needs torch's stream in every step; its rows are all alike, in whichever order they come."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.1

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(x + torch.randn_like(x), y)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # on purpose
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")  # on purpose
@pytest.mark.parametrize("make", [lambda: bpf.ForwardGradient(2), lambda: bpf.ZerothOrder(2)])
def test_streams_go_on_within_an_epoch_behind_the_draw_of_the_loader(make, tmp_path):
    rows = TensorDataset(torch.ones(16, FEATURES), torch.ones(16, dtype=torch.long))

    def run(folder, **resume):
        torch.manual_seed(len(str(folder)))
        module = Noisy()
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1, save_on_train_epoch_end=False)
        data = DataLoader(rows, batch_size=4, shuffle=True)  # draws its order from torch's stream
        settings = {"enable_checkpointing": True, "max_epochs": 2, "default_root_dir": folder}
        fitted(module, data, make(), keep, **settings, **resume)
        return module.net.weight.detach()

    whole = run(tmp_path)
    again = run(tmp_path / "again", ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert torch.equal(whole, again)


class SpareNumbers(Once):
    """Draws an odd number of normal ones: NumPy and Python keep another for the next call."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(x * np.random.standard_normal() + random.gauss(0, 1), y)


def test_every_evaluation_has_the_same_spare_normal_number():
    def seeded():
        np.random.seed(1)
        np.random.standard_normal()  # one is kept, which the first evaluation uses up without drawing
        random.seed(1)
        random.gauss(0, 1)
        return SpareNumbers()

    exact = first_gradient(seeded, bpf.ForwardGradient(8, orthogonal=True, chunk_size=1))
    # As many orthonormal directions as coordinates: the gradient itself, up to the solution of a small linear system.
    torch.testing.assert_close(exact, first_gradient(seeded), rtol=1e-7, atol=1e-9)


def test_a_rule_that_evaluates_twice_records_once():
    class Twice(bpf.TrainingRule):
        def estimate(self, step: Step) -> Estimate:
            with torch.no_grad():
                first = step.loss()
                step.loss({name: value + 1 for name, value in step.params.items()})
                step.loss()
            return Estimate(first, {name: torch.zeros_like(value) for name, value in step.params.items()})

    class Counts(Once):
        def prepare(self):
            self.register_buffer("steps", torch.zeros(()))
            self.seen = []

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.steps += 1
            self.seen.append(float(loss.detach()))
            self.log("sum", loss, on_step=False, on_epoch=True, reduce_fx="sum")
            return loss

        def trace(self):
            return self.seen

    found, expected = outcome(Counts, Twice()), outcome(Counts)
    assert found["logged"] == expected["logged"]
    assert found["trace"] == expected["trace"]
    assert float(found["buffers"]["steps"]) == 4


@pytest.mark.parametrize("rule", ["zeroth_order", "forward"])
def test_what_other_evaluations_log_is_not_logged(rule):
    """A number of the evaluation itself, with a wide sigma: nothing cancels."""

    class Logs(Once):
        def training_step(self, batch, batch_idx):
            self.log("weight", self.net.weight.square().sum(), on_step=False, on_epoch=True, reduce_fx="max")
            return super().training_step(batch, batch_idx)

    scheme = {"scheme": "forward"} if rule == "forward" else {}
    found = outcome(Logs, bpf.ZerothOrder(2, sigma=1.0, **scheme))
    assert found["logged"] == outcome(Logs)["logged"]


def test_the_history_of_another_rule_is_carried_on():
    record, history = Record("ZerothOrder"), [{"rule": "ForwardGradient", "first_epoch": 0, "last_epoch": 3}]
    with pytest.warns(UserWarning, match="was trained by ForwardGradient"):
        record.check_origin({"rule": "ForwardGradient", "history": history}, strict=False)
    record.start_epoch(4, active=True)
    assert record.history == [*history, {"rule": "ZerothOrder", "first_epoch": 4, "last_epoch": 4}]
    assert history == [{"rule": "ForwardGradient", "first_epoch": 0, "last_epoch": 3}]  # the checkpoint's own stays


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_fingerprint_notices_places_signs_and_single_bits(dtype):
    torch.manual_seed(0)
    weight = torch.randn(4, 5, dtype=dtype)
    swapped, negated, nudged = weight.clone(), weight.clone(), weight.clone()
    swapped[0, 0], swapped[3, 4] = weight[3, 4], weight[0, 0]
    negated[2, 2] *= -1
    nudged.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])[1, 1] += 1
    rows = weight[[1, 0, 2, 3]]
    marks = [int(_fingerprint(each)) for each in (weight, swapped, negated, nudged, rows)]
    assert len(set(marks)) == len(marks)
    assert int(_fingerprint(weight.clone())) == marks[0]


def test_hybrids_are_made_of_two_images():
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 8, 8)  # every image has a number
    for seed in range(20):
        hybrids = hybrid_images(images, torch.Generator().manual_seed(seed), blurs=2)
        for own, hybrid in enumerate(hybrids):
            others = {float(value) for value in hybrid.unique()} - {float(own)}
            assert len(others) == 1, (seed, own)  # a mask that is all one has a probability below 2^-30


def test_masks_and_weights_of_equal_shape_go_into_different_orders():
    torch.manual_seed(0)
    masks = Masks({name: torch.arange(64) < 32 for name in ("one", "two")})
    moved = masks.permuted(3)
    assert not torch.equal(moved["one"], moved["two"])
    params = {name: torch.arange(64.0) for name in ("one", "two")}
    order = shuffled(params, masks, 3)
    assert not torch.equal(order["one"], order["two"])
    for name in params:
        assert int(moved[name].sum()) == 32
        assert torch.equal(order[name].sort().values, params[name])
        assert torch.equal(order[name][32:], params[name][32:])


def test_the_cosine_of_every_layer_is_its_own():
    """A rule that knows the gradient of the one layer, and turns the other's round."""

    class TurnsOne(bpf.TrainingRule):
        def estimate(self, step: Step) -> Estimate:
            loss = step.loss()
            grads = torch.autograd.grad(loss, [slot.parameter for slot in step.trained])
            turned = {slot.name: (-g if "0" in slot.name else g) for slot, g in zip(step.trained, grads, strict=True)}
            return Estimate(loss.detach(), turned)

    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    trainer = fitted(Problem(net), loader(), TurnsOne(), bpf.GradientAlignment(every_n_steps=1))
    found = {k.rpartition("/")[2]: float(v) for k, v in trainer.callback_metrics.items() if "cosine_to_backprop/" in k}
    assert found == {"net.0": pytest.approx(-1.0, abs=1e-5), "net.2": pytest.approx(1.0, abs=1e-5)}  # float32
    assert -1 < float(trainer.callback_metrics["bpfree/cosine_to_backprop"]) < 1


def test_ranks_draw_other_negatives(monkeypatch):
    from lightning_bpfree.methods.forward_forward import training_pass

    drawn: list[torch.Tensor] = []
    own = training_pass.wrong_labels

    def watched(*args):
        drawn.append(own(*args))
        return drawn[-1]

    monkeypatch.setattr(training_pass, "wrong_labels", watched)
    for rank in (0, 1):
        torch.manual_seed(0)
        monkeypatch.setattr(pl.Trainer, "global_rank", rank)
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        fitted(Problem(net), loader(), bpf.ForwardForward(seed=1), max_steps=1)
    half = len(drawn) // 2
    assert half
    assert not all(torch.equal(a, b) for a, b in zip(drawn[:half], drawn[half:], strict=True))


class OnlyTheBatch(Once):
    """A step that takes no index: it is called with what it asks for."""

    def prepare(self):
        self.got = []

    def training_step(self, batch):
        self.got.append(len(batch))
        return self.loss(*batch)

    def trace(self):
        return self.got


@pytest.mark.parametrize("make", [bpf.Backprop, lambda: bpf.ForwardGradient(2), lambda: bpf.ZerothOrder(2)])
def test_a_step_without_an_index_trains_as_in_a_plain_fit(make):
    found, expected = outcome(OnlyTheBatch, make()), outcome(OnlyTheBatch)
    assert found["trace"] == expected["trace"] == [2] * 4
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-10)  # equal math in float64


class SeveralLoaders(Once):
    """Takes the batches of two loaders, in a dict."""

    def data(self):
        from lightning.pytorch.utilities.combined_loader import CombinedLoader

        return CombinedLoader({"a": pairs(), "b": pairs()}, "max_size_cycle")

    def training_step(self, batch, batch_idx):
        self.log("index", float(batch_idx), on_step=False, on_epoch=True, reduce_fx="sum")
        return self.loss(*batch["a"]) + self.loss(*batch.pop("b")) / 2


@pytest.mark.parametrize("make", [bpf.Backprop, lambda: bpf.ForwardGradient(2), lambda: bpf.ZerothOrder(2)])
def test_several_loaders_train_as_in_a_plain_fit(make):
    found, expected = outcome(SeveralLoaders, make()), outcome(SeveralLoaders)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-10)  # equal math in float64
    assert found["logged"] == expected["logged"] == {"index": 6.0}
    exact = first_gradient(SeveralLoaders, bpf.ForwardGradient(8, orthogonal=True))
    torch.testing.assert_close(exact, first_gradient(SeveralLoaders), rtol=1e-7, atol=1e-9)  # a small linear system


def test_losses_reach_lightning_as_they_are():
    seen = Seen()
    fitted(Once(), pairs(), bpf.ZerothOrder(2), seen, precision="64-true")
    assert len(seen.losses) == 4
