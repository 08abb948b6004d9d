"""The data modules split, standardize and batch as they say."""

from __future__ import annotations

import math
import pickle
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from data_problems import ready
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data.distributed import DistributedSampler

from lightning_bpfree.demos.data import DigitsDataModule, MNIST1DDataModule
from lightning_bpfree.demos.in_memory import InMemoryDataModule, stratified_split
from lightning_bpfree.demos.loading.split_loaders import BatchDataset, pass_through


class NumberedDataModule(InMemoryDataModule):
    """200 training and 20 test samples, each of which can be recognized; test values are on another scale."""

    in_shape = (1, 1, 2)

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, test_x = torch.arange(400.0).reshape(200, 2), 1e4 + torch.arange(40.0).reshape(20, 2)
        return x, torch.arange(200) % 10, test_x, torch.arange(20) % 10


def numbers(data: InMemoryDataModule, split: Any) -> list[int]:
    """Which samples of NumberedDataModule a split holds, in order."""
    first = data.dataset(split).tensors[0].flatten(1)[:, 0].double()
    return [round(float(value) / 2) for value in first * data.std + data.mean]


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_stratified_split_parts_make_up_the_whole_and_each_class_gives_its_share(seed: int, fraction: float) -> None:
    labels = torch.cat([torch.zeros(100), torch.ones(40), torch.full((20,), 2)]).long()
    rest, part = stratified_split(labels, fraction, seed)
    assert sorted([*rest.tolist(), *part.tolist()]) == list(range(160))
    assert labels[part].bincount().tolist() == [100 * fraction, 40 * fraction, 20 * fraction]
    assert rest.tolist() != sorted(rest.tolist())


def test_training_and_validation_are_disjoint_and_complete() -> None:
    data = ready(NumberedDataModule)
    train, val = numbers(data, "train"), numbers(data, "val")
    assert sorted(train + val) == list(range(200))
    assert len(val) == 20


def test_splits_depend_on_the_seed_only() -> None:
    base = ready(NumberedDataModule)
    again = ready(NumberedDataModule, batch_size=7, num_workers=0, drop_last=True, flatten=True)
    other = ready(NumberedDataModule, seed=1)
    for split in ("train", "val", "test"):
        assert numbers(again, split) == numbers(base, split)
    assert sorted(numbers(other, "val")) != sorted(numbers(base, "val"))
    assert numbers(other, "test") == numbers(base, "test")


@pytest.mark.parametrize("kind", [DigitsDataModule, lambda: MNIST1DDataModule(num_samples=100, data_seed=3)])
def test_global_generators_neither_matter_nor_move(kind: Callable[[], InMemoryDataModule]) -> None:
    from lightning_bpfree.demos import data as module

    tensors = []
    for seed in (1, 2):
        module._make_mnist1d.cache_clear()
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = (torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate())
        data = ready(kind)
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_equal(np.random.get_state(legacy=False), before[1])
        assert random.getstate() == before[2]
        tensors.append([t for split in ("train", "val", "test") for t in data.dataset(split).tensors])
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def test_train_size_takes_the_first_of_the_shuffled_split_and_leaves_validation_alone() -> None:
    full, part = ready(NumberedDataModule), ready(NumberedDataModule, train_size=17)
    assert numbers(part, "train") == numbers(full, "train")[:17]
    assert numbers(part, "val") == numbers(full, "val")


@pytest.mark.parametrize("train_size", [None, 50])
def test_standardised_by_the_training_samples_in_use_only(train_size: int | None) -> None:
    data = ready(NumberedDataModule, train_size=train_size)
    x = data.dataset("train").tensors[0]
    torch.testing.assert_close(
        (x.mean(), x.std(correction=0)), (torch.tensor(0.0), torch.tensor(1.0)), atol=1e-5, rtol=0
    )
    raw = torch.tensor([[2.0 * i, 2.0 * i + 1] for i in numbers(data, "train")])
    assert data.mean == pytest.approx(float(raw.mean()))
    assert data.std == pytest.approx(float(raw.std(correction=0)))
    _, _, test_x, _ = data.load()
    torch.testing.assert_close(data.dataset("test").tensors[0].flatten(1), (test_x - data.mean) / data.std)


