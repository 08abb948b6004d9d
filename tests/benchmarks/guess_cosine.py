"""Measures how near guesses come to backprop's gradient of the blocks, the exact last layer left out.

    python tests/benchmarks/guess_cosine.py --out docs/results/guess_cosine_benchmarks.json

A small CNN on the digits: two epochs of backprop, then five epochs in which the network stays as it is and the heads learn;
the cosine is the mean over the last of them.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import lightning.pytorch as pl
import torch
from run import row, write

import lightning_bpfree as bpf
from lightning_bpfree.cli.compare.results import confidence
from lightning_bpfree.demos.data import DigitsDataModule
from lightning_bpfree.demos.modules import Classifier, SmallCNN
from lightning_bpfree.functional import cosine

BLOCKS, EPOCHS, SEEDS = ["features.*"], 5, (0, 1, 2)
GUESSES = {
    "random": lambda space: bpf.ForwardGradient(space=space, blocks=BLOCKS),
    "local": lambda space: bpf.ForwardGradient(space=space, guess=bpf.LocalLoss(blocks=BLOCKS)),
    "reset": lambda space: bpf.ForwardGradient(space=space, guess=bpf.LocalLoss(blocks=BLOCKS, update="reset")),
    "freeze": lambda space: bpf.ForwardGradient(space=space, guess=bpf.LocalLoss(blocks=BLOCKS, update="freeze")),
}


class BlockCosine(pl.Callback):
    """The cosine over the parameters of the blocks, in the last epoch."""

    def __init__(self, rule: bpf.TrainingRule) -> None:
        self.rule, self.found = rule, []

    def on_fit_start(self, trainer, pl_module) -> None:
        self.rule.observers.append(self)

    def due(self, trainer) -> bool:
        return trainer.current_epoch == EPOCHS - 1

    def observe(self, trainer, module, step, estimate) -> None:
        slots = [slot for slot in step.trained if "features" in slot.name]
        with torch.enable_grad():
            grads = torch.autograd.grad(step.loss(recorded=False), [slot.parameter for slot in slots])
        truth = {slot.name: grad for slot, grad in zip(slots, grads, strict=True)}
        made = estimate.resolved()
        self.found.append(float(cosine({name: made[name] for name in truth}, truth)))


def fit(module: pl.LightningModule, epochs: int, *callbacks: pl.Callback) -> None:
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_val_batches=0,
        log_every_n_steps=1,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, DigitsDataModule(batch_size=64))


def measured(name: str, space: str, seed: int) -> float:
    pl.seed_everything(seed, verbose=False)
    net = SmallCNN((1, 8, 8), [16, 32, 64], norm="group")
    fit(Classifier(net, lr=0.05, momentum=0.9), 2)
    rule = GUESSES[name](space)
    watch = BlockCosine(rule)
    fit(Classifier(net, lr=1e-12), EPOCHS, rule, watch)  # the network stays: its weights do not move at this rate
    return statistics.fmean(watch.found)


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    rows = []
    for space in ("weights", "activations"):
        for name in GUESSES:
            found = [measured(name, space, seed) for seed in SEEDS]
            what = (
                f"cosine to backprop's gradient over the blocks' parameters, one dual pass a block; small CNN on the "
                f"digits after 2 epochs; ± {confidence(found):.3f} (95 % interval), seeds {', '.join(map(str, SEEDS))}"
            )
            rows.append(row(f"{name} guess, {space}", what, statistics.fmean(found), unit=""))
    write(rows, f"python tests/benchmarks/guess_cosine.py --out {out}", out)


if __name__ == "__main__":
    main()
