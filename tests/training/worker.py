"""What each of two ranks does; `test_two_ranks.py` runs this file, and compares what the ranks wrote.

    python worker.py PART[,PART ...] OUT_DIR    # of ddp, local, data, directions, evolution and drift

Lightning starts rank 1 by running the file again. Every case writes `<part>/<case>.rank<r>.pt`: final parameters,
losses, and the rule's counters, or the error that stopped it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from shipped import cases
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf

RANK = int(os.environ.get("LOCAL_RANK", "0"))
SEED = 11
STEPS, ROWS = 4, 64  # optimizer steps, and rows of all ranks together in each

Rules = dict[str, Callable[..., bpf.TrainingRule]]
RULES: Rules = cases("RANKS")
LOCAL_RULES: Rules = cases("LOCAL_RANKS")
DIRECTION_RULES: Rules = cases("SHARED_RANKS")
EVOLUTION_RULES: Rules = cases("POPULATION_RANKS")


class Net(pl.LightningModule):
    """Body and head; `noisy` has what differs between ranks and evaluations: BatchNorm and dropout."""

    def __init__(self, width: int = 8, noisy: bool = False, optimizer: str = "sgd") -> None:
        super().__init__()
        noise = [nn.BatchNorm1d(width), nn.Dropout(0.3)] if noisy else []
        self.body = nn.Sequential(nn.Linear(6, width), *noise, nn.Tanh())
        self.head = nn.Linear(width, 3)
        self.optimizer = optimizer

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self.head(self.body(x)), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Whole(Net):
    """The same as one network, for rules with a loss in every block; every batch has whole numbers of rows a rank."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        del self.body, self.head

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Validated(Net):
    """The same with a validation step."""

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.head(self.body(x)), y), sync_dist=True)


class Witness(pl.Callback):
    """Keeps what went in and came out: a fingerprint of every batch, and its loss as Lightning got it."""

    def __init__(self) -> None:
        self.batches: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batches.append(float(batch[0].double().sum()))
        self.losses.append(float(outputs["loss"]) if outputs else float("nan"))


