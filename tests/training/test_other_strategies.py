"""Strategies that call the training step in their own way: the module's step is replaced only while they do."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import SingleDeviceStrategy
from problems import fitted

import lightning_bpfree as bpf


class OwnWay(SingleDeviceStrategy):
    """Calls the step by its name, as strategies with a wrapped model do."""

    def training_step(self, *args, **kwargs):
        assert "training_step" in vars(self.lightning_module)
        return self.lightning_module.training_step(*args, **kwargs)


class Looks(BoringModel):
    def on_before_zero_grad(self, optimizer):
        assert "training_step" not in vars(self), "left behind"


class Fails(BoringModel):
    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            raise KeyError("the user's own")
        return super().training_step(batch, batch_idx)


def fit(module, rule):
    strategy = OwnWay(device=torch.device("cpu"))
    fitted(module, module.train_dataloader(), rule, strategy=strategy, limit_train_batches=3, limit_val_batches=0)


@pytest.mark.parametrize("rule", [bpf.Backprop, bpf.ZerothOrder])
def test_the_step_is_the_modules_own_between_calls(rule):
    module = Looks()
    fit(module, rule(allow_untested=True))
    assert "training_step" not in vars(module)


def test_the_step_is_the_modules_own_after_an_error():
    module = Fails()
    with pytest.raises(KeyError, match="the user's own"):
        fit(module, bpf.Backprop(allow_untested=True))
    assert "training_step" not in vars(module)
