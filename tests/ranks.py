"""Runs a worker that trains on two ranks, and reads what they wrote."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


def run_ranks(worker: str, what: str, out: Path, limit: float) -> None:
    """Run both ranks; fails if they do not end in `limit` seconds, or end with an error."""
    # Trainers and seed_everything of other tests in this process leave ranks and seeds in the environment.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PL_") and not k.endswith(("_RANK", "WORLD_SIZE"))}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", worker, what, str(out)],
        env={**clean, "OMP_NUM_THREADS": "1"},
        cwd=out,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that rank 1 can be ended with rank 0
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        done = sorted(path.name for path in out.rglob("*.pt"))
        pytest.fail(f"the ranks of {what} hang; written so far: {done}\n{output[-3000:]}")
    assert process.returncode == 0, output[-3000:]


def outcomes(out: Path, case: str) -> list[dict[str, Any]]:
    """Return what the two ranks wrote of a case."""
    return [torch.load(out / f"{case}.rank{rank}.pt", weights_only=True) for rank in (0, 1)]
