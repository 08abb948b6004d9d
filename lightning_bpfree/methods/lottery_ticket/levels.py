"""The levels of a lottery ticket: pruning, rewinding, and the saved results of each level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_bpfree.core.params import ParameterSlots, Params
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.methods.lottery_ticket.companions import begin_level, restart_averages
from lightning_bpfree.methods.lottery_ticket.masks import Masks, Restricts
from lightning_bpfree.methods.lottery_ticket.plan import Plan, TicketArguments, check_selects, described, prunable_names
from lightning_bpfree.methods.lottery_ticket.pruning import num_kept, top_masks
from lightning_bpfree.methods.lottery_ticket.rewinding import captured, fresh_optimizers, redraw, rewind, shuffled
from lightning_bpfree.methods.lottery_ticket.scores import scored, snip_scores
from lightning_bpfree.methods.lottery_ticket.ticket import Ticket, on_cpu
from lightning_bpfree.training.refusal import RefusedNetworkError
from lightning_bpfree.training.trainer_attributes import is_dry_run
from lightning_bpfree.training.training_rule import BACKPROP_COST, TrainingRule

_MASKS, _PERMUTATION, _FRESH, _ORDER = range(4)  # what a level draws, each from its own seed


class Levels:
    """The state of one fit under ``LotteryTicket``.

    Args:
        given: the arguments of ``LotteryTicket``.
        rule: the training rule of the fit; None for plain Lightning.
    """

    def __init__(self, given: TicketArguments, rule: TrainingRule | None = None) -> None:
        self.given, self.rule, self.plan = given, rule, given.plan
        self.folder = Path("tickets")
        self.level, self.seed = 0, 0
        self.masks: Masks | None = None
        self.names: list[str] = []
        self.results: list[dict[str, Any]] = []
        self._init: Params = {}
        self._buffers: Params = {}
        self._scores: Params | None = None  # of SNIP
        self._metrics: dict[str, float] = {}
        self._resumed = False

    # --- start ---

    def open(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep the first initialization: the module's, or that of a ticket or checkpoint."""
        if self._resumed:
            self.masks = None if self.masks is None else self.masks.to(module.device)
            return
        seed = torch.initial_seed() if self.given.seed is None else self.given.seed
        self.seed = int(trainer.strategy.broadcast(seed)) & ((1 << 63) - 1)
        rule_params = None if self.rule is None else self.rule.params
        self.names = prunable_names(module, self.given.params, self.given.exclude, rule_params)
        self._init, self._buffers = captured(module)
        self._warn_of_zeros()
        if self.given.init_from is not None:
            self._take(self.given.init_from, module)
        if trainer.is_global_zero and any(self.folder.glob("level_*.pt")):
            rank_zero_warn(f"{self.folder} holds tickets of an earlier run, which this one writes over.")

    def _warn_of_zeros(self) -> None:
        zeros = [name for name in self.names if not bool(self._init[name].any())]
        if zeros and self.given.score == "magnitude" and self.plan.levels > 1:
            rank_zero_warn(
                f"LotteryTicket(score='magnitude'): {', '.join(zeros)} begin at zero, so training may leave their "
                "weights smaller than all others, and prune them entirely. Exclude them (exclude=), or use "
                "scope='layer'."
            )

    def _take(self, source: str | Path | Ticket, module: pl.LightningModule) -> None:
        ticket = source if isinstance(source, Ticket) else Ticket.load(source)
        check_selects(self.given.params, self.given.exclude, self.names, list(ticket.masks))
        given, self.names = self.given, list(ticket.masks)
        ticket.apply_to(module)
        self._init, self._buffers = dict(ticket.init), captured(module)[1]
        self.masks = ticket.masks.to(module.device)
        self.plan = self.plan.behind(ticket.masks, given.keep, given.sparsities, given.score)

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Set masks and weights of the first level, unless a checkpoint has restored its own."""
        if not self._resumed:
            if trainer.current_epoch > 0:
                raise MisconfigurationException(
                    f"The fit continues at epoch {trainer.current_epoch} without a state of LotteryTicket, so the "
                    "first initialization is lost. Begin a new fit (from a ticket: init_from=), or resume from a "
                    "checkpoint that was saved with LotteryTicket."
                )
            self._first(trainer, module)
            restart_averages(trainer, module)
        if isinstance(self.rule, Restricts):
            # If the rule cannot search under masks, that is said here rather than after a level.
            self.rule.restrict(Masks.dense({name: self._init[name] for name in self.names}))
            self.rule.restrict(self.masks)
            if not self._resumed:
                self.rule.restart()
        self._say()

    def _first(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        target = self.plan.sparsities[0]
        start = {name: self._init[name].to(module.device) for name in self.names}
        given, ticket = self.given, self.masks
        if given.score == "snip" and (self.plan.levels > 1 or target > 0):
            rewind(module, self._init, self._buffers)  # a ticket's pruned weights too: the score is of dense weights
            scores, batches = snip_scores(trainer, module, self.rule, self.names)
            self._scores = on_cpu(scores)
            if self.rule is not None:
                self.rule.record.forward_evals += BACKPROP_COST * batches
        total = sum(tensor.numel() for tensor in start.values())
        if num_kept(total, target) < (total if ticket is None else ticket.kept):
            self.masks = self._choose(target, start, None)
        if self.masks is not None:
            self._set(module, fresh=ticket is not None)  # without a ticket, the module's own start is fresh already

    # --- levels ---

    def advance(self, trainer: pl.Trainer, module: pl.LightningModule) -> bool:
        """Start the next level if it is due in this epoch; return whether it was."""
        if self.plan.level_at(trainer.current_epoch) <= self.level:
            return False
        std = self.finish(trainer, module)
        self.level += 1
        mean = {n: p for n, p in self._parameters(module).items() if n in self.names}
        try:
            self.masks = self._choose(self.plan.sparsities[self.level], mean, std)
        except ValueError as error:
            raise RefusedNetworkError(f"LotteryTicket, level {self.level} of {self.plan.levels}: {error}") from None
        self._set(module, fresh=True)
        fresh_optimizers(trainer, module)
        begin_level(trainer, module)
        if isinstance(self.rule, Restricts):
            self.rule.restrict(self.masks)
            self.rule.restart()
        self._say()
        return True

    def close(self) -> None:
        """Let the rule search all weights again."""
        if isinstance(self.rule, Restricts):
            self.rule.restrict(None)

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> Params | None:
        """Save the results of the level; return the deviations of the weights, if the rule has any."""
        std = self.std()
        masks = Masks.dense({n: self._init[n] for n in self.names}) if self.masks is None else self.masks
        metrics = self.metrics(trainer)
        result = {
            "level": self.level,
            "kept": masks.kept,
            "total": masks.total,
            "weights_left": masks.weights_left,
            "sparsity": masks.sparsity,
            "metrics": metrics,
        }
        self.results = [*(r for r in self.results if r["level"] != self.level), result]
        if trainer.is_global_zero and not is_dry_run(trainer):
            ticket = Ticket(
                masks,
                self._init,
                self.level,
                mean=self._parameters(module),
                std=std,
                buffers=self._buffers,
                mean_buffers=dict(module.named_buffers()),
                metrics=metrics,
                info=self._info(trainer, masks),
            )
            ticket.save(self.path(self.level))
        return std

    def std(self) -> Params | None:
        """Return the deviations of weights in the rule's search, or None."""
        return self.rule.std() if isinstance(self.rule, Restricts) else None

    def _choose(self, sparsity: float, mean: Params, std: Params | None) -> Masks:
        given, previous = self.given, self.masks
        if given.score == "snip":
            assert self._scores is not None, "scored at the start of the fit"
            scores = {name: score.to(mean[name].device) for name, score in self._scores.items()}
        else:
            scores = scored(given.score, mean, std, previous, rule=self.rule, seed=self._draw(_MASKS))
        if given.score == "random" and given.weights == "fresh":
            previous = None  # the baseline of fresh weights draws its masks again
        masks = top_masks(scores, sparsity, previous, given.scope)
        return masks.permuted(self._draw(_PERMUTATION)) if given.permute_masks else masks

    def _set(self, module: pl.LightningModule, fresh: bool) -> None:
        """Set the weights with which the level starts."""
        assert self.masks is not None
        permuted = self.given.weights == "permuted"
        init = shuffled(self._init, self.masks, self._draw(_ORDER)) if permuted else self._init
        rewind(module, init, self._buffers)
        if fresh and self.given.weights == "fresh":
            redraw(module, self.trained(module), self._draw(_FRESH))
        self.masks.apply_(self._parameters(module))

    # --- what is said and kept ---

    def trained(self, module: pl.LightningModule) -> list[str]:
        """Return the names of the parameters that training moves."""
        return [s.name for s in ParameterSlots(module, None if self.rule is None else self.rule.params).trainable()]

    def path(self, level: int) -> Path:
        """Return the file of a level's ticket."""
        return self.folder / f"level_{level:02d}.pt"

    def metrics(self, trainer: pl.Trainer) -> dict[str, float]:
        """Return the metrics logged so far, those from before a resume included."""
        return {**self._metrics, **{name: float(value) for name, value in trainer.callback_metrics.items()}}

    def _say(self) -> None:
        left = "all weights" if self.masks is None else described(self.masks)
        rank_zero_info(f"LotteryTicket, level {self.level} of {self.plan.levels}, {left}")

    def _info(self, trainer: pl.Trainer, masks: Masks) -> dict[str, Any]:
        return {
            "rule": None if self.rule is None else type(self.rule).__name__,
            **self.given.settings(self.plan),
            "seed": self.seed,
            "sparsity": masks.sparsity,
            "epochs_trained": trainer.current_epoch - self.level * self.plan.epochs_per_level,
        }

    def _draw(self, what: int) -> int:
        return mix(self.seed, self.level, what)

    def _parameters(self, module: pl.LightningModule) -> Params:
        return {slot.name: slot.parameter.detach() for slot in ParameterSlots(module)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain values and tensors; nothing before a fit."""
        if not self._init:
            return {}
        return {
            "level": self.level,
            "seed": self.seed,
            "names": list(self.names),
            "masks": None if self.masks is None else on_cpu(self.masks),
            "init": self._init,
            "buffers": self._buffers,
            "scores": self._scores,
            "sparsities": list(self.plan.sparsities),
            "epochs_per_level": self.plan.epochs_per_level,
            "arguments": self._arguments(),
            "results": [dict(result) for result in self.results],
            "metrics": dict(self._metrics),
        }

    def _arguments(self) -> dict[str, str]:
        names = ("score", "scope", "weights", "permute_masks", "params", "exclude")
        return {name: str(getattr(self.given, name)) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state back."""
        if state["epochs_per_level"] != self.plan.epochs_per_level:
            raise MisconfigurationException(
                f"LotteryTicket(epochs_per_level={self.plan.epochs_per_level}), but the checkpoint was saved with "
                f"{state['epochs_per_level']}: resume with the same number."
            )
        now, level = self._arguments(), state["level"]
        if self.given.init_from is None:
            now["sparsities"] = str(self.plan.sparsities[: level + 1])
            state["arguments"]["sparsities"] = str(state["sparsities"][: level + 1])
        changed = [f"{name}={value}" for name, value in now.items() if value != state["arguments"].get(name)]
        if changed:
            names = [entry.partition("=")[0] for entry in changed]
            before = ", ".join(f"{name}={state['arguments'].get(name)}" for name in names)
            raise MisconfigurationException(
                f"LotteryTicket({', '.join(changed)}), but the checkpoint was saved with {before}: resume with the "
                "same value."
            )
        self.level, self.seed, self.names = state["level"], state["seed"], state["names"]
        self.masks = None if state["masks"] is None else Masks(state["masks"])
        self._init, self._buffers, self._scores = state["init"], state["buffers"], state["scores"]
        self.results, self._metrics = state["results"], state["metrics"]
        if self.given.init_from is not None and self.given.sparsities is None:
            # The plan continues from the sparsity of a ticket that may no longer be there.
            start = state["sparsities"][0]
            self.plan = Plan.of(self.plan.levels, self.given.keep, None, self.plan.epochs_per_level, start)
        self._resumed = True
