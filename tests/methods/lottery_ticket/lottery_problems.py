"""A search of the loss and a module that watches it, for the tests of LotteryTicket."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from problems import Problem, Tied, fitted, loader
from torch import nn

from lightning_bpfree import LotteryTicket, ZerothOrder
from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.methods.lottery_ticket.masks import Masks


class Search(ZerothOrder):
    """Stands in for an evolution strategy with a deviation for every weight; what it has learned is its steps."""

    def __init__(self, scalar: bool = False, floor: bool = False, **settings) -> None:
        super().__init__(**settings)
        self.scalar, self.floor = scalar, floor
        self.calls: list[str] = []
        self.masks: Masks | None = None
        self.searched: Masks | None = None
        self.steps = 0

    def estimate(self, step):
        self.steps += 1
        return super().estimate(step)

    def restrict(self, masks: Masks | None) -> None:
        self.calls.append("restrict")
        self.masks = masks
        self.searched = self.searched if masks is None else masks

    def restart(self) -> None:
        self.calls.append("restart")
        self.steps = 0

    def std(self):
        self.calls.append("std")
        if self.scalar:
            return None
        generator = torch.Generator().manual_seed(self.steps)
        std = {}
        for slot in self._module_state.slots.trainable():
            drawn = torch.rand(slot.parameter.shape, generator=generator) + 0.1
            std[slot.name] = drawn.clamp_min(0.9) if self.floor else drawn
            if self.masks is not None and slot.name in self.masks:
                std[slot.name][~self.masks[slot.name]] = 0.0
        return std

    def rule_state(self):
        return {"steps": self.steps}

    def load_rule_state(self, state) -> None:
        self.steps = state["steps"]


class Watch(pl.Callback):
    """Copies what a level starts with, and looks for pruned weights that have moved."""

    def __init__(self, tickets: LotteryTicket) -> None:
        self.tickets = tickets
        self.starts: list[dict[str, torch.Tensor]] = []
        self.masks: list[Masks | None] = []
        self.optimizer_states: list[int] = []
        self.rates: list[float] = []
        self.checked = self.steps = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if trainer.current_epoch % self.tickets.plan.epochs_per_level == 0 and batch_idx == 0:
            self.starts.append(
                {n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}
            )
            self.masks.append(self.tickets.masks)
            self.steps = trainer.global_step
            self.optimizer_states.append(len(trainer.optimizers[0].state))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, *args) -> None:
        if self.tickets.masks is None:
            return
        named = {slot.name: slot.parameter for slot in ParameterSlots(module)}
        for name, mask in self.tickets.masks.items():
            assert torch.equal(named[name][~mask], torch.zeros(int((~mask).sum())))
        moved = [not torch.equal(named[n][mask], self.starts[-1][n][mask]) for n, mask in self.tickets.masks.items()]
        assert any(moved) == (trainer.global_step > self.steps), "the survivors train"
        self.checked += 1


def plain(**settings) -> Problem:
    torch.manual_seed(0)
    return Problem(Tied(dropout=0.0), **settings)


def wide() -> Problem:
    torch.manual_seed(0)
    return Problem(nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)))


def fit(folder, tickets: LotteryTicket, *callbacks, module=None, data=None, **settings):
    """Fit for as many epochs as the levels take; returns module and Trainer."""
    module = plain() if module is None else module
    epochs = tickets.plan.levels * tickets.plan.epochs_per_level
    settings = {"max_epochs": epochs, "default_root_dir": folder, **settings}
    return module, fitted(module, loader() if data is None else data, tickets, *callbacks, **settings)


def initial(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}
