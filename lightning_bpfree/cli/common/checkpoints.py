"""Checks of checkpoints before loading: errors name missing, truncated or damaged files, and say what to do."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from lightning_bpfree.cli.common.preconditions import CommandError, did_you_mean

KEYWORDS = ("best", "last", "hpc", "registry")  # which Lightning finds by itself
AGAIN = "Give an earlier checkpoint of the run, or train again."


def check_checkpoint(given: str | None) -> None:
    """Raise CommandError if ``--ckpt_path`` names no readable Lightning checkpoint.

    Args:
        given: the user's value; keywords such as ``last`` and addresses are not checked.
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
    check_written(path, "--ckpt_path", "state_dict", ("Lightning", "Trainer.save_checkpoint or ModelCheckpoint"))


def _others(folder: Path, name: str) -> str:
    """Return the checkpoints of a folder, those most like ``name`` first."""
    known = sorted(file.name for file in folder.glob("*.ckpt")) if folder.is_dir() else []
    if not known:
        return ""
    return did_you_mean(name, known) or f" The folder has {', '.join(known[:3])}{' ...' if len(known) > 3 else ''}."


def check_written(path: Path, option: str, entry: str, writer: tuple[str, str]) -> None:
    """Raise CommandError if a file that ``torch.save`` wrote is empty, truncated, damaged, or of another kind.

    Args:
        path: path of an existing file.
        option: the option that names it, such as ``--ckpt_path``.
        entry: a key that its dict must have.
        writer: what writes such checkpoints, for the error message.
    """
    try:
        _check_file(path, option)
        found = _content(path, option)
    except OSError as error:
        raise CommandError(f"{option}: cannot read {path}: {error.strerror or error}.") from error
    if found is not None and (not isinstance(found, dict) or entry not in found):
        raise CommandError(
            f"{option}: {path} is not a checkpoint of {writer[0]}: it has no entry {entry}. Give a file that "
            f"{writer[1]} wrote."
        )


def _check_file(path: Path, option: str) -> None:
    size = path.stat().st_size
    if size == 0:
        raise CommandError(f"{option}: {path} is empty: its writing was interrupted. {AGAIN}")
    if not _is_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            # Files may be written without checksums (torch.serialization.set_crc32_options): then all are wrong.
            broken = archive.testzip()
            has_checksums = broken is not None and broken != names[0]
    except (zipfile.BadZipFile, EOFError) as error:
        raise CommandError(
            f"{option}: {path} is truncated ({size:,} bytes): its writing or copying was interrupted. {AGAIN}"
        ) from error
    if has_checksums:
        raise CommandError(f"{option}: {path} is damaged: the checksum of {broken} is wrong. {AGAIN}")


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _content(path: Path, option: str) -> Any:
    """Return what the file holds; None if it holds objects that only the user can allow: Lightning says how."""
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_archive(path))
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "WeightsUnpickler error: Unsupported class" in str(error):
            return None
        raise CommandError(f"{option}: {path} is not a checkpoint, or is damaged. {AGAIN}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise CommandError(f"{option}: {path} is not a checkpoint, or is damaged. {AGAIN}") from error
