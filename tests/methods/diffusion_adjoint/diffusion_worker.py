"""Fine-tunes on two ranks; `test_diffusion_on_two_ranks.py` runs this file.

    python diffusion_worker.py ranks OUT_DIR

Lightning starts rank 1 by running the file again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from tiny_diffusion import image_pipeline

import lightning_bpfree as bpf

CASES = {
    "weights": ("exact_adjoint", {}),
    "lora": ("exact_adjoint", {"lora_targets": ["to_q", "to_v", "conv1"]}),
    "adjoint": ("adjoint", {}),
}
BATCH = 4  # of both ranks together


def bright(images: torch.Tensor) -> torch.Tensor:
    return images.mean((1, 2, 3))


def train(case: str, ranks: int) -> bpf.RewardFineTuning:
    """Return the module after four steps on the same samples, however many ranks share them."""
    torch.manual_seed(0)
    gradient, settings = CASES[case]
    optimize = "lora" if case == "lora" else "weights"
    module = bpf.RewardFineTuning(
        image_pipeline(),
        bright,
        optimize,
        num_steps=3,
        batch_size=BATCH // ranks,
        batches_per_epoch=2 * ranks,
        optimizer="sgd",
        lr=0.05,
        **settings,
    ).double()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        precision="64-true",
        max_epochs=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[bpf.DiffusionAdjoint(gradient), InOrder()],
    )
    trainer.fit(module)
    return module


class InOrder(pl.Callback):
    """Lightning's sampler shuffles the samples of ranks when they are shuffled on one; here they never are."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        if hasattr(sampler, "shuffle"):
            sampler.shuffle = False


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, rank = Path(sys.argv[2]), int(os.environ.get("LOCAL_RANK", "0"))
    for each in CASES:
        left = train(each, 2)
        weights = {name: p.detach() for name, p in left.named_parameters() if p.requires_grad}
        torch.save({"weights": weights}, out / f"{each}.rank{rank}.pt")
