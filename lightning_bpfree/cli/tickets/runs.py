"""The trainings of a study of lottery tickets, and the measurements of their tickets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_bpfree.cli.common.configured import Blueprint, Built
from lightning_bpfree.cli.common.evaluation import evaluated, larger_is_better
from lightning_bpfree.cli.common.preconditions import CommandError
from lightning_bpfree.cli.compare.runs import Stopwatch
from lightning_bpfree.cli.tickets.options import KINDS
from lightning_bpfree.core.params import ParameterSlots, Params
from lightning_bpfree.methods.lottery_ticket.callback import LotteryTicket
from lightning_bpfree.methods.lottery_ticket.connectivity import Barrier, loss_barrier
from lightning_bpfree.methods.lottery_ticket.ticket import Ticket

Result = dict[str, Any]

AGAIN = 10_000  # added to a seed where the same ticket is trained a second time, independently
POINTS = 11  # on the line between two networks


class Study:
    """Trains the levels of tickets of one rule and one seed, and evaluates each of them on the test set.

    Args:
        blueprint: the whole configuration, with one rule and a LotteryTicket.
        rule: name of the rule in results.
        folder: folder for the tickets.
        metric: the metric to evaluate.
    """

    def __init__(self, blueprint: Blueprint, rule: str, folder: Path, metric: str) -> None:
        self.blueprint, self.rule, self.folder, self.metric = blueprint, rule, folder, metric
        self.arguments = ticket_arguments(blueprint)
        self.num_levels = self.tickets("magnitude").plan.levels

    def tickets(self, kind: str, **more: Any) -> LotteryTicket:
        """Return the callback that finds tickets of a kind.

        Raises:
            CommandError: if the kind is incompatible with the configuration's arguments.
        """
        try:
            return LotteryTicket(**{**self.arguments, "permute_masks": False, **KINDS[kind], **more})
        except ValueError as error:
            raise CommandError(f"LotteryTicket, for tickets of kind {kind}: {error}") from error

    def check(self, connectivity: bool) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all parameters; raise CommandError for errors that can be found before training.

        Args:
            connectivity: whether lines between networks are measured.
        """
        built = self._build(0, [])
        required(evaluated("test", built.trainer, built.module, built.data), self.metric)
        running = [name for name, _ in built.module.named_buffers() if name.rpartition(".")[2].startswith("running_")]
        if connectivity and running:
            raise CommandError(
                f"{self.rule}: the network has running statistics ({running[0]} ...), which do not fit a network on "
                "the line between two others. Give --no-connectivity, or use a network without them, such as one with "
                "GroupNorm."
            )
        return {slot.name: tuple(slot.parameter.shape) for slot in ParameterSlots(built.module)}

    def levels(self, kind: str, seed: int) -> Iterator[Result]:
        """Train all levels of tickets of a kind, and yield one result per level."""
        folder = self.folder / self.rule / kind / f"seed_{seed}"
        yield from self._trained(self.tickets(kind, dirpath=str(folder)), kind, seed, folder)

    def again(self, ticket: Path, name: str, seed: int) -> Result:
        """Train one ticket without further pruning, and return its result.

        Args:
            ticket: its file.
            name: its name in results.
            seed: seed of the training.
        """
        level = Ticket.load(ticket).level
        folder = self.folder / self.rule / name / f"seed_{seed}" / f"from_level_{level:02d}"
        epochs = self.arguments["epochs_per_level"]
        tickets = LotteryTicket("magnitude", 1, epochs_per_level=epochs, init_from=str(ticket), dirpath=str(folder))
        (result,) = self._trained(tickets, name, seed, folder)
        return {**result, "level": level}

    def _trained(self, tickets: LotteryTicket, name: str, seed: int, folder: Path) -> Iterator[Result]:
        watch = Stopwatch()
        epochs = tickets.plan.levels * tickets.plan.epochs_per_level
        built = self._build(seed, [tickets, watch], max_epochs=epochs)
        try:
            built.trainer.fit(built.module, datamodule=built.data)
        except ValueError as error:
            if not str(error).startswith(LotteryTicket.__name__):
                raise
            raise CommandError(f"{self.rule}, {name}, seed {seed}: {error}") from error
        share = 1 / tickets.plan.levels
        for found in tickets.results:
            file = folder / f"level_{found['level']:02d}.pt"
            Ticket.load(file).apply_to(built.module, "mean")
            metrics = evaluated("test", built.trainer, built.module, built.data)
            yield {
                "rule": self.rule,
                "tickets": name,
                "seed": seed,
                "level": found["level"],
                "weights_left": found["weights_left"],
                "kept": found["kept"],
                "value": required(metrics, self.metric),
                "metrics": metrics,
                "forward_evals": built.rules[0].record.forward_evals * share,
                "seconds": watch.seconds * share,
                "file": str(file),
            }

    def barriers(self, one: Path, other: Path) -> dict[str, Barrier]:
        """Return the barriers of loss and of metric on the straight line between two trained tickets."""
        a, b = Ticket.load(one), Ticket.load(other)
        assert a.mean is not None
        assert b.mean is not None
        built = self._build(0, [])
        a.apply_to(built.module, "mean")  # for its buffers
        measured: list[dict[str, float]] = []

        def evaluate(params: Params) -> float:
            with ParameterSlots(built.module).replaced(params):
                measured.append(evaluated("test", built.trainer, built.module, built.data))
            return self._small_is_good(required(measured[-1], self.metric))

        found = {"metric": loss_barrier(evaluate, a.mean, b.mean, POINTS)}
        name = self.metric.replace("acc", "loss")
        if name != self.metric and all(name in metrics for metrics in measured):
            losses = iter([metrics[name] for metrics in measured])
            found["loss"] = loss_barrier(lambda _: next(losses), a.mean, b.mean, POINTS)
        return found

    def _small_is_good(self, value: float) -> float:
        return -value if larger_is_better(self.metric) else value

    def _build(self, seed: int, callbacks: list[pl.Callback], **limits: Any) -> Built:
        return self.blueprint.build(
            seed=seed, callbacks=callbacks, dropped=(LotteryTicket,), strategy="auto", num_sanity_val_steps=0, **limits
        )


def required(metrics: dict[str, float], metric: str) -> float:
    """Return the metric; raise CommandError if the test set has no metric of that name."""
    if metric not in metrics:
        known = ", ".join(sorted(metrics)) or "nothing"
        raise CommandError(f"the module does not log the metric {metric} in its test; it logs: {known}.")
    return metrics[metric]


def ticket_arguments(blueprint: Blueprint) -> dict[str, Any]:
    """Return the arguments of the configuration's LotteryTicket.

    Raises:
        CommandError: if there is none.
    """
    for callback in blueprint.callbacks:
        if callback.class_path.rpartition(".")[2] == LotteryTicket.__name__:
            arguments: dict[str, Any] = callback.init_args.as_dict()
            return arguments
    raise CommandError(
        "trainer.callbacks contains no LotteryTicket, which sets the number of levels and the epochs of each level. "
        "Start from the recipe papers/es_lottery_tickets."
    )


def plan_of(kinds: list[str], seeds: list[int], levels: int, transfers: int, connectivity: bool) -> int:
    """Return the number of levels that a study trains, for a progress bar."""
    own = len(kinds) * levels + transfers * (2 * levels + levels - 1)
    return len(seeds) * (own + (1 + transfers) * levels * connectivity)
