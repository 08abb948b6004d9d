"""Checkpoints before they are loaded: missing, truncated or damaged files are named, with what to do."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from lightning_bpfree.cli.common.preconditions import CommandError, did_you_mean

KEYWORDS = ("best", "last", "hpc", "registry")  # which Lightning finds by itself
AGAIN = "Give an earlier checkpoint of the run, or train again."


def check_checkpoint(given: str | None) -> None:
    """Raise CommandError if ``--ckpt_path`` names no checkpoint of Lightning that can be read.

    Args:
        given: what the user gave; keywords such as ``last`` and addresses are left alone.
    """
    if given is None or given in KEYWORDS or "://" in given or given.startswith("registry:"):
        return
    path = Path(given)
    if not path.exists():
        raise CommandError(f"--ckpt_path: there is no file {path}.{_others(path.parent, path.name)}")
    if path.is_dir():
        if not any((path / name).exists() for name in (".metadata", "meta.pt")):  # sharded checkpoints are folders
            raise CommandError(f"--ckpt_path: {path} is a folder. Give the file in it.{_others(path, path.name)}")
        return
    try:
        _check_file(path)
    except OSError as error:
        raise CommandError(f"--ckpt_path: cannot read {path}: {error.strerror or error}.") from error


def _others(folder: Path, name: str) -> str:
    """Return the checkpoints of a folder, those most like ``name`` first."""
    known = sorted(file.name for file in folder.glob("*.ckpt")) if folder.is_dir() else []
    if not known:
        return ""
    return did_you_mean(name, known) or f" The folder has {', '.join(known[:3])}{' ...' if len(known) > 3 else ''}."


def _check_file(path: Path) -> None:
    size = path.stat().st_size
    if size == 0:
        raise CommandError(f"--ckpt_path: {path} is empty: its writing was interrupted. {AGAIN}")
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    if is_archive:
        _check_archive(path, size)
    _check_content(path, mmap=is_archive)


def _check_archive(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            # Files may be written without checksums (torch.serialization.set_crc32_options): then all are wrong.
            broken = archive.testzip()
            has_checksums = broken is not None and broken != names[0]
    except (zipfile.BadZipFile, EOFError) as error:
        raise CommandError(
            f"--ckpt_path: {path} is truncated ({size:,} bytes): its writing or copying was interrupted. {AGAIN}"
        ) from error
    if has_checksums:
        raise CommandError(f"--ckpt_path: {path} is damaged: the checksum of {broken} is wrong. {AGAIN}")


def _check_content(path: Path, mmap: bool) -> None:
    import pickle

    import torch

    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "WeightsUnpickler error: Unsupported class" in str(error):
            return  # objects that only the user can allow: Lightning says how
        raise CommandError(f"--ckpt_path: {path} is not a checkpoint, or is damaged. {AGAIN}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise CommandError(f"--ckpt_path: {path} is not a checkpoint, or is damaged. {AGAIN}") from error
    if not isinstance(found, dict) or "state_dict" not in found:
        raise CommandError(
            f"--ckpt_path: {path} is not a checkpoint of Lightning: it has no entry state_dict. Give a file that "
            "Trainer.save_checkpoint or ModelCheckpoint wrote."
        )
