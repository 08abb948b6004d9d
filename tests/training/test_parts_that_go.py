"""What a module held when a rule looked at it, and no longer holds at a later step, stops no fit."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from problems import fitted

import lightning_bpfree as bpf


class Forgets(BoringModel):
    """Holds tensors in a dict, a list and an attribute, and drops them between two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name, self.in_turn, self.last = {"x": torch.zeros(2)}, [torch.zeros(2)], torch.zeros(2)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 1:
            self.by_name.clear()
            self.in_turn.clear()
            del self.last


@pytest.mark.parametrize(
    "rule", [bpf.ZerothOrder(seed=1), bpf.ForwardGradient(2, chunk_size=1, seed=1)], ids=["zo", "fg"]
)
def test_tensors_that_are_dropped_between_steps_stay_dropped(rule):
    module = Forgets()
    trainer = fitted(module, module.train_dataloader(), rule, limit_train_batches=3, limit_val_batches=0)
    assert trainer.global_step == 3
    assert not module.by_name
    assert not module.in_turn
    assert not hasattr(module, "last")
