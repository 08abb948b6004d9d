"""The data modules split, standardise and batch as they say; IDX files are refused unless they are sound."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import pickle
import random
import struct
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data.distributed import DistributedSampler

from lightning_bpfree.demos import idx
from lightning_bpfree.demos.data import DigitsDataModule, FashionMNISTDataModule, MNIST1DDataModule, MNISTDataModule
from lightning_bpfree.demos.in_memory import BatchDataset, InMemoryDataModule, pass_through, stratified_split

FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


class NumberedDataModule(InMemoryDataModule):
    """200 training and 20 test samples, each of which can be recognised; test values are on another scale."""

    in_shape = (1, 1, 2)

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, test_x = torch.arange(400.0).reshape(200, 2), 1e4 + torch.arange(40.0).reshape(20, 2)
        return x, torch.arange(200) % 10, test_x, torch.arange(20) % 10


def numbers(data: InMemoryDataModule, split: Any) -> list[int]:
    """Which samples of NumberedDataModule a split holds, in order."""
    first = data.dataset(split).tensors[0].flatten(1)[:, 0].double()
    return [round(float(value) / 2) for value in first * data.std + data.mean]


def ready(kind: Callable[..., InMemoryDataModule], **kwargs: Any) -> InMemoryDataModule:
    data = kind(**kwargs)
    data.prepare_data()
    data.setup()
    return data


def idx_bytes(array: np.ndarray[Any, Any]) -> bytes:
    code = CODES[array.dtype.str[1:]]
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def four_files(n_train: int = 40, n_test: int = 10) -> dict[str, bytes]:
    state = np.random.RandomState(0)
    contents: list[bytes] = []
    for n in (n_train, n_test):
        contents.append(idx_bytes(state.randint(0, 256, (n, 28, 28)).astype("u1")))
        contents.append(idx_bytes((np.arange(n) % 10).astype("u1")))
    return dict(zip(FILES, contents, strict=True))


# ---------------------------------------------------------------------------------------------- splits


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


# ---------------------------------------------------------------------------------------------- batches


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


# ---------------------------------------------------------------------------------------------- errors


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


# ---------------------------------------------------------------------------------------------- IDX files


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", list(CODES))
def test_idx_round_trip(dtype: str, compress: bool, tmp_path: Path) -> None:
    array = (np.arange(24).reshape(2, 3, 4) - (0 if dtype == "u1" else 12)).astype(dtype)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(idx_bytes(array)) if compress else idx_bytes(array))
    tensor = idx.read_idx(path)
    assert tensor.dtype == torch.from_numpy(array).dtype
    assert torch.equal(tensor, torch.from_numpy(array))


SOUND = idx_bytes(np.arange(12, dtype="u1").reshape(3, 4))
ZIPPED = gzip.compress(SOUND)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html>", "magic number 3c 21"),
        (b"\0\1" + SOUND[2:], "magic number 00 01"),
        (SOUND[:2] + b"\x0a" + SOUND[3:], "type code 0x0a"),
        (SOUND[:3] + b"\0" + SOUND[4:], "0 dimensions"),
        (SOUND[:10], "2 dimensions in 10 bytes"),
        (SOUND[:-1], "23 bytes"),
        (SOUND + b"\0", "25 bytes"),
        (SOUND[:4] + b"\xff" + SOUND[5:], "24 bytes"),
        (ZIPPED[:-9], "gzip"),
        (ZIPPED[:-8] + bytes([ZIPPED[-8] ^ 1]) + ZIPPED[-7:], "gzip"),
        (ZIPPED[:10] + b"\xff" * 8, "gzip"),
        (gzip.compress(SOUND[:-1]), "23 bytes"),
    ],
)
def test_a_corrupt_idx_file_is_refused(content: bytes, found: str, tmp_path: Path) -> None:
    path = tmp_path / "some-labels"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"some-labels.*found .*{found}.*expected .*Delete the file and fetch it again"
    ):
        idx.read_idx(path)


@pytest.mark.parametrize(
    ("name", "array", "found"),
    [
        (FILES[0], np.zeros((40, 27, 28), "u1"), r"shape \(40, 27, 28\)"),
        (FILES[0], np.zeros((40, 28, 28), "i2"), "int16"),
        (FILES[1], np.zeros(39, "u1"), "39 labels"),
        (FILES[1], np.full(40, 10, "u1"), "label 10"),
        (FILES[2], np.zeros((0, 28, 28), "u1"), r"shape \(0, 28, 28\)"),
    ],
)
def test_files_that_do_not_fit_are_refused(name: str, array: np.ndarray[Any, Any], found: str, tmp_path: Path) -> None:
    for file, content in {**four_files(), name: idx_bytes(array)}.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*found .*{found}"):
        idx.load_splits(idx.MNIST, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        idx.load_splits(idx.MNIST, tmp_path)


@pytest.mark.parametrize("kind", [FashionMNISTDataModule, MNISTDataModule])
@pytest.mark.parametrize("folder", ["", "{name}", "{name}/raw"])
def test_files_in_data_dir_are_used(kind: Any, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", None)  # a call would fail
    place = tmp_path / folder.format(name="MNIST" if kind is MNISTDataModule else "FashionMNIST")
    place.mkdir(parents=True, exist_ok=True)
    for i, (name, content) in enumerate(four_files().items()):
        (place / (f"{name}.gz" if i % 2 else name)).write_bytes(gzip.compress(content) if i % 2 else content)
    data = ready(kind, data_dir=str(tmp_path), val_fraction=0.25)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [30, 10, 10]
    assert data.dataset("train").tensors[0].shape[1:] == (1, 28, 28)


def test_a_system_folder_comes_after_data_dir(tmp_path: Path) -> None:
    source = idx.IdxSource("Made", (), {}, str(tmp_path / "system"), "")
    for folder in ("system", "mine"):
        (tmp_path / folder).mkdir()
        for name, content in four_files().items():
            (tmp_path / folder / name).write_bytes(content)
    assert idx.fetch(source, tmp_path / "mine") == tmp_path / "mine"
    (tmp_path / "mine" / FILES[3]).unlink()  # an incomplete folder does not count
    assert idx.fetch(source, tmp_path / "mine") == tmp_path / "system"


@pytest.mark.skipif(
    not Path(idx.FASHION_MNIST.system_folder).is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_debians_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", None)
    data = ready(FashionMNISTDataModule, data_dir=str(tmp_path), train_size=1000)
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [1000, 6000, 10000]
    assert data.dataset("test").tensors[1].bincount().tolist() == [1000] * 10
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- downloads


class Mirrors:
    """Stands in for urlopen: serves bytes by address, and breaks off or refuses where told to."""

    def __init__(self) -> None:
        self.pages = {f"mem://good/{name}.gz": gzip.compress(data, mtime=0) for name, data in four_files().items()}
        self.calls: list[str] = []
        self.break_off: BaseException | None = None
        md5 = {name: hashlib.md5(self.pages[f"mem://good/{name}.gz"]).hexdigest() for name in FILES}
        self.source = idx.IdxSource("Made", ("mem://down/", "mem://good/"), md5, "", "make them up")

    def __call__(self, url: str, timeout: float) -> Any:
        self.calls.append(url)
        if url not in self.pages:
            raise urllib.error.URLError("no route to host")
        stream = io.BytesIO(self.pages[url])
        if self.break_off is not None:
            parts: Iterator[bytes | BaseException] = iter([self.pages[url][:100], self.break_off])

            def read(size: int) -> bytes:
                part = next(parts)
                if isinstance(part, BaseException):
                    raise part
                return part

            stream.read = read  # type: ignore[method-assign, assignment]
        return stream


@pytest.fixture
def mirrors(monkeypatch: pytest.MonkeyPatch) -> Mirrors:
    served = Mirrors()
    monkeypatch.setattr(urllib.request, "urlopen", served)
    return served


def test_download_fetches_once_past_a_mirror_that_is_down(mirrors: Mirrors, tmp_path: Path, capsys: Any) -> None:
    folder = idx.fetch(mirrors.source, tmp_path / "new")
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.gz" for name in FILES)
    assert [len(t) for t in idx.load_splits(mirrors.source, folder)] == [40, 40, 10, 10]
    assert "mem://good/t10k-labels-idx1-ubyte.gz: 0.0 MB" in capsys.readouterr().err
    count = len(mirrors.calls)
    assert idx.fetch(mirrors.source, tmp_path / "new") == folder
    assert len(mirrors.calls) == count == 8


@pytest.mark.parametrize("how", [ConnectionResetError("reset"), KeyboardInterrupt(), TimeoutError("timed out")])
def test_an_interrupted_download_leaves_no_file(how: BaseException, mirrors: Mirrors, tmp_path: Path) -> None:
    mirrors.break_off = how
    with pytest.raises(KeyboardInterrupt if isinstance(how, KeyboardInterrupt) else FileNotFoundError):
        idx.fetch(mirrors.source, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    mirrors.break_off = None
    idx.fetch(mirrors.source, tmp_path)  # and the next try starts afresh


def test_after_an_interruption_only_the_missing_files_are_fetched(mirrors: Mirrors, tmp_path: Path) -> None:
    folder = idx.fetch(mirrors.source, tmp_path)
    (folder / f"{FILES[2]}.gz").unlink()
    mirrors.calls.clear()
    idx.fetch(mirrors.source, tmp_path)
    assert mirrors.calls == [f"mem://down/{FILES[2]}.gz", f"mem://good/{FILES[2]}.gz"]


@pytest.mark.parametrize("change", [lambda page: page[:-1], lambda page: page + b"\0", lambda page: b"<html>"])
def test_a_wrong_checksum_is_refused(change: Callable[[bytes], bytes], mirrors: Mirrors, tmp_path: Path) -> None:
    url = f"mem://good/{FILES[0]}.gz"
    mirrors.pages[url] = change(mirrors.pages[url])
    with pytest.raises(FileNotFoundError, match=f"{url}: .*MD5 .*expected MD5 {mirrors.source.md5[FILES[0]]}"):
        idx.fetch(mirrors.source, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("download", [True, False])
def test_without_a_network_the_error_lists_three_ways(download: bool, mirrors: Mirrors, tmp_path: Path) -> None:
    mirrors.pages.clear()
    with pytest.raises(FileNotFoundError, match=r"\(1\) put .*\(2\) make them up.*\(3\) run once with a network"):
        idx.fetch(mirrors.source, tmp_path, download=download)
    assert len(mirrors.calls) == (2 if download else 0)
    assert not list(tmp_path.iterdir())
