"""IDX files, the format of MNIST and Fashion-MNIST: reading them, finding them and fetching them.

The format is Yann LeCun's: two zero bytes, a byte for the element type, a byte for the number of dimensions, the sizes
as big-endian 32-bit integers, then the elements in C order, big-endian. A file may be gzip-compressed.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import sys
import urllib.request
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["FASHION_MNIST", "MNIST", "IdxSource", "fetch", "find_folder", "load_splits", "read_idx"]

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_CHUNK = 1 << 16  # bytes read at a time while downloading
_TIMEOUT = 30.0  # seconds without an answer before a mirror counts as unreachable


@dataclass(frozen=True)
class IdxSource:
    """Where the four files of one data set come from.

    Args:
        name: Name of the data set, also of its subfolder below ``data_dir`` (torchvision's layout).
        mirrors: Base addresses that end in ``/``, tried in order.
        md5: File name without ``.gz`` to the MD5 of the published ``.gz`` file.
        system_folder: Folder in which the operating system's package keeps the files; empty: there is none.
        without_network: How to get the data with no network, as a clause of the error message.
    """

    name: str
    mirrors: tuple[str, ...]
    md5: Mapping[str, str]
    system_folder: str
    without_network: str


def _md5_of_files(*digests: str) -> Mapping[str, str]:
    return dict(zip(_FILES, digests, strict=True))


# The MD5s are those that torchvision and Zalando's README list. Every byte is checked against them after the download,
# so that the plain-http mirror, kept as the last resort, cannot slip in another file unnoticed.
FASHION_MNIST = IdxSource(
    name="FashionMNIST",
    mirrors=(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    md5=_md5_of_files(
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    system_folder="/usr/share/datasets/fashion-mnist",
    without_network="on Debian or Ubuntu, 'apt-get install dataset-fashion-mnist'",
)
MNIST = IdxSource(
    name="MNIST",
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    md5=_md5_of_files(
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    system_folder="",
    without_network="use DigitsDataModule, whose data comes with scikit-learn",
)


def _corrupt(path: Path, found: str, expected: str) -> ValueError:
    return ValueError(
        f"{path} is not a sound IDX file: found {found}, expected {expected}. Delete the file and fetch it again."
    )


def _content(path: Path) -> bytes:
    """Bytes of `path`, decompressed when they start as gzip does, whatever the file is called."""
    raw = path.read_bytes()
    if not raw.startswith(b"\x1f\x8b"):
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise _corrupt(path, f"gzip data that does not decompress ({error})", "a whole gzip file") from error


def read_idx(path: str | Path) -> Tensor:
    """Read one IDX file, plain or gzip-compressed.

    Args:
        path: The file.

    Returns:
        A tensor of the file's shape and element type, in native byte order.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The magic number, the type code, the sizes or the number of bytes is wrong.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "labels"
        ...     _ = file.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3]) + bytes([7, 2, 1]))
        ...     read_idx(file).tolist()
        [7, 2, 1]
    """
    path = Path(path)
    data = _content(path)
    if len(data) < 4 or data[:2] != b"\0\0":
        raise _corrupt(path, f"magic number {data[:4].hex(' ') or '(empty file)'}", "00 00, a type code, a rank")
    code, rank = data[2], data[3]
    if code not in _DTYPES:
        raise _corrupt(path, f"type code 0x{code:02x}", f"one of {', '.join(f'0x{c:02x}' for c in _DTYPES)}")
    start = 4 + 4 * rank
    if rank == 0 or len(data) < start:
        raise _corrupt(path, f"{rank} dimensions in {len(data)} bytes", "at least one dimension and 4 bytes for each")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", rank, offset=4))
    dtype = np.dtype(_DTYPES[code])
    wanted = start + math.prod(shape) * dtype.itemsize
    if len(data) != wanted:
        raise _corrupt(path, f"{len(data)} bytes", f"{wanted} bytes for {dtype.name} of shape {shape}")
    # astype copies, so that the tensor owns writable memory in native byte order.
    return torch.from_numpy(np.frombuffer(data, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("=")))


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def find_folder(source: IdxSource, data_dir: str | Path) -> Path | None:
    """First folder that holds all four files of `source`, plain or ``.gz``; None when there is none.

    Looks in ``data_dir/NAME/raw`` (where :func:`fetch` and torchvision put them), ``data_dir/NAME``, ``data_dir``
    itself and the system package's folder, in this order. MNIST and Fashion-MNIST use the same file names: files in
    ``data_dir`` itself are used for whichever of the two is requested.
    """
    top = Path(data_dir)
    folders = [top / source.name / "raw", top / source.name, top]
    if source.system_folder:
        folders.append(Path(source.system_folder))
    return next((folder for folder in folders if all(_file(folder, name) for name in _FILES)), None)


def _download(url: str, target: Path, md5: str) -> None:
    """Download `url` to `target`, which appears only once it is whole and its MD5 is right."""
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")  # two processes never write the same one
    digest, done = hashlib.md5(usedforsecurity=False), 0
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            target.parent.mkdir(parents=True, exist_ok=True)  # only now: without a network no empty folder stays behind
            with part.open("wb") as out:
                while chunk := answer.read(_CHUNK):
                    out.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    if sys.stderr.isatty():  # a log file gets the last line only
                        print(f"\r{url}: {done / 1e6:.1f} MB", end="", file=sys.stderr, flush=True)
        print(f"\r{url}: {done / 1e6:.1f} MB", file=sys.stderr)
        if digest.hexdigest() != md5:
            raise ValueError(f"{done} bytes with MD5 {digest.hexdigest()}, expected MD5 {md5}")
        part.replace(target)
    finally:  # on an interrupt as well; after the renaming there is nothing left to remove
        part.unlink(missing_ok=True)


def fetch(source: IdxSource, data_dir: str | Path, *, download: bool = True) -> Path:
    """Folder with the four files of `source`; downloads missing files to ``data_dir/NAME/raw``.

    Args:
        source: :data:`FASHION_MNIST`, :data:`MNIST` or one like them.
        data_dir: Where to look, and below which to download.
        download: Whether the network may be used.

    Raises:
        FileNotFoundError: The files were not found and not downloaded (no network, or a wrong checksum). The message
            says what was tried and lists three ways to get them.
    """
    found = find_folder(source, data_dir)
    if found is not None:
        return found
    folder = Path(data_dir) / source.name / "raw"
    if not download:
        raise _not_found(source, data_dir, ["download=False"])
    for name in _FILES:
        failures = [] if _file(folder, name) else _try_mirrors(source, name, folder)
        if _file(folder, name) is None:
            raise _not_found(source, data_dir, failures)
    return folder


def _try_mirrors(source: IdxSource, name: str, folder: Path) -> list[str]:
    """Download one file from the first mirror that gives it whole; return what went wrong with those before."""
    failures = []
    for mirror in source.mirrors:
        url = f"{mirror}{name}.gz"
        try:
            _download(url, folder / f"{name}.gz", source.md5[name])
            break
        except (OSError, ValueError, http.client.HTTPException) as error:
            failures.append(f"{url}: {error}")
    return failures


def _not_found(source: IdxSource, data_dir: str | Path, failures: list[str]) -> FileNotFoundError:
    return FileNotFoundError(
        f"No {source.name} files in {data_dir}, and none downloaded ({'; '.join(failures)}). Three ways to get them: "
        f"(1) put {', '.join(f'{name}.gz' for name in _FILES)} into {Path(data_dir) / source.name}; "
        f"(2) {source.without_network}; (3) run once with a network and download=True."
    )


def load_splits(source: IdxSource, folder: str | Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, training labels, test images and test labels from `folder`, all uint8.

    Images have shape (N, 28, 28) and values 0 to 255, labels shape (N,) and values 0 to 9.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is corrupt, or images and labels do not fit each other.
    """
    tensors: list[Tensor] = []
    for name, shape in zip(_FILES, [(28, 28), ()] * 2, strict=True):
        path = _file(Path(folder), name)
        if path is None:
            raise FileNotFoundError(f"{source.name}: neither {name} nor {name}.gz is in {folder}.")
        data = read_idx(path)
        if data.dtype != torch.uint8 or data.shape[1:] != shape or len(data) == 0:
            want = "uint8 of shape (N, 28, 28)" if shape else "uint8 of shape (N,)"
            raise _corrupt(path, f"{data.dtype} of shape {tuple(data.shape)}", f"{want} with N above 0")
        if not shape and int(data.max()) > 9:
            raise _corrupt(path, f"label {int(data.max())}", "labels 0 to 9")
        if not shape and len(data) != len(tensors[-1]):
            raise _corrupt(path, f"{len(data)} labels", f"{len(tensors[-1])}, one for each image")
        tensors.append(data)
    return tensors[0], tensors[1], tensors[2], tensors[3]
