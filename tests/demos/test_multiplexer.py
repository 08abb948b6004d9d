"""Labels are those of a plain loop; training inputs are new, evaluation is fixed; the reward is what a policy earns."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from problems import fitted
from torch import Tensor, nn

from lightning_bpfree.demos.fresh import FreshDataModule
from lightning_bpfree.demos.modules import MLP
from lightning_bpfree.demos.multiplexer import MultiplexerDataModule, PolicyClassifier
from lightning_bpfree.methods.backprop.rule import Backprop


def by_hand(x: Tensor, k: int) -> list[int]:
    labels = []
    for row in x.tolist():
        address = 0
        for bit in row[:k]:
            address = 2 * address + (1 if bit > 0 else 0)
        labels.append(1 if row[k + address] > 0 else 0)
    return labels


def policy(k: int = 2, **settings: Any) -> PolicyClassifier:
    return PolicyClassifier(MLP(k + 2**k, [16], 2), num_classes=2, **settings)


# --- labels ---


@pytest.mark.parametrize("k", [1, 2, 3])
def test_labels_are_those_of_a_plain_loop(k: int) -> None:
    data = MultiplexerDataModule(k, batch_size=50, batches_per_epoch=3)
    for x, y in data.train_dataloader():
        assert (x.shape, x.dtype) == ((50, k + 2**k), torch.float32)
        assert (y.shape, y.dtype) == ((50,), torch.int64)
        assert set(x.unique().tolist()) == {-1.0, 1.0}
        assert y.tolist() == by_hand(x, k)
        assert torch.equal(data.label(x), y)
    x, y = data.dataset("val").tensors
    assert y.tolist() == by_hand(x, k)


def test_a_label_by_hand() -> None:
    data = MultiplexerDataModule(2)
    assert (data.num_features, data.num_classes) == (6, 2)
    zeros = torch.full((4, 6), -1.0)
    zeros[:, :2] = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])  # addresses 0, 1, 2, 3
    zeros[1, 2 + 1] = 1.0
    zeros[2, 2 + 1] = 1.0  # 2 points elsewhere; it would not if its bits were read the other way round
    assert data.label(zeros).tolist() == [0, 1, 0, 0]


def test_bits_are_uniform_and_independent() -> None:
    x, y = next(iter(MultiplexerDataModule(2, batch_size=20_000).train_dataloader()))
    # means over n fair bits of -1 and +1 have a standard error of 1 / sqrt(n); so have those of products of two
    bound = 4 / 20_000**0.5
    assert x.mean(0).abs().max() < bound
    assert ((x.T @ x / len(x)) - torch.eye(6)).abs().max() < bound
    assert abs(2 * y.float().mean() - 1) < bound


# --- batches ---


def epochs(data: FreshDataModule, seed: int, num: int = 2) -> list[Tensor]:
    torch.manual_seed(seed)
    loader = data.train_dataloader()
    return [torch.stack([x for x, _ in loader]) for _ in range(num)]


def test_batches_are_new_in_each_epoch_and_decided_by_the_global_seed() -> None:
    data = MultiplexerDataModule(4, batch_size=8, batches_per_epoch=3)
    first, again, other = epochs(data, 7), epochs(data, 7), epochs(data, 8)
    assert torch.equal(torch.stack(first), torch.stack(again))
    batches = [*first[0], *first[1], *other[0], *other[1], data.dataset("val")[:8][0], data.dataset("test")[:8][0]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(batches, 2))


def test_the_loader_makes_as_many_batches_as_it_says() -> None:
    loader = MultiplexerDataModule(1, batch_size=7, batches_per_epoch=11).train_dataloader()
    assert len(loader) == 11
    assert [len(x) for x, _ in loader] == [7] * 11


def test_ranks_share_out_the_batches_of_an_epoch() -> None:
    loader, drawn = MultiplexerDataModule(4, batch_size=8, batches_per_epoch=6).train_dataloader(), []
    for rank in (0, 1):  # as Lightning does on two devices, whose global generators are equal
        torch.manual_seed(7)
        drawn.append(list(DistributedSamplerWrapper(loader.sampler, num_replicas=2, rank=rank)))
    torch.manual_seed(7)
    assert sorted(drawn[0] + drawn[1]) == sorted(loader.sampler)
    assert len(set(drawn[0]) | set(drawn[1])) == 6
    assert not torch.equal(loader.dataset[drawn[0][0]][0], loader.dataset[drawn[1][0]][0])


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_has_all_inputs_where_these_are_few(k: int, split: Any) -> None:
    bits = k + 2**k
    x, _ = MultiplexerDataModule(k, eval_samples=2**bits).dataset(split).tensors
    assert [tuple(row) for row in x.tolist()] == list(itertools.product((-1.0, 1.0), repeat=bits))


@pytest.mark.parametrize(("k", "num"), [(2, 63), (4, 500), (5, 4096)])
def test_evaluation_has_fixed_random_inputs_otherwise(k: int, num: int) -> None:
    torch.manual_seed(1)
    val, test = (MultiplexerDataModule(k, eval_samples=num).dataset(split).tensors for split in ("val", "test"))
    assert val[0].shape == test[0].shape == (num, k + 2**k)
    assert not torch.equal(val[0], test[0])
    torch.manual_seed(2)
    data = MultiplexerDataModule(k, eval_samples=num)
    for loader, want in ((data.val_dataloader(), val), (data.test_dataloader(), test)):
        for got, tensor in zip(zip(*loader, strict=True), want, strict=True):
            assert torch.equal(torch.cat(got), tensor)


def test_the_evaluation_set_stays_what_it_is() -> None:
    # the Mersenne Twister's first words for the seeds 0 and 1: a bit is the lowest of a byte, the low byte comes first
    for split, words in (("val", (0x8C7F0AAC, 0x97C4AA2F, 0xB716A675)), ("test", (0x6AC1F425, 0xFF4780EB, 0xB8672F8C))):
        x, _ = MultiplexerDataModule(4, eval_samples=1).dataset(split).tensors  # type: ignore[arg-type]
        assert x[0, :12].tolist() == [1.0 if word >> 8 * byte & 1 else -1.0 for word in words for byte in range(4)]


# --- the policy ---


def test_expected_reward_is_that_of_all_actions_weighed_by_their_probabilities() -> None:
    logits, labels = torch.randn(20, 3), torch.randint(3, (20,))
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    rewards = torch.tensor([[1.0 if action == label else -1.0 for action in range(3)] for label in labels.tolist()])
    want = (probabilities * rewards).sum(1)
    torch.testing.assert_close(PolicyClassifier.expected_reward(logits, labels), want, rtol=1e-5, atol=1e-6)


def test_expected_reward_of_certain_policies() -> None:
    logits = torch.tensor([[100.0, 0.0], [100.0, 0.0], [0.0, 0.0]])
    assert PolicyClassifier.expected_reward(logits, torch.tensor([0, 1, 1])).tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("split", ["val", "test"])
def test_logged_reward_is_the_mean_over_all_samples(split: Any) -> None:
    data, model = MultiplexerDataModule(3), policy(3)  # 2,048 samples in two batches
    run = fitted(model, data, max_epochs=0)
    logged = (run.validate if split == "val" else run.test)(model, data, verbose=False)[0]
    assert set(logged) == {f"{split}_loss", f"{split}_acc", f"{split}_reward"}
    x, y = data.dataset(split).tensors
    with torch.no_grad():
        want = PolicyClassifier.expected_reward(model(x), y).mean()
    assert logged[f"{split}_reward"] == pytest.approx(float(want), rel=1e-5, abs=1e-6)


def test_backprop_learns_it() -> None:
    model = policy(2, lr=0.01, optimizer="adam")
    run = fitted(model, MultiplexerDataModule(2, batches_per_epoch=300))
    assert run.callback_metrics["val_acc"] == 1
    assert run.callback_metrics["val_reward"] > 0.8
    assert 0 < run.callback_metrics["train_reward"] < run.callback_metrics["val_reward"]


def test_a_run_resumed_after_an_epoch_meets_the_same_batches(tmp_path: Path) -> None:
    def run(**settings: Any) -> PolicyClassifier:
        seed_everything(3, verbose=False)
        model = policy()
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        data = MultiplexerDataModule(2, batch_size=4, batches_per_epoch=5)
        fitted(model, data, Backprop(), saving, max_epochs=3, enable_checkpointing=True, **settings)
        return model

    whole = run()
    resumed = run(ckpt_path=tmp_path / "epoch=1.ckpt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


# --- bad input ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiplexerDataModule(0), r"k=0: give a whole number in \[1"),
        (lambda: MultiplexerDataModule(13), r"k=13: give a whole number in \[1"),
        (lambda: MultiplexerDataModule(batch_size=0), "batch_size=0: give a whole number of at least 1"),
        (lambda: MultiplexerDataModule(batches_per_epoch=0), "batches_per_epoch=0: give a whole number of at least 1"),
        (lambda: MultiplexerDataModule(eval_samples=0), "eval_samples=0: give a whole number of at least 1"),
        (
            lambda: MultiplexerDataModule(2).label(torch.zeros(3, 11)),
            r"inputs have shape \(3, 11\); with k=2, give \('B', 6\)",
        ),
        (lambda: PolicyClassifier(nn.Linear(6, 2), num_classes=1), "num_classes=1: give a whole number of at least 2"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
