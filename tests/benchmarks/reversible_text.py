"""Measures how far apart trainings of the language model end that differ by rounding alone.

    python tests/benchmarks/reversible_text.py --out docs/results/reversible_text_benchmarks.json    # about 20 minutes

The recipe papers/pareprop_text, for each seed: with all activations stored; the same from first weights one rounding away;
and with recovered inputs.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import lightning.pytorch as pl
import torch
from reversible_meters import measured
from run import run_parts

from lightning_bpfree.cli.common.configured import Blueprint
from lightning_bpfree.cli.common.evaluation import evaluated
from lightning_bpfree.cli.common.recipes import config_arguments

SEEDS, FIRST = (0, 1, 2), 100  # the second: steps before rounding has grown


class Losses(pl.Callback):
    """Keeps the loss of every batch; may move the first weights by one rounding."""

    def __init__(self, rounded: bool) -> None:
        self.rounded = rounded
        self.values: list[torch.Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with torch.no_grad():
            for p in pl_module.parameters() if self.rounded else ():
                p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"].detach().double())


def trained(schedule: str, seed: int, rounded: bool = False) -> tuple[torch.Tensor, float]:
    """Return the losses of all steps, and that of the test."""
    losses = Losses(rounded)
    recipe = Blueprint(config_arguments(["papers/pareprop_text", f"papers/pareprop_text/{schedule}"]))
    built = recipe.build(seed=seed, callbacks=[losses])
    built.trainer.fit(built.module, datamodule=built.data)
    found = evaluated("test", built.trainer, built.module, built.data)
    return torch.stack(losses.values), found["test_loss"]


def text() -> list[dict[str, object]]:
    rows = []
    for seed in SEEDS:
        stored, test = trained("autograd", seed)
        others = {
            "autograd, first weights one rounding away": trained("autograd", seed, rounded=True),
            "sequential": trained("sequential", seed),
        }
        for name, (losses, other) in others.items():
            off = ((losses - stored) / stored).abs()
            what = f"largest relative difference of the loss from autograd's; test losses {other:.3f} and {test:.3f}"
            for steps in (FIRST, len(off)):
                label = f"text, {name}, seed {seed}, steps 1 to {steps:,}"
                rows.append(measured(label, what, float(off[:steps].max()), None, ""))
    return rows


if __name__ == "__main__":
    COMMAND = "python tests/benchmarks/reversible_text.py --out docs/results/reversible_text_benchmarks.json"
    run_parts({"text": text}, COMMAND, __doc__, transformers=importlib.metadata.version("transformers"))
