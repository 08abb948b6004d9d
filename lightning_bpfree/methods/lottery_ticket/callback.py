"""Iterative pruning with rewinding: all levels of a lottery ticket in one fit, with any training rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_bpfree.core.arguments import OpenFraction, Patterns, PositiveInt, check_attributes, checked
from lightning_bpfree.core.params import ParameterSlots, Slot
from lightning_bpfree.methods.lottery_ticket.companions import check_companions, check_launcher, check_writable
from lightning_bpfree.methods.lottery_ticket.levels import Levels
from lightning_bpfree.methods.lottery_ticket.masks import Masks
from lightning_bpfree.methods.lottery_ticket.plan import Plan, Score, Sparsities, TicketArguments, Weights
from lightning_bpfree.methods.lottery_ticket.pruning import Scope
from lightning_bpfree.methods.lottery_ticket.rewinding import check_redrawable
from lightning_bpfree.methods.lottery_ticket.scores import check_has_deviations, deviations
from lightning_bpfree.methods.lottery_ticket.ticket import Ticket
from lightning_bpfree.training.checks import check_made, check_whole_parameters
from lightning_bpfree.training.logging_of_rules import log_settings
from lightning_bpfree.training.saved_streams import SavedStreams
from lightning_bpfree.training.trainer_attributes import callbacks_of, is_dry_run, without_module
from lightning_bpfree.training.training_rule import TrainingRule


class LotteryTicket(Callback):
    """Finds sparse trainable initializations: trains, prunes the weights with the lowest scores, rewinds, trains again.

    One fit runs all levels. Level ``i``, from 0, trains the epochs from ``i * epochs_per_level`` on. Before the next
    level, the trained weights are scored, all but the best are pruned, and the rest are rewound to the first
    initialization bit for bit, buffers included. ``configure_optimizers`` creates new optimizers and schedulers, and
    the training rule restarts its search. Pruned weights are exactly zero in every batch and checkpoint, and biases
    (all parameters with fewer than two dimensions) are never pruned. Works with every rule of this package, and without
    a rule.

    Every finished level saves a :class:`Ticket` in ``dirpath``: ``level_00.pt``, ``level_01.pt`` and so on.
    Checkpoints hold the first initialization, and resume exactly, also between two levels.

    These arguments select the methods of Lange & Sprekeler (2023): SNR tickets ``score="snr"``; magnitude tickets
    ``score="magnitude"``; ``random-reinit`` ``score="random", weights="fresh"`` (its masks are redrawn at every level);
    ``mask-reinit`` ``score="magnitude", weights="fresh"``; ``final-ticket_permute`` ``weights="permuted"``;
    ``final_permute-ticket_permute`` the same with ``permute_masks=True``; SNIP ``score="snip"``.

    A schedule in ``configure_optimizers`` should span one level; ``trainer.estimated_stepping_batches`` counts all
    levels. ``EarlyStopping`` and ``ModelCheckpoint(monitor=...)`` restart at every level; the former ends the whole
    fit.

    Args:
        score: ``"snr"``: weight divided by its deviation in the rule's search, which must have one for every weight;
            ``"magnitude"``; ``"random"``; ``"snip"``: |w dL/dw| at the first initialization over the training set, one
            backprop pass at the start of the fit.
        levels: number of levels, >= 1, including the dense one.
        keep: share of the previous level's weights that a level keeps, in (0, 1).
        sparsities: the share of pruned weights at every level, in [0, 1) and never decreasing; replaces ``levels`` and
            ``keep``.
        epochs_per_level: >= 1. The Trainer's ``max_epochs`` must cover all levels; extra epochs train the last level.
        scope: ``"global"``: the lowest scores over all layers together; ``"layer"``: the same share of every layer.
        weights: ``"init"``: rewind; ``"fresh"``: initialize again at every level, by ``reset_parameters()`` of the
            module if it has that method, or of its parts; ``"permuted"``: the surviving weights of the first
            initialization in random order within each tensor.
        permute_masks: permute every mask randomly within its tensor.
        params: shell-style patterns of the parameters that may be pruned; None for all that the rule trains.
        exclude: patterns of parameters that stay dense; None for none.
        init_from: a ticket, or its file: the first level trains it, and later levels prune it further. Sparsities are
            relative to the dense network, and by default continue from the ticket's.
        dirpath: folder for the tickets; None uses ``tickets`` in the Trainer's ``default_root_dir``.
        seed: seed of random masks, fresh weights and permutations; None uses torch's initial seed of rank 0.

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> tickets = LotteryTicket(score="magnitude", levels=3, keep=0.5, epochs_per_level=2)
        >>> tickets.plan.sparsities
        [0.0, 0.5, 0.75]

    References:
        R. T. Lange, H. Sprekeler, "Lottery Tickets in Evolutionary Optimization", 2023, arXiv 2306.00045.
        J. Frankle, M. Carbin, "The Lottery Ticket Hypothesis", 2019, arXiv 1803.03635.
        N. Lee, T. Ajanthan, P. H. S. Torr, "SNIP", 2019, arXiv 1810.02340.
    """

    logged: ClassVar[dict[str, str]] = {
        "bpfree/ticket/level": "level of pruning, from 0",
        "bpfree/ticket/weights_left": "share of the weights that are not pruned",
    }

    @checked
    def __init__(
        self,
        score: Score = "snr",
        levels: PositiveInt = 8,
        keep: OpenFraction = 0.8,
        sparsities: Sparsities | None = None,
        epochs_per_level: PositiveInt = 1,
        *,
        scope: Scope = "global",
        weights: Weights = "init",
        permute_masks: bool = False,
        params: Patterns | None = None,
        exclude: Patterns | None = None,
        init_from: str | Path | Ticket | None = None,
        dirpath: str | Path | None = None,
        seed: int | None = None,
    ) -> None:
        self.score, self.levels, self.keep, self.sparsities = score, levels, keep, sparsities
        self.epochs_per_level, self.scope, self.weights = epochs_per_level, scope, weights
        self.permute_masks, self.params, self.exclude, self.seed = permute_masks, params, exclude, seed
        self.init_from, self.dirpath = init_from, dirpath
        self._levels = Levels(self._given())
        self._slots: dict[str, Slot] = {}
        self._deviations_seen = False
        self._streams = SavedStreams()

    def _given(self) -> TicketArguments:
        """Return the arguments as they are now, checked against one another."""
        return TicketArguments(**{name: getattr(self, name) for name in TicketArguments.names()})

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy or pickle, without the module's parameters."""
        return {**without_module(self.__dict__), "_slots": {}}

    # --- what a run has found ---

    @property
    def plan(self) -> Plan:
        """The epochs and sparsity of every level; without the ticket of ``init_from``."""
        return self._given().plan

    @property
    def level(self) -> int:
        """The current level, or the last one after training."""
        return self._levels.level

    @property
    def masks(self) -> Masks | None:
        """The masks of the current level; None while it is dense."""
        return self._levels.masks

    @property
    def results(self) -> list[dict[str, Any]]:
        """One dict per finished level: ``level``, ``kept``, ``total``, ``weights_left``, ``sparsity``, ``metrics``."""
        return self._levels.results

    @property
    def tickets(self) -> list[Ticket]:
        """The tickets of finished levels, read from their files."""
        return [Ticket.load(self._levels.path(result["level"])) for result in self.results]

    def settings(self) -> dict[str, Any]:
        """Return the arguments as plain values for loggers."""
        given = self._given()
        return given.settings(given.plan if self.init_from is None else self._levels.plan)

    # --- one fit ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse unsupported settings before training."""
        if stage != "fit":
            return
        check_attributes(self)  # which may have been set since
        rules = callbacks_of(trainer, TrainingRule)
        check_made("LotteryTicket", pl_module)
        check_whole_parameters("LotteryTicket", trainer, "strategy='ddp' or 'bpfree_scalar_sync'")
        check_companions(trainer)
        check_launcher(trainer)
        self.plan.check_epochs(trainer)
        self._levels = Levels(self._given(), rules[0] if rules else None)
        self._levels.folder = Path(self.dirpath or Path(trainer.default_root_dir) / "tickets")
        if trainer.is_global_zero and not is_dry_run(trainer):
            check_writable(self._levels.folder)
        self._deviations_seen = self.score != "snr" or self.plan.levels == 1
        if not self._deviations_seen:
            check_has_deviations(self._levels.rule)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the first initialization, or load a ticket's; called before the validation sanity check."""
        self._streams.watch(pl_module.device)
        self._streams.on_fit_start(trainer)
        self._levels.open(trainer, pl_module)
        if self.weights == "fresh":
            check_redrawable(pl_module, self._levels.trained(pl_module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the first level, or resume that of a checkpoint, after all callbacks have restored their state."""
        self._levels.begin(trainer, pl_module)
        self._collect(pl_module)
        rule = self._levels.rule
        entry = {} if rule is None else {"rule": type(rule).__name__, **rule.settings()}
        # The entry is written whole, for loggers replace what they have under the same name.
        log_settings(trainer, pl_module, {"bpfree": {**entry, "ticket": self.settings()}})

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the next level if due; by now, all callbacks have seen the trained weights of the last one."""
        self._levels.advance(trainer, pl_module)
        self._collect(pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the next level after a resume at the end of an epoch, where Lightning starts no new epoch."""
        self._streams.on_train_batch_start(trainer, batch_idx)
        if batch_idx == 0 and self._levels.advance(trainer, pl_module):
            self._collect(pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Exclude the gradients of pruned weights from norms, clipping and moments."""
        grads = {name: slot.parameter.grad for name, slot in self._slots.items()}
        self._zero({name: grad for name, grad in grads.items() if grad is not None and not grad.is_sparse})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Set pruned weights to exact zeros after the optimizer's step."""
        self._zero({name: slot.parameter for name, slot in self._slots.items()})
        rule = self._levels.rule
        if not self._deviations_seen and isinstance(rule, TrainingRule) and rule.active(trainer.current_epoch):
            # What is missing is said after one batch rather than after one level.
            deviations(self._levels.std(), self._levels.names, rule)
            self._deviations_seen = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the level and the share of weights left."""
        if trainer.barebones:
            return
        left = 1.0 if self.masks is None else self.masks.weights_left
        values = {"bpfree/ticket/level": float(self.level), "bpfree/ticket/weights_left": left}
        pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=trainer.world_size > 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish the last level, which keeps its trained weights."""
        if self.level < self._levels.plan.levels - 1:
            rank_zero_warn(
                f"LotteryTicket: the fit ends in level {self.level} of {self._levels.plan.levels}, counted from 0. To "
                "train the others, raise max_epochs or max_steps, or remove what stopped the fit."
            )
        self._levels.finish(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore exact zeros again: other callbacks may have set the weights at the end of training."""
        self._zero({name: slot.parameter for name, slot in self._slots.items()})

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the rule's masks: its next fit may train a dense module."""
        if stage == "fit":
            self._levels.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the rule's masks: Lightning calls no teardown hooks after an exception."""
        self._levels.close()

    def _collect(self, module: pl.LightningModule) -> None:
        """Find the masked parameters: once an epoch, for walking a large module takes time."""
        masks = self.masks
        self._slots = (
            {} if masks is None else {slot.name: slot for slot in ParameterSlots(module) if slot.name in masks}
        )

    def _zero(self, tensors: dict[str, Tensor]) -> None:
        if self.masks is not None:
            self.masks.apply_(tensors, missing_ok=True)

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Return the state for an exact resume: level, masks, first initialization, finished levels."""
        state = self._levels.state_dict()
        # A rule saves the streams too, and the same ones.
        return {**state, "streams": self._streams.to_plain()} if state else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self._levels.load_state_dict(state_dict)
        self._streams.take(state_dict.get("streams", []))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the metrics so far, which Lightning does not restore on resume."""
        own = checkpoint.get("callbacks", {}).get(self.state_key)
        if own:
            own["streams"] = self._streams.of_all_ranks(trainer, own["streams"])
            own["metrics"] = self._levels.metrics(trainer)
