"""The script that measures samplers on a GPU runs without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "diffusion_gpu.py"


@pytest.mark.slow  # a process that imports torch and diffusers
def test_dry_run_writes_all_that_a_run_writes(tmp_path):
    out = tmp_path / "gpu.json"
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(SCRIPT),
        "--cpu",
        "--steps",
        "2",
        "--repeats",
        "1",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["check"]["passed"]
    assert found["check"]["adjoint"] > 0.01  # the check can fail
    assert len(found["points"]) == 1 * 2 * 5  # steps, precisions, gradients
    assert all(point["seconds"] > 0 for point in found["points"])
