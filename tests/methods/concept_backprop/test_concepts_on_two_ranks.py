"""Under DDP both ranks look at the samples of both, and find the same; training goes on as if nobody looked.

    python test_concepts_on_two_ranks.py fits OUT_DIR

is what each of two ranks does; Lightning starts rank 1 by running the file again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def train(folder: Path, looks: bool) -> None:
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    pl.seed_everything(7)
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x[:, :3].argmax(1))
    look = bpf.ConceptBackprop(
        {"first": lambda x, y: x[:, 0] > 0},
        "net.1",
        forward="net",
        max_samples=60,
        num_inputs=4,
        dirpath=folder / "pictures",
        change=bpf.ChangeSettings(steps=5),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[look] if looks else [],
    )
    module = Net()
    trainer.fit(module, DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=8))
    found = {} if not looks else {"weight": look.report.detections["first", "net.1"].probe.weight}
    found |= {} if not looks else {"changed": look.report.changes["first"].changed}
    samples = 0 if not looks else look.report.detections["first", "net.1"].samples
    torch.save([module.state_dict(), found, samples], folder / f"{looks}.rank{rank}.pt")


@pytest.mark.slow  # processes that import torch and lightning
@pytest.mark.xdist_group("two_processes")
def test_ranks_find_the_same_and_train_on(tmp_path):
    run_ranks(__file__, "fits", tmp_path, limit=120)
    read = {
        (looks, rank): torch.load(tmp_path / f"{looks}.rank{rank}.pt", weights_only=True)
        for looks in (True, False)
        for rank in (0, 1)
    }
    plain = read[False, 0][0]
    for state, _, _ in read.values():
        assert all(torch.equal(state[name], plain[name]) for name in plain)
    (_, one, samples), (_, two, _) = read[True, 0], read[True, 1]
    assert torch.equal(one["weight"], two["weight"])
    assert torch.equal(one["changed"], two["changed"])
    assert samples == 64  # 30 of each rank, in whole batches of 8
    assert (tmp_path / "pictures/concepts_changed_first.png").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for looked in (True, False):
        train(Path(sys.argv[2]), looked)
