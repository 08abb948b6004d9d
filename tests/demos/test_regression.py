"""Targets are those of the network that is documented; training inputs are new; rewards belong to their samples."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from problems import fitted
from torch import Tensor, nn

from lightning_bpfree.demos.modules import MLP
from lightning_bpfree.demos.regression import RandomNetDataModule, Regressor

# --- data ---


def test_targets_are_those_of_a_plain_loop() -> None:
    data = RandomNetDataModule(3, batch_size=40, batches_per_epoch=1)
    inner, outer = (weight.tolist() for weight in data.weights)
    x, y = next(iter(data.train_dataloader()))
    assert (x.shape, x.dtype) == ((40, 3), torch.float32)
    assert (y.shape, y.dtype) == ((40, 1), torch.float32)
    for inputs, (target,) in zip(x.tolist(), y.tolist(), strict=True):
        hidden = [max(0.0, sum(inputs[i] * inner[i][h] for i in range(3))) for h in range(8)]
        want = max(0.0, sum(hidden[h] * outer[h][0] for h in range(8)))
        assert target == pytest.approx(want, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_at_least_half_of_the_targets_are_positive(seed: int) -> None:
    _, y = RandomNetDataModule(target_seed=seed, eval_samples=20_000).dataset("val").tensors
    assert y.min() >= 0
    assert (y > 0).float().mean() > 0.5 - 4 * 0.5 * (1 / 20_000**0.5 + 1 / 4096**0.5)  # both are samples


def test_weights_fill_their_bounds_and_are_decided_by_their_seed() -> None:
    torch.manual_seed(1)
    first = RandomNetDataModule(8, target_seed=5).weights
    torch.manual_seed(2)
    assert all(map(torch.equal, first, RandomNetDataModule(8, eval_samples=3, target_seed=5).weights))
    assert not torch.equal(first[0], RandomNetDataModule(8, target_seed=6).weights[0])
    for width in (8, 100):
        for weight in RandomNetDataModule(width).weights:
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.5 * bound < weight.abs().max() <= bound


def test_inputs_are_standard_normal() -> None:
    x, _ = RandomNetDataModule(eval_samples=20_000).dataset("test").tensors
    assert x.mean(0).abs().max() < 4 / 20_000**0.5
    assert (x.T @ x / len(x) - torch.eye(8)).abs().max() < 4 * math.sqrt(2 / 20_000)  # the variance of a square is 2


def test_batches_are_new_in_each_epoch_and_decided_by_the_global_seed() -> None:
    data, runs = RandomNetDataModule(batch_size=4, batches_per_epoch=3), []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        loader = data.train_dataloader()
        runs.append(torch.stack([x for _ in range(2) for x, _ in loader]))
    assert torch.equal(runs[0], runs[1])
    val, test = (data.dataset(split).tensors[0] for split in ("val", "test"))  # type: ignore[arg-type]
    batches = [*runs[0], *runs[2], val[:4], test[:4]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(batches, 2))


def test_evaluation_is_the_same_in_every_run() -> None:
    torch.manual_seed(1)
    want = RandomNetDataModule(eval_samples=1500).dataset("val").tensors
    torch.manual_seed(2)
    batches = list(RandomNetDataModule(eval_samples=1500).val_dataloader())
    for got, tensor in zip(zip(*batches, strict=True), want, strict=True):
        assert torch.equal(torch.cat(got), tensor)


# --- the module ---


def test_reward_belongs_to_the_sample_of_its_row() -> None:
    y, action = torch.randn(3, 1), torch.randn(12, 1)
    want = [-float((action[m * 3 + b] - y[b]) ** 2) for m in range(4) for b in range(3)]
    got = Regressor(nn.Linear(1, 1)).reward((torch.zeros(3, 1), y), action)
    assert got.shape == (12,)
    assert got.tolist() == pytest.approx(want, rel=1e-5)


def test_the_mean_reward_of_the_outputs_is_minus_the_loss() -> None:
    data, model = RandomNetDataModule(eval_samples=2000), Regressor(MLP(8, [5], 1))
    run = fitted(model, data, max_epochs=0)
    for split in ("val", "test"):
        logged = (run.validate if split == "val" else run.test)(model, data, verbose=False)[0]
        assert set(logged) == {f"{split}_loss"}
        batch = data.dataset(split).tensors  # type: ignore[arg-type]
        with torch.no_grad():
            want = -model.reward(batch, model(batch[0])).mean()  # type: ignore[arg-type]
        assert logged[f"{split}_loss"] == pytest.approx(float(want), rel=1e-5)


def test_backprop_learns_it() -> None:
    model, data = Regressor(MLP(8, [32], 1), lr=0.01, optimizer="adam"), RandomNetDataModule(batches_per_epoch=300)
    run = fitted(model, data)
    _, y = data.dataset("val").tensors
    assert run.callback_metrics["val_loss"] < 0.2 * y.var()
    assert run.callback_metrics["train_loss"] > run.callback_metrics["val_loss"]


@pytest.mark.parametrize(("optimizer", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_optimizers(optimizer: Any, kind: type) -> None:
    made = Regressor(nn.Linear(8, 1), lr=0.5, optimizer=optimizer).configure_optimizers()
    assert type(made) is kind
    assert made.param_groups[0]["lr"] == 0.5


# --- bad input ---


def reward(*shape: int) -> Tensor:
    return Regressor(nn.Linear(8, 1)).reward((torch.zeros(3, 8), torch.zeros(3, 1)), torch.zeros(shape))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomNetDataModule(0), "in_features=0: give a whole number of at least 1"),
        (lambda: RandomNetDataModule(batch_size=0), "batch_size=0: give a whole number of at least 1"),
        (lambda: RandomNetDataModule(target_seed=-1), r"target_seed=-1: give a whole number in \[0"),
        (lambda: Regressor(nn.Linear(8, 1), lr=0.0), r"lr=0\.0: give a positive number"),
        (lambda: Regressor(nn.Linear(8, 1), optimizer="lion"), "optimizer='lion': choose 'sgd'"),  # type: ignore[arg-type]
        (
            lambda: reward(4, 1),
            r"action has shape \(4, 1\); for a batch of 3 samples give one number a row, and 3 rows",
        ),
        (lambda: reward(3), r"action has shape \(3,\)"),
        (lambda: reward(3, 2), r"action has shape \(3, 2\)"),
        (lambda: reward(0, 1), r"action has shape \(0, 1\)"),
        (
            lambda: Regressor(nn.Linear(8, 2)).training_step((torch.zeros(3, 8), torch.zeros(3, 1)), 0),
            r"net gives outputs of shape \(3, 2\) for targets of shape \(3, 1\); build it with an output of 1",
        ),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
