"""A checkpoint of a run's middle that falls on an epoch's last batch: Lightning starts no epoch after the resume."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from problems import Problem, fitted, loader
from torch import nn

import lightning_bpfree as bpf


def run(folder, rule, resume=None):
    torch.manual_seed(0)
    module = Problem(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    fitted(module, loader(), rule, keep, max_epochs=3, enable_checkpointing=True, ckpt_path=resume)
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: bpf.ForwardForward(stop_epoch=1),
        lambda: bpf.ForwardForward(start_epoch=1),
        lambda: bpf.TeamReinforce(start_epoch=1, stop_epoch=2),
        lambda: bpf.ZerothOrder(stop_epoch=2),
    ],
    ids=["forward_forward_stops", "forward_forward_starts", "team", "zeroth_order"],
)
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("step", [4, 8])
def test_history_turn_and_weights_are_those_of_a_whole_run(make, step, tmp_path):
    whole, again = make(), make()
    one = run(tmp_path, whole)
    other = run(tmp_path / "again", again, tmp_path / f"step={step}.ckpt")
    assert again.record.state_dict() == whole.record.state_dict()
    assert ("forward" in one.net.__dict__) == ("forward" in other.net.__dict__)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
