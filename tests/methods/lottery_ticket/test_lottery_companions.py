"""LotteryTicket beside other callbacks, and what it says before the first level."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lottery_problems import fit, plain
from problems import fitted, loader
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_bpfree import LotteryTicket, ZerothOrder


def tickets(folder, **settings) -> LotteryTicket:
    return LotteryTicket("magnitude", levels=2, keep=0.5, **{"dirpath": folder, "epochs_per_level": 1, **settings})


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_of_one_level(tmp_path, first):
    own, averaging = tickets(tmp_path), WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    order = [averaging, own] if first else [own, averaging]
    module, _ = fit(tmp_path, order[0], order[1]) if not first else _fit(tmp_path, own, averaging)
    parameters = dict(module.named_parameters())
    for name, mask in own.masks.items():
        assert not parameters[name][~mask].any()
        assert parameters[name][mask].any()


def _fit(folder, own, averaging):
    module = plain()
    return module, fitted(module, loader(), averaging, own, max_epochs=2, default_root_dir=folder)


@pytest.mark.parametrize("other", [lambda: StochasticWeightAveraging(1e-2), BackboneFinetuning])
def test_callbacks_that_make_levels_unequal_are_refused(tmp_path, other):
    with pytest.raises(MisconfigurationException, match="remove it here"):
        fit(tmp_path, tickets(tmp_path), other())


def test_the_best_is_of_the_last_level(tmp_path):
    own = tickets(tmp_path / "tickets")
    keep = ModelCheckpoint(tmp_path, "{epoch}", monitor="train_loss", mode="max")
    stop = EarlyStopping("train_loss", mode="max", patience=9)
    fit(tmp_path, own, keep, stop, enable_checkpointing=True)
    assert keep.best_model_path.endswith("epoch=1.ckpt")
    state = torch.load(keep.best_model_path, weights_only=False)["state_dict"]
    assert all(not state[name][~mask].any() for name, mask in own.masks.items())
    assert float(stop.best_score) == pytest.approx(float(keep.best_model_score))


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MisconfigurationException, match="another dirpath"):
        fit(tmp_path, tickets(tmp_path / "file" / "tickets"))


def test_weights_that_begin_at_zero_are_said(tmp_path):
    module = plain()
    torch.nn.init.zeros_(module.net.head.weight)
    with pytest.warns(UserWarning, match="net.head.weight begin at zero"):
        fit(tmp_path, tickets(tmp_path, scope="layer"), module=module)


def test_frozen_parameters_are_said():
    with pytest.raises(MisconfigurationException, match="nothing to train"):
        fitted(plain(), loader(), ZerothOrder(params="net.frozen.*"))
