"""What each of two ranks of a team does; `test_team_on_two_ranks.py` runs this file, and compares what the ranks wrote.

    python team_worker.py fits|nan OUT_DIR

Lightning starts rank 1 by running the file again. Every case writes `<case>.rank<r>.pt`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf

RANK = int(os.environ.get("LOCAL_RANK", "0"))
SEED, STEPS, ROWS = 11, 4, 32  # ROWS of both ranks together, in each of STEPS batches
NAN_AT = 1  # the batch whose reward is not a number, on rank 1

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the rule, and of the Trainer
    "boltzmann": ({"exploration": "boltzmann", "baseline": "per_layer", "lateral_lr": 0.05}, {}),
    "negative_phase": ({"exploration": bpf.Boltzmann(2, whole_network=True), "negative_phase": True}, {}),
    "accumulated": ({"exploration": "recurrent", "baseline": "critic"}, {"accumulate_grad_batches": 2}),
    "map": (
        {"unit": "gaussian", "credit": "map_propagation", "baseline": "critic", "learning_rates": (1, 0.5, 0.1)},
        {},
    ),
    "weight_max": ({"credit": "weight_max", "num_samples": 2}, {"gradient_clip_val": 0.05}),
}


class Net(pl.LightningModule):
    """A classifier in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class Watch(pl.Callback):
    """Keeps what this rank makes of a batch, and what the optimizer gets; stands before the rule."""

    def __init__(self, rule: bpf.TeamReinforce) -> None:
        self.rule = rule
        self.own: list[dict[str, Tensor]] = []
        self.given: list[dict[str, Tensor]] = []
        self.lateral: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.rule.observers.append(self)

    def due(self, trainer) -> bool:
        return True

    def observe(self, trainer, module, step, estimate) -> None:
        self.own.append({name: gradient.clone() for name, gradient in estimate.resolved().items()})

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.given.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})
        sums = self.rule._lateral._sums.items()
        self.lateral.append({key: gradients[0].clone() / times for key, (gradients, times) in sums})


def data(same: bool = False) -> DataLoader:
    """This rank's part of every batch, or the same part on both."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS * ROWS, 6, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).argmax(1)
    share, rank = ROWS // 2, 0 if same else RANK
    starts = [batch * ROWS + rank * share for batch in range(STEPS)]
    return DataLoader(TensorDataset(x, y), batch_sampler=[list(range(start, start + share)) for start in starts])


def fit(rule: bpf.TeamReinforce, loader: DataLoader, **settings: Any) -> dict[str, Any]:
    """Train under ddp; returns all that the tests compare."""
    torch.manual_seed(SEED + RANK)  # the start is rank 0's all the same
    watch = Watch(rule)
    options: dict[str, Any] = {"max_epochs": 2, "use_distributed_sampler": False, "log_every_n_steps": 1}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch, rule],
        **{**options, **settings},
    )
    module = Net()
    trainer.fit(module, loader)
    return {
        "world_size": trainer.world_size,
        "parameters": {name: p.detach().clone() for name, p in module.named_parameters()},
        "rule": rule.rule_state(),
        "own": watch.own,
        "given": watch.given,
        "lateral": watch.lateral,
        "skipped": rule.record.skipped,
    }


def same_batches() -> dict[str, Any]:
    """Both ranks get the same batches: what they draw is all that differs."""
    actions: list[Tensor] = []

    def reward(batch: Any, action: Tensor) -> Tensor:
        actions.append(action)
        return 2 * (action == batch[1].repeat(4)).double() - 1

    outcome = fit(bpf.TeamReinforce(reward=reward), data(same=True), max_epochs=1)
    return outcome | {"actions": actions}


def not_a_number(**settings: Any) -> dict[str, Any]:
    """Rank 1 meets a reward that is no number, in its second batch."""
    seen: list[int] = []

    def reward(batch: Any, action: Tensor) -> Tensor:
        seen.append(0)
        rewards = 2 * (action == batch[1].repeat(4)).double() - 1
        return rewards * torch.nan if RANK == 1 and len(seen) == NAN_AT + 1 else rewards

    return fit(bpf.TeamReinforce(reward=reward, on_nonfinite="skip", **settings), data(), max_epochs=1)


def main(what: str, out: Path) -> None:
    if what == "fits":
        for name, (settings, options) in CASES.items():
            rule = bpf.TeamReinforce(**settings)
            torch.save(fit(rule, data(), **options), out / f"{name}.rank{RANK}.pt")
        torch.save(same_batches(), out / f"same.rank{RANK}.pt")
        torch.save(not_a_number(), out / f"nan.rank{RANK}.pt")
    else:
        outcome = not_a_number(exploration="boltzmann", baseline="per_layer")
        torch.save(outcome, out / f"nan_lateral.rank{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
