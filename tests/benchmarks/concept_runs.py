"""What the parts of the study of concept backpropagation share: a fit, and the numbers of changed inputs."""

from __future__ import annotations

import lightning.pytorch as pl

import lightning_bpfree as bpf

UP = bpf.ChangeSettings(target=0.9)


def fit(module, data, epochs, *callbacks, seed=0):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data)
    return trainer


def summary(change, **more):
    """The numbers of changed inputs that every part reports."""
    absent = change.before < 0.1
    found = {
        "inputs": int(absent.sum()),
        "before": float(change.before[absent].mean()),
        "after": float(change.after[absent].mean()),
        "reached": float(change.reached[absent].float().mean()),
        "above": float((change.after[absent] > 0.9 - 1e-4).float().mean()),
        **{name: float(value[absent].mean()) for name, value in change.distance.items()},
    }
    return {**found, **more}


def listed(tensor, digits=2):
    return [[round(v, digits) for v in row.flatten().tolist()] for row in tensor.float()]
