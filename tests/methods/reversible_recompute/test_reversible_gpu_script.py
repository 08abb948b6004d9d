"""The script that measures reversible models on a GPU runs without one, and its race test can fail."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # trains small models, one in a process of its own

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reversible_gpu.py"
KEYS = {"command", "date", "seed", "device", "versions", "rows", "checks", "points"}


@pytest.fixture
def script(monkeypatch):
    """The script as a module; its neighbors are found, and forgotten again."""
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    before = set(sys.modules)
    yield importlib.import_module("reversible_gpu")
    for name in set(sys.modules) - before:
        if name.startswith("reversible_gpu"):
            del sys.modules[name]


def test_dry_run_writes_all_that_a_run_writes(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--cpu", "--out", str(out)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert set(found) == KEYS
    # 3 models, 2 precisions, 4 schedules, 2 batch sizes
    assert len(found["points"]) == 3 * 2 * 4 * 2
    assert all(point["rate"] > 0 for point in found["points"])
    names = [row["name"] for row in found["rows"]]
    assert len(set(names)) == len(names)
    assert {"race test, failed cases", "parallel over sequential, lowest of all"} < set(names)
    assert all({"name", "unit", "value", "limit", "reached", "what"} == set(row) for row in found["rows"])


def test_a_wrong_gradient_fails_the_race_test(script, monkeypatch, tmp_path):
    true = script.gradient

    def wrong(net, data, schedule, precision):
        found = true(net, data, schedule, precision)
        if schedule == "parallel":
            found[-1] += 2 * torch.finfo(found.dtype).eps * found[-1].abs()  # by the last bits
        return found

    monkeypatch.setattr(script, "gradient", wrong)
    monkeypatch.setattr(script, "PRECISIONS", ("fp32",))
    monkeypatch.setattr(script, "OPTIONS", {"plain": {}})
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the script sets it for good
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["reversible_gpu.py", "--cpu", "--out", str(out)])
    assert script.main() == 1
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(row["name"], row["value"], row["reached"]) for row in rows] == [("race test, failed cases", 8, False)]


def test_batches_double_until_memory_does_not_suffice(script, monkeypatch):
    largest = {"autograd": 2, "sequential": 8}
    now, ran = [], []

    def timed(run, steps, warm, device):
        schedule, batch = now[-1]
        if batch > largest[schedule]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        ran.append(now[-1])
        return {"seconds": 0.5 / batch, "allocated": float(batch), "reserved": 2.0 * batch}

    class Net(torch.nn.Module):
        def data(self, batch, device):
            return (torch.zeros(batch),)

    def attempted(net, data, schedule, *rest, true=script.attempted):
        now.append((schedule, len(data[0])))
        return true(net, data, schedule, *rest)

    monkeypatch.setattr(script, "timed", timed)
    monkeypatch.setattr(script, "attempted", attempted)
    monkeypatch.setitem(script.MODELS, "vit", lambda **_: Net())
    monkeypatch.setattr(sys, "argv", ["reversible_gpu.py", "--cpu"])
    chosen = script.options()
    chosen.schedules, chosen.doublings, chosen.blocks = list(largest), 10, 2
    points = script.growing("vit", "tiny", "fp32", chosen, torch.device("cpu"))
    assert [(p["schedule"], p["batch"], p["rate"]) for p in points] == [
        ("autograd", 2, 8.0), ("sequential", 2, 8.0),
        ("autograd", 4, None), ("sequential", 4, 32.0),
        ("sequential", 8, 128.0),
        ("sequential", 16, None),
    ]  # fmt: skip
    # after one step each, blocks take turns
    assert ran[:6] == [("autograd", 2), ("sequential", 2)] * 3


def test_summary_by_hand(script):
    def point(schedule, batch, rate, allocated):
        where = {"model": "swin", "size": "base", "precision": "bf16", "schedule": schedule, "batch": batch}
        return {**where, "rate": rate, "allocated": allocated, "reserved": 2 * allocated}

    summary = sys.modules["reversible_gpu_report"].summary
    points = [point("sequential", *one) for one in ((8, 100.0, 10.0), (16, 100.0, 20.0), (32, 80.0, 40.0))]
    # 32 is out of memory
    points += [point("parallel", *one) for one in ((8, 97.0, 20.0), (16, 120.0, 40.0), (32, None, 0.0))]
    rows = {row["name"]: row for row in summary(points)}
    assert rows["throughput, swin base bf16, parallel"]["value"] == 120.0
    best = rows["parallel over sequential, swin base bf16"]
    assert (best["value"], best["limit"], best["reached"]) == (1.2, 1.15, True)
    lowest = rows["parallel over sequential, lowest of all"]
    assert (lowest["value"], lowest["limit"], lowest["reached"]) == (0.97, 0.98, False)
    assert rows["memory, parallel over sequential, swin base bf16"]["value"] == 2.0  # at 16, the largest of both
