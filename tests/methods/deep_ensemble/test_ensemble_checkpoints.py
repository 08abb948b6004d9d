"""Checkpoints hold all members, resume exactly, and load into a plain module."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from ensemble_problems import Judged, Small, plain, tensors
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import lightning_bpfree as bpf

# Lightning's own checkpoint callback says so where a run goes on in another folder.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

CASES = {
    "stacked": (lambda: bpf.DeepEnsemble(3, route="stacked"), None),
    "sequential": (lambda: bpf.DeepEnsemble(3, route="sequential"), None),
    "own_rates": (lambda: bpf.DeepEnsemble(2, lr_factors=[1.0, 0.5], activations=["relu", "elu"]), None),
    "bootstrap": (lambda: bpf.DeepEnsemble(2, bootstrap=True, combine="stack"), None),
    "zeroth_order": (lambda: bpf.DeepEnsemble(2), lambda: bpf.ZerothOrder(2)),
    "snes": (lambda: bpf.DeepEnsemble(2), lambda: bpf.EvolutionStrategy("snes", 4)),
}


def run(ensemble, rule, folder: Path, epochs: int, ckpt_path=None, every: int = 1):
    torch.manual_seed(7)
    module = Judged("adam")
    saved = ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=every, filename="{epoch}")
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ensemble, *([rule()] if rule else []), saved], num_sanity_val_steps=0, log_every_n_steps=1,
        accumulate_grad_batches=2, gradient_clip_val=0.3,
    )  # fmt: skip
    data = DataLoader(tensors(), 16, shuffle=True)  # from the global stream: a resume must go on with it
    trainer.fit(module, data, plain(), ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact(case, tmp_path):
    make, rule = CASES[case]
    straight, first, second = make(), make(), make()
    run(straight, rule, tmp_path / "straight", 4)
    run(first, rule, tmp_path / "first", 2)
    trainer, _ = run(second, rule, tmp_path / "second", 4, tmp_path / "first" / "epoch=1.ckpt")
    assert trainer.current_epoch == 4
    for a, b in zip(straight.member_states(), second.member_states(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert straight.combination.weights == second.combination.weights


@pytest.mark.parametrize("route", ["sequential", "stacked"])
def test_a_checkpoint_holds_all_members_and_loads_into_a_plain_module(route, tmp_path):
    ensemble = bpf.DeepEnsemble(3, route=route, combine="stack")
    trainer, module = run(ensemble, None, tmp_path, 1)
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    states = checkpoint["callbacks"]["DeepEnsemble"]["members"]
    assert len(states) == 3
    other = Judged()
    other.load_state_dict(checkpoint["state_dict"], strict=True)
    assert torch.equal(other.net[0].weight, states[0]["net.0.weight"])
    for tensor in checkpoint["state_dict"].values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "no memory of other members"
    own = trainer.test(module, plain(), verbose=False)
    fresh = bpf.DeepEnsemble(3, combine="stack")
    judge = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[fresh]
    )
    found = judge.test(Judged(), plain(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert found == own


def test_members_go_on_in_a_second_fit():
    ensemble = bpf.DeepEnsemble(2)
    options = {
        "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
    }  # fmt: skip
    torch.manual_seed(7)
    module = Small()
    pl.Trainer(callbacks=[ensemble], **options).fit(module, plain())
    before = ensemble.member_states()
    pl.Trainer(callbacks=[ensemble], limit_train_batches=0, **options).fit(module, plain())
    after = ensemble.member_states()
    assert all(torch.equal(a[name], b[name]) for a, b in zip(before, after, strict=True) for name in a)


def test_what_does_not_fit_a_checkpoint_is_said(tmp_path):
    run(bpf.DeepEnsemble(2, activations=["relu", "elu"]), None, tmp_path, 1)
    with pytest.raises(MisconfigurationException, match="holds 2 members, and this run has members=3"):
        run(bpf.DeepEnsemble(3), None, tmp_path / "b", 2, tmp_path / "epoch=0.ckpt")
    with pytest.warns(UserWarning, match="were trained with activations"):
        run(bpf.DeepEnsemble(2), None, tmp_path / "c", 2, tmp_path / "epoch=0.ckpt")
    judge = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[bpf.DeepEnsemble(2)],
    )  # fmt: skip
    with pytest.raises(MisconfigurationException, match="no members to test"):
        judge.test(Judged(), plain(), verbose=False)