def test_setup_twice_keeps_the_data() -> None:
    data = ready(NumberedDataModule)
    x = data.dataset("train").tensors[0]
    data.setup("test")
    assert data.dataset("train").tensors[0] is x


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_equal_samples_collated_one_by_one() -> None:
    dataset = ready(NumberedDataModule).dataset("train")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    loader = DataLoader(dataset, batch_size=32, sampler=order, collate_fn=pass_through)
    for i, (x, y) in enumerate(loader):
        want_x, want_y = default_collate([dataset[j] for j in order[32 * i : 32 * (i + 1)]])
        assert torch.equal(x, want_x)
        assert torch.equal(y, want_y)
    assert i == 5


def test_training_loader_shuffles_each_epoch_and_gives_every_sample_once() -> None:
    loader = ready(NumberedDataModule, batch_size=32).train_dataloader()
    epochs = [torch.cat([x.flatten(1)[:, 0] for x, _ in loader]) for _ in range(2)]
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)
    assert len(epochs[0].unique()) == 180  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_loaders_keep_the_order(split: str) -> None:
    data = ready(NumberedDataModule, batch_size=7, drop_last=True)
    loader = getattr(data, f"{split}_dataloader")()
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert torch.equal(x, data.dataset(split).tensors[0])  # type: ignore[arg-type]
    assert torch.equal(y, data.dataset(split).tensors[1])  # type: ignore[arg-type]


def test_drop_last_drops_in_training_only() -> None:
    data = ready(NumberedDataModule, batch_size=50, drop_last=True)
    assert [len(y) for _, y in data.train_dataloader()] == [50, 50, 50]
    assert [len(y) for _, y in ready(NumberedDataModule, batch_size=50).train_dataloader()] == [50, 50, 50, 30]


def test_works_with_a_distributed_sampler_in_place_of_its_own() -> None:
    data = ready(NumberedDataModule)
    loader, seen = data.train_dataloader(), []
    for rank in range(2):
        sampler: DistributedSampler[Any] = DistributedSampler(
            data.dataset("train"), num_replicas=2, rank=rank, shuffle=True
        )
        replaced = DataLoader(loader.dataset, loader.batch_size, sampler=sampler, collate_fn=loader.collate_fn)
        seen.append({float(v) for x, _ in replaced for v in x.flatten(1)[:, 0]})
    assert len(seen[0]) == len(seen[1]) == 90
    assert not seen[0] & seen[1]


def test_dataset_and_collation_can_be_pickled() -> None:
    loader = ready(NumberedDataModule).val_dataloader()
    dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    assert collate is pass_through
    assert isinstance(dataset, BatchDataset)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [(DigitsDataModule, (1295, 143, 359)), (lambda **k: MNIST1DDataModule(num_samples=500, **k), (361, 39, 100))],
)
def test_shapes_types_and_sizes(kind: Callable[..., InMemoryDataModule], sizes: tuple[int, ...]) -> None:
    for flatten in (False, True):
        data = kind(flatten=flatten)
        assert (data.num_classes, data.num_features) == (10, math.prod(data.in_shape))
        data.setup()
        for split, size in zip(("train", "val", "test"), sizes, strict=True):
            x, y = data.dataset(split).tensors  # type: ignore[arg-type]
            assert x.shape == (size, *((data.num_features,) if flatten else data.in_shape))
            assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
            assert set(y.tolist()) == set(range(10))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        (NumberedDataModule, {"batch_size": 0}),
        (NumberedDataModule, {"val_fraction": 0.0}),
        (NumberedDataModule, {"val_fraction": 1.0}),
        (NumberedDataModule, {"val_fraction": math.nan}),
        (NumberedDataModule, {"train_size": 0}),
        (NumberedDataModule, {"num_workers": -1}),
        (NumberedDataModule, {"train_size": 181}),
        (NumberedDataModule, {"val_fraction": 0.001}),
        (NumberedDataModule, {"val_fraction": 0.999}),
        (NumberedDataModule, {"batch_size": 181, "drop_last": True}),
        (MNIST1DDataModule, {"num_samples": 1234}),
        (MNIST1DDataModule, {"num_samples": 0}),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_the_cure(kind: Any, kwargs: dict[str, Any]) -> None:
    name, value = next(iter(kwargs.items()))
    with pytest.raises(ValueError, match=rf"{name}(=| is ){value}.*(give|choose)"):
        ready(kind, **kwargs)


def test_reading_before_setup_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"setup\(\)"):
        DigitsDataModule().train_dataloader()


@pytest.mark.parametrize(("package", "kind"), [("sklearn", DigitsDataModule), ("mnist1d", MNIST1DDataModule)])
def test_a_missing_package_names_the_extra(package: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_bpfree.demos import data as module

    module._make_mnist1d.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-bpfree\[recipes\]"'):
        kind().setup()
