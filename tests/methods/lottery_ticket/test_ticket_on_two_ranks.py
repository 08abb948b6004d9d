"""Lottery tickets under DDP: both ranks have the same masks and weights, and gradients for SNIP are those of both.

    python test_ticket_on_two_ranks.py fits OUT_DIR

is what each of two ranks does; Lightning starts rank 1 by running the file again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from ranks import outcomes, run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bpfree import ForwardGradient, TrainingRule
from lightning_bpfree.methods.lottery_ticket.callback import LotteryTicket
from lightning_bpfree.methods.lottery_ticket.pruning import snip, top_masks
from lightning_bpfree.methods.lottery_ticket.ticket import Ticket

CASES: dict[str, dict[str, Any]] = {
    "snip": {"score": "snip", "sparsities": [0.4, 0.6]},
    "random": {"score": "random", "weights": "fresh", "levels": 2},
    "magnitude": {"score": "magnitude", "weights": "permuted", "permute_masks": True, "levels": 2},
}


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    return TensorDataset(x, (x @ torch.randn(6, 3, generator=generator)).argmax(1))


def train(case: str, folder: Path) -> None:
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.manual_seed(rank)  # ranks draw different numbers; rank 0's weights and seed are those of all
    tickets = LotteryTicket(**CASES[case], dirpath=folder / case)
    rule: list[TrainingRule] = [] if case == "magnitude" else [ForwardGradient(2)]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*rule, tickets],
    )
    module = Net()
    trainer.fit(module, DataLoader(data(), batch_size=8, shuffle=True))
    assert tickets.masks is not None
    torch.save([module.state_dict(), dict(tickets.masks)], folder / f"{case}.rank{rank}.pt")


@pytest.mark.slow  # processes that import torch and lightning
@pytest.mark.xdist_group("two_processes")
def test_ranks_agree_and_average_their_gradients(tmp_path):
    run_ranks(__file__, "fits", tmp_path, limit=120)
    for case in CASES:
        one, two = outcomes(tmp_path, case)
        for left, right in zip(one, two, strict=True):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left), case
    ticket = Ticket.load(tmp_path / "snip" / "level_00.pt")
    module = Net()
    module.load_state_dict(ticket.init)
    x, y = data().tensors
    weights = {name: p for name, p in module.named_parameters() if name in ticket.masks}
    # All batches have one size, so that the mean over batches and ranks is the mean over the data.
    found = torch.autograd.grad(F.cross_entropy(module.net(x), y), list(weights.values()))
    scores = snip({n: p.detach() for n, p in weights.items()}, dict(zip(weights, found, strict=True)))
    assert ticket.masks == top_masks(scores, 0.4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in CASES:
        train(name, Path(sys.argv[2]))