class Drift(pl.Callback):
    """Moves rank 1's weights at the last batch, as a faulty callback or a broken machine would."""

    def __init__(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.move = move

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == STEPS - 1:
            weight = pl_module.head.weight.data
            weight.copy_((weight * 2**20).round() / 2**20)  # on all ranks; now sums of weights are exact in any order
            if trainer.global_rank == 1:
                weight.copy_(self.move(weight))


def last_bit_moved(weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` with the smallest change that one of its numbers can have."""
    moved = weight.clone().flatten()
    smallest = moved.abs().argmin()
    moved[smallest] = torch.nextafter(moved[smallest], torch.tensor(9.0, dtype=moved.dtype))
    return moved.view_as(weight)


def table(dtype: torch.dtype = torch.float64) -> TensorDataset:
    """Three classes by the largest of three random projections; four times the rows of a fit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * STEPS * ROWS, 6, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).argmax(1)
    return TensorDataset(x.to(dtype), y)


def split_rows(rank: int, world: int, batches: int = STEPS, nan_at: int | None = None) -> DataLoader:
    """This rank's part of every batch: the union over ranks is what one process gets."""
    data, share = table(), ROWS // world
    if nan_at is not None:
        data.tensors[0][nan_at * ROWS + rank * share] = float("nan")
    starts = [batch * ROWS + rank * share for batch in range(batches)]
    return DataLoader(data, batch_sampler=[list(range(start, start + share)) for start in starts])


def fit(
    module: pl.LightningModule,
    data: DataLoader,
    *callbacks: pl.Callback,
    val: DataLoader | None = None,
    checkpoint: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Fit on CPUs, from a checkpoint on if there is one; returns all that the tests compare."""
    options = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    witness = Witness()
    trainer = pl.Trainer(callbacks=[*callbacks, witness], **{**options, **settings})
    trainer.fit(module, data, val, ckpt_path=checkpoint)
    rules = [callback for callback in callbacks if isinstance(callback, bpf.TrainingRule)]
    alignments = [callback for callback in callbacks if isinstance(callback, bpf.GradientAlignment)]
    return {
        "strategy": type(trainer.strategy).__name__,
        "world_size": trainer.world_size,
        "parameters": {name: p.detach().clone() for name, p in module.named_parameters()},
        "buffers": {name: b.clone() for name, b in module.named_buffers()},
        "batches": witness.batches,
        "losses": witness.losses,
        "record": [rule.record.state_dict() for rule in rules],
        "bytes_sent": getattr(trainer.strategy, "bytes_sent", None),
        "cosine": [(alignment.measured, alignment.mean_cosine) for alignment in alignments],
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }


# --- cases: what both ranks do, and what one process does instead ---


def union(rule: str, rank: int, world: int, accumulate: bool = False, **settings: Any) -> dict[str, Any]:
    """Train on this rank's part of every batch, in float64; with `accumulate`, two batches a step, and clipped."""
    torch.manual_seed(SEED + rank)  # the start is rank 0's all the same
    settings |= {"devices": world}
    if accumulate:
        settings |= {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    data = split_rows(rank, world, batches=2 * STEPS if accumulate else STEPS)
    return fit(Net().double(), data, RULES[rule](), **settings)


def aligned(rule: str, rank: int, world: int, **settings: Any) -> dict[str, Any]:
    """Measure the estimate against backprop on this rank's part of every batch."""
    torch.manual_seed(SEED + rank)
    watch = bpf.GradientAlignment(every_n_steps=1)
    return fit(Net().double(), split_rows(rank, world), RULES[rule](), watch, devices=world, **settings)


def noisy(rule: str, *callbacks: pl.Callback, epochs: int = 2, seed: int = SEED, **settings: Any) -> dict[str, Any]:
    """Two epochs with BatchNorm, dropout, shuffled data, validation and AdamW; ranks start differently."""
    torch.manual_seed(seed + RANK)
    rows = table(torch.float32)
    train, val = DataLoader(rows, ROWS // 2, shuffle=True), DataLoader(TensorDataset(*rows[:ROWS]), 16)
    module = Validated(noisy=True, optimizer="adamw")
    settings |= {"devices": 2, "max_epochs": epochs, "limit_train_batches": STEPS, "use_distributed_sampler": True}
    return fit(module, train, RULES[rule](), *callbacks, val=val, **settings)


def resumed(rule: str, **settings: Any) -> dict[str, Any]:
    """Do the same, but stop after the first of both epochs and begin again, with other random numbers to start from."""
    folder = Path(sys.argv[2]) / "checkpoints"
    saved = pl.callbacks.ModelCheckpoint(folder, f"{settings['strategy']}_{rule}", every_n_epochs=1)
    noisy(rule, saved, epochs=1, enable_checkpointing=True, **settings)
    return noisy(rule, seed=SEED + 5, checkpoint=folder / f"{settings['strategy']}_{rule}.ckpt", **settings)


def head_only(rule: str, **settings: Any) -> dict[str, Any]:
    """Train the head alone, under an optimizer that would decay the rest if it had a gradient of zeros."""
    torch.manual_seed(SEED)
    module = Net(optimizer="adamw").double()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    outcome = fit(module, split_rows(RANK, 2), RULES[rule](params="head.*"), devices=2, **settings)
    return outcome | {"before": before}


def nan_batch(rule: str, rank: int, world: int, on_nonfinite: str = "skip", **settings: Any) -> dict[str, Any]:
    """Meet a NaN in the second batch, in the last rank's part of it."""
    torch.manual_seed(SEED)
    data = split_rows(rank, world, nan_at=1 if rank == world - 1 else None)
    return fit(Net().double(), data, RULES[rule](on_nonfinite=on_nonfinite), devices=world, **settings)


def refused(*callbacks: pl.Callback, **settings: Any) -> dict[str, Any]:
    """Start a fit that must not start."""
    return fit(Net().double(), split_rows(RANK, 2), *callbacks, devices=2, **settings)


def same_batch(rule: bpf.TrainingRule, world: int, **settings: Any) -> dict[str, Any]:
    """Train on whole batches, the same on every rank."""
    torch.manual_seed(SEED)
    return fit(Net().double(), split_rows(0, 1), rule, devices=world, **settings)


class Flat(Net):
    """In its second batch, rank 1 sees the same loss whatever the weights."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 0 if RANK == 1 and batch_idx == 1 else loss


def evolved(
    rule: bpf.TrainingRule, module: Net | None = None, own_rows: bool = False, **settings: Any
) -> dict[str, Any]:
    """Train by a population, on whole batches or on this rank's part of them; what the search has learned is kept."""
    torch.manual_seed(SEED)
    module = Net() if module is None else module
    rule.seed = SEED
    data = split_rows(RANK, 2) if own_rows else split_rows(0, 1)
    outcome = fit(module.double(), data, rule, **settings)
    return outcome | {"std": rule.rule_state()["algorithm"]["std"]}


def evolution_cases() -> dict[str, Callable[[], dict[str, Any]]]:
    """Populations split over ranks, or measured by every rank on data of its own."""
    cases: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, make in EVOLUTION_RULES.items():
        split = bpf.ScalarSyncStrategy(split="population")
        cases[f"split_{name}"] = partial(evolved, make(), devices=2, strategy=split)
        for strategy in ("ddp", "bpfree_scalar_sync"):
            own = {"own_rows": True, "devices": 2, "strategy": strategy}
            cases[f"{strategy}_{name}"] = partial(evolved, make(), **own)
            cases[f"{strategy}_accumulated_{name}"] = partial(evolved, make(), accumulate_grad_batches=2, **own)
    cases["flat"] = partial(evolved, EVOLUTION_RULES["snes"](), Flat(), own_rows=True, devices=2, strategy="ddp")
    return cases


def local(name: str, rank: int, world: int, **settings: Any) -> dict[str, Any]:
    """Train on this rank's part of every batch by losses in blocks; what the rule keeps beside is compared too."""
    torch.manual_seed(SEED + rank)
    rule = LOCAL_RULES[name]()
    rule.seed = SEED  # else it is the random stream's, which differs between ranks and one process
    outcome = fit(Whole().double(), split_rows(rank, world), rule, devices=world, max_epochs=2, **settings)
    state = rule.rule_state()
    own = state["guided"]["guess"] if "guided" in state else state.get("own")
    return outcome | {"own": own and next(iter(own.values()))["module"]}


def local_cases() -> dict[str, Callable[[], dict[str, Any]]]:
    """Rules with losses of their own, under plain DDP."""
    return {name: partial(local, name, RANK, 2, strategy="ddp") for name in LOCAL_RULES}


def ddp_cases() -> dict[str, Callable[[], dict[str, Any]]]:
    """All rules under plain DDP."""
    cases: dict[str, Callable[[], dict[str, Any]]] = {}
    for rule in RULES:
        cases[f"union_{rule}"] = partial(union, rule, RANK, 2, strategy="ddp")
        cases[f"accumulate_{rule}"] = partial(union, rule, RANK, 2, accumulate=True, strategy="ddp")
        cases[f"noisy_{rule}"] = partial(noisy, rule, strategy="ddp")
        cases[f"resumed_{rule}"] = partial(resumed, rule, strategy="ddp")
        cases[f"head_{rule}"] = partial(head_only, rule, strategy="ddp")
        cases[f"aligned_{rule}"] = partial(aligned, rule, RANK, 2, strategy="ddp")
        if rule != "backprop":
            cases[f"nan_{rule}"] = partial(nan_batch, rule, RANK, 2, strategy="ddp")
    return cases


def data_cases() -> dict[str, Callable[[], dict[str, Any]]]:
    """All rules whose estimate is a function of a few numbers, which ranks exchange; each rank has data of its own."""
    strategy = {"strategy": "bpfree_scalar_sync"}
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "refused_backprop": partial(refused, bpf.Backprop(), **strategy),
        "refused_start_epoch": partial(refused, bpf.ZerothOrder(start_epoch=1), **strategy),
        "refused_stop_epoch": partial(refused, bpf.ZerothOrder(stop_epoch=1), **strategy),
        "refused_no_rule": partial(refused, **strategy),
    }
    for rule in [name for name in RULES if name != "backprop"]:
        cases[f"union_{rule}"] = partial(union, rule, RANK, 2, **strategy)
        cases[f"accumulate_{rule}"] = partial(union, rule, RANK, 2, accumulate=True, **strategy)
        cases[f"noisy_{rule}"] = partial(noisy, rule, **strategy)
        cases[f"resumed_{rule}"] = partial(resumed, rule, **strategy)
        cases[f"head_{rule}"] = partial(head_only, rule, **strategy)
        cases[f"aligned_{rule}"] = partial(aligned, rule, RANK, 2, **strategy)
        cases[f"nan_{rule}"] = partial(nan_batch, rule, RANK, 2, **strategy)
        cases[f"raise_{rule}"] = partial(nan_batch, rule, RANK, 2, on_nonfinite="raise", **strategy)
        for width in (8, 80):
            module = Net(width).double()
            cases[f"width{width}_{rule}"] = partial(
                fit, module, split_rows(RANK, 2), RULES[rule](), devices=2, **strategy
            )
    return cases


def direction_cases() -> dict[str, Callable[[], dict[str, Any]]]:
    """All ranks see the same batch, and share the directions out among themselves."""

    def strategy() -> bpf.ScalarSyncStrategy:
        return bpf.ScalarSyncStrategy(split="directions")

    cases: dict[str, Callable[[], dict[str, Any]]] = {
        f"same_{name}": partial(same_batch, rule(), 2, strategy=strategy()) for name, rule in DIRECTION_RULES.items()
    }
    for rule in ("loop", "vectorized", "zeroth"):
        cases[f"noisy_{rule}"] = partial(noisy, rule, strategy=strategy())
        cases[f"nan_{rule}"] = partial(nan_batch, rule, RANK, 2, strategy=strategy())
    return cases


def drift_cases() -> dict[str, Callable[[], dict[str, Any]]]:
    """Rank 1 leaves the common path: plainly, in the last bit of one weight, or without changing any sum."""
    moves: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "push": lambda weight: weight + 1e-3,
        "last_bit": last_bit_moved,
        "flip": lambda weight: weight.flip(0),
    }
    settings = {"devices": 2, "max_epochs": 2, "strategy": "bpfree_scalar_sync"}
    return {
        f"drift_{name}": partial(fit, Net().double(), split_rows(RANK, 2), bpf.ZerothOrder(2), Drift(move), **settings)
        for name, move in moves.items()
    }


CASES = {
    "ddp": ddp_cases,
    "local": local_cases,
    "data": data_cases,
    "directions": direction_cases,
    "evolution": evolution_cases,
    "drift": drift_cases,
}


def main(part: str, out: Path) -> None:
    out.mkdir(exist_ok=True)
    for name, case in CASES[part]().items():
        try:
            outcome = case()
        except Exception as error:
            outcome = {"error": f"{type(error).__name__}: {error}"}
        torch.save(outcome, out / f"{name}.rank{RANK}.pt")


if __name__ == "__main__":
    for part in sys.argv[1].split(","):
        main(part, Path(sys.argv[2]) / part)
