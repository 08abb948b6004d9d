"""A corruption changes the training samples that it says, in the share that it says, and nothing else anywhere."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_bpfree.demos.corruption import CORRUPTIONS, Corruption, Pixels
from lightning_bpfree.demos.data import DigitsDataModule, MNIST1DDataModule

PIXELS = Pixels(black=-1.0, white=3.0, mean=0.5)
NAMES = [name for name in CORRUPTIONS if name != "none"]


def clean(n: int = 300, height: int = 8) -> tuple[Tensor, Tensor]:
    """Images of which no pixel is black, and labels."""
    generator = torch.Generator().manual_seed(0)
    return 1 + torch.rand(n, 1, height, 6, generator=generator), torch.arange(n) % 10


def applied(corruption: Corruption, n: int = 300, height: int = 8) -> tuple[Tensor, Tensor]:
    return corruption.apply(*clean(n, height), 10, PIXELS)


def changed(images: Tensor) -> Tensor:
    """Which of the images are not the clean ones; the pixels of none of them."""
    before, _ = clean(len(images), images.shape[2])
    return (images != before).flatten(1).any(1)


def ready(**kwargs: Any) -> DigitsDataModule:
    data = DigitsDataModule(**kwargs)
    data.setup()
    return data


# ---------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 1.0])
def test_gaussian_noise_is_on_its_share_and_of_its_size(share: float) -> None:
    images, labels = applied(Corruption(gaussian=share, noise_std=0.25))
    noisy = changed(images)
    assert int(noisy.sum()) == round(300 * share)
    assert torch.equal(labels, clean()[1])
    if share == 1:
        noise = (images - clean()[0]).flatten()
        assert float(noise.std()) == pytest.approx(0.25 * 4, rel=0.02)  # of the range of the pixels
        assert float(noise.mean()) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("height", [2, 8, 28])
def test_missing_rows_are_black_at_the_bottom_and_never_all(height: int) -> None:
    images, labels = applied(Corruption(missing_rows=1.0), height=height)
    black = (images == PIXELS.black).all(dim=3)[:, 0]
    rows = black.sum(1)
    assert set(rows.tolist()) == set(range(1, height))  # as in the paper: 1 to 27 of 28
    assert all(bool(image[height - n :].all()) for image, n in zip(black, rows.tolist(), strict=True))
    assert torch.equal(images[:, 0][~black], clean(height=height)[0][:, 0][~black])
    assert torch.equal(labels, clean()[1])


@pytest.mark.parametrize(("share", "rows"), [(0.01, 1), (0.25, 2), (0.5, 4), (0.99, 7)])
def test_a_share_of_the_height_is_missing_from_each(share: float, rows: int) -> None:
    images, _ = applied(Corruption(missing_rows=0.5, missing_height=share))
    counts = (images == PIXELS.black).all(dim=3)[:, 0].sum(1)
    assert counts.bincount().tolist() == [150, *[0] * (rows - 1), 150]


def test_random_images_come_last_with_labels_of_all_classes() -> None:
    images, labels = applied(Corruption(random_images=1.0, noise_std=0.5), n=500)
    assert (len(images), len(labels), labels.dtype) == (1000, 1000, torch.int64)
    assert not changed(images[:500]).any()
    assert torch.equal(labels[:500], clean(500)[1])
    assert float(images[500:].mean()) == pytest.approx(PIXELS.mean, abs=0.05)
    assert float(images[500:].std()) == pytest.approx(0.5 * 4, rel=0.02)
    assert labels[500:].bincount(minlength=10).min() > 25


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_label_noise_never_keeps_a_label_and_is_even(share: float) -> None:
    images, labels = applied(Corruption(random_labels=share), n=9000)
    before = clean(9000)[1]
    assert int((labels != before).sum()) == 9000 * share
    assert not changed(images).any()
    further = ((labels - before) % 10).bincount(minlength=10)[1:]
    assert further.min() > 0.8 * 1000 * share
    assert set(labels.tolist()) == set(range(10))


def test_the_papers_combination() -> None:
    images, labels = applied(CORRUPTIONS["paper"], n=600)
    black = (images[:600] == PIXELS.black).flatten(1).any(1)
    assert (len(images), int(black.sum()), int(changed(images[:600]).sum())) == (800, 200, 400)
    assert torch.equal(labels[:600], clean(600)[1])


def test_shares_of_halves_are_disjoint_though_both_are_rounded_up() -> None:
    images, _ = applied(Corruption(gaussian=0.5, missing_rows=0.5), n=3)
    assert (images[:, 0, -1] == PIXELS.black).all(1).tolist().count(True) == 1


def test_a_larger_share_has_the_smaller_one_in_it_and_parts_do_not_meddle() -> None:
    few, many = applied(Corruption(gaussian=0.1, random_labels=0.1)), applied(Corruption(gaussian=0.4, random_labels=1))
    assert torch.equal(few[0][changed(few[0])], many[0][changed(few[0])])
    wrong = few[1] != clean()[1]
    assert torch.equal(few[1][wrong], many[1][wrong])
    alone = applied(Corruption(random_labels=0.1))
    assert torch.equal(alone[1], few[1])


# ---------------------------------------------------------------------------------------------- in a data module


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flatten", [False, True])
def test_validation_and_test_stay_clean_bit_for_bit(name: Any, flatten: bool) -> None:
    plain, corrupted = ready(flatten=flatten), ready(flatten=flatten, corruption=name)
    assert (plain.mean, plain.std) == (corrupted.mean, corrupted.std)
    for split in ("val", "test"):
        pairs = zip(plain.dataset(split).tensors, corrupted.dataset(split).tensors, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    x, y = corrupted.dataset("train").tensors
    assert x.shape[1:] == ((64,) if flatten else (1, 8, 8))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    before = plain.dataset("train").tensors
    n = len(before[1])
    assert len(y) == n + round(n / 3) * (name in ("random_images", "paper"))
    third = {"gaussian": 1, "missing_rows": 1, "paper": 2}.get(name, 0)
    different = (x[:n] != before[0]).flatten(1).any(1)
    assert third * round(n / 3) - 5 <= int(different.sum()) <= third * round(n / 3)  # rows may have been black already
    assert int((y[:n] != before[1]).sum()) == round(n / 3) * (name == "random_labels")


@pytest.mark.parametrize("nothing", [None, "none", Corruption()])
def test_no_corruption_is_none_by_any_name(nothing: Any) -> None:
    for a, b in zip(ready().dataset("train").tensors, ready(corruption=nothing).dataset("train").tensors, strict=True):
        assert torch.equal(a, b)


def test_missing_rows_of_digits_are_black() -> None:
    data = ready(corruption=Corruption(missing_rows=1.0))
    x = data.dataset("train").tensors[0] * data.std + data.mean
    torch.testing.assert_close(x[:, :, -1], torch.zeros_like(x[:, :, -1]), atol=1e-5, rtol=0)


def test_its_seed_decides_and_neither_global_generators_nor_batches_do() -> None:
    tensors = []
    for seed, batch_size in ((1, 64), (2, 7)):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = (torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate())
        data = ready(corruption="paper", batch_size=batch_size)
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_equal(np.random.get_state(legacy=False), before[1])
        assert random.getstate() == before[2]
        tensors.append(data.dataset("train").tensors)
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    paper = CORRUPTIONS["paper"]
    other = Corruption(paper.gaussian, paper.missing_rows, paper.random_images, seed=1)
    assert not torch.equal(ready(corruption=other).dataset("train").tensors[0], tensors[0][0])


def test_shares_are_of_the_samples_in_use_and_added_images_make_batches() -> None:
    data = ready(corruption="random_images", train_size=30, batch_size=40, drop_last=True)
    assert [len(y) for _, y in data.train_dataloader()] == [40]
    with pytest.raises(ValueError, match="batch_size is 41"):
        ready(corruption="random_images", train_size=30, batch_size=41, drop_last=True)


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "kwargs",
    [
        {"gaussian": -0.1},
        {"missing_rows": 1.1},
        {"random_images": math.nan},
        {"random_labels": 2},
        {"gaussian": 0.6, "missing_rows": 0.6},
        {"noise_std": -1.0},
        {"noise_std": math.inf},
        {"missing_height": 0.0},
        {"missing_height": 1.0},
        {"seed": -1},
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_the_cure(kwargs: dict[str, Any]) -> None:
    name, value = next(iter(kwargs.items()))
    with pytest.raises(ValueError, match=rf"{name}(=| is ){value}.*(give|choose)"):
        Corruption(**kwargs)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"corruption='noise': give 'none', 'gaussian'"):
        DigitsDataModule(corruption="noise")  # type: ignore[arg-type]


def test_one_row_cannot_lose_rows() -> None:
    with pytest.raises(ValueError, match=r"^missing_rows is 0\.3.*one row.*give 0"):
        MNIST1DDataModule(num_samples=100, corruption="missing_rows").setup()
