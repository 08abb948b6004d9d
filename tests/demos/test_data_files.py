"""IDX files are refused where they are corrupt, found in folders, and downloaded once."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_problems import ready

from lightning_bpfree.demos.data import FashionMNISTDataModule, MNISTDataModule
from lightning_bpfree.demos.loading import idx

FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


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


# --- IDX files -------------------------------------------------------------------------------------------------------


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
ZIPPED = gzip.compress(SOUND, mtime=0)


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
        (gzip.compress(SOUND[:-1], mtime=0), "23 bytes"),
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


# --- downloads -------------------------------------------------------------------------------------------------------


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
