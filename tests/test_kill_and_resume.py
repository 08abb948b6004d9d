"""A run that is killed mid-epoch and resumed from its last checkpoint equals one that never stopped, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import resume_worker
import torch

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("killed")]  # fifteen trainings in processes of their own


@pytest.fixture(scope="module")
def remains(tmp_path_factory) -> Path:
    """What all killed runs have left behind."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, resume_worker.__file__, str(folder)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return folder


def last_checkpoint(folder: Path) -> Path:
    return max(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))


def assert_same(left, right, where: str = "") -> None:
    """Compare nested states; tensors bit for bit."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key, value in left.items():
            assert_same(value, right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert left == right, where


@pytest.mark.parametrize("case", resume_worker.CASES)
def test_killed_and_resumed_equals_uninterrupted(case, remains, tmp_path):
    checkpoint = last_checkpoint(remains / case)
    saved = torch.load(checkpoint, weights_only=True)  # nothing but plain values and tensors
    epoch, batch = resume_worker.KILLED_AT
    assert saved["epoch"] == epoch
    assert 0 < saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] <= batch  # mid-epoch

    whole, whole_rule = resume_worker.train(case, tmp_path / "whole")
    resumed, resumed_rule = resume_worker.train(case, remains / case, resume_from=checkpoint)

    assert resumed.global_step == whole.global_step
    assert_same(resumed.lightning_module.state_dict(), whole.lightning_module.state_dict(), "module")
    assert_same(resumed.optimizers[0].state_dict(), whole.optimizers[0].state_dict(), "optimizer")
    assert_same(resumed_rule.state_dict(), whole_rule.state_dict(), "rule")
