"""``bpfree check``: which rules can train a module, what stands in the way, and what a step costs; without training."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

import lightning_bpfree
from lightning_bpfree.cli import check_options
from lightning_bpfree.cli.common import recipes
from lightning_bpfree.cli.common.arguments import configuration_options
from lightning_bpfree.cli.common.configured import Blueprint, RulesChoice, silence
from lightning_bpfree.cli.common.preconditions import CommandError, require
from lightning_bpfree.cli.common.tables import console, number
from lightning_bpfree.core.step import loss_of
from lightning_bpfree.training.gradient_alignment import GradientAlignment
from lightning_bpfree.training.module_state import SilencedLogging
from lightning_bpfree.training.trainer_attributes import callbacks_of
from lightning_bpfree.training.training_rule import TrainingRule


class Cost(NamedTuple):
    """What a step of a rule costs.

    Args:
        forward_evals: evaluations of the training step, in forward passes.
        time_ratio: seconds of a step and its backward pass, in units of one forward pass without a graph.
    """

    forward_evals: float
    time_ratio: float


class Verdict(NamedTuple):
    """What ``check`` says of one rule: what a step costs, or what stands in the way."""

    rule: str
    cost: Cost | None
    obstacle: str = ""


class CostMeter(Callback):
    """Measures a rule's step on the first batch, and ends the fit before that batch is trained on.

    Args:
        repeats: measurements, of which the shortest counts.
    """

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.cost: Cost | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure; then let the module skip the rest of the epoch, which Lightning allows to modules only."""
        pl_module.on_train_batch_start(batch, batch_idx)
        trainer.should_stop = True
        rule = callbacks_of(trainer, TrainingRule)[0]
        rule.start_epoch, rule.stop_epoch = 0, None  # the rule's own epochs may lie further on
        rule.on_train_epoch_start(trainer, pl_module)
        takes_index = "batch_idx" in inspect.signature(pl_module.training_step).parameters
        with SilencedLogging(pl_module)():
            self.cost = self._measured(trainer, rule, (batch, batch_idx) if takes_index else (batch,))
        pl_module.on_train_batch_start = lambda *_: -1  # type: ignore[method-assign]

    def _measured(self, trainer: pl.Trainer, rule: TrainingRule, args: tuple[Any, ...]) -> Cost:
        original, device = rule.original_step, trainer.strategy.root_device
        assert original is not None

        def plain() -> None:
            with torch.no_grad(), rule.without(), trainer.precision_plugin.train_step_context():
                original(*args)

        def ruled() -> None:
            with torch.enable_grad():
                loss_of(trainer.strategy.training_step(*args)).backward()

        ruled()  # some rules choose their way at the first batch
        before = rule.record.forward_evals
        ruled()
        evals = rule.record.forward_evals - before
        return Cost(evals, _shortest(ruled, self.repeats, device) / _shortest(plain, 1 + self.repeats, device))


def _shortest(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Return the shortest of several times in seconds: what is longer is another process's doing."""
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shipped_rules() -> list[type[TrainingRule]]:
    """Return the rules of the package that can be made with their default settings."""
    public = [value for _, value in inspect.getmembers(lightning_bpfree, inspect.isclass)]
    return [kind for kind in public if issubclass(kind, TrainingRule) and not inspect.isabstract(kind)]


def check(blueprint: Blueprint, repeats: int = 3) -> list[Verdict]:
    """Return a verdict on every rule of the package, and on those of the configuration with their settings.

    Raises:
        CommandError: the configuration cannot be built, or its data not be loaded.
    """
    with silence():
        try:
            configured = blueprint.build().rules
        except Exception as error:
            raise CommandError(f"the configuration cannot be built: {_said(error)}") from error
        verdicts = [_verdict(blueprint, name, choice, repeats) for name, choice in _choices(configured)]
    ((obstacle, times),) = Counter(verdict.obstacle for verdict in verdicts).most_common(1)
    # Obstacles that rules name are theirs; one that several meet alike is the module's or the data's.
    if times > 1 and all(verdict.cost is None for verdict in verdicts):
        raise CommandError(f"no rule came as far as its first step: {obstacle}")
    return verdicts


def _choices(configured: list[TrainingRule]) -> Iterator[tuple[str, RulesChoice]]:
    for kind in shipped_rules():
        yield f"{kind.__name__}()", partial(_made, kind)
    for index, rule in enumerate(configured):
        yield f"{type(rule).__name__} as configured", partial(_picked, index)


def _made(kind: type[TrainingRule], _: list[TrainingRule]) -> list[TrainingRule]:
    return [kind()]


def _picked(index: int, configured: list[TrainingRule]) -> list[TrainingRule]:
    return [configured[index]]


def _verdict(blueprint: Blueprint, name: str, rules: RulesChoice, repeats: int) -> Verdict:
    meter = CostMeter(repeats)
    # fast_dev_run: one batch; checkpoints, early stopping, tuners and loggers do nothing.
    built = blueprint.build(rules, callbacks=[meter], dropped=(GradientAlignment,), fast_dev_run=True)
    try:
        built.trainer.fit(built.module, datamodule=built.data)
    except Exception as error:
        if meter.cost is None:  # else the module's own hooks minded the empty epoch, which is no obstacle
            return Verdict(name, None, _said(error))
    return Verdict(name, meter.cost, "" if meter.cost else "the data has no training batch")


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, MisconfigurationException) else f"{type(error).__name__}: {error}"


def show(verdicts: Sequence[Verdict]) -> None:
    """Print the verdicts as a table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="bpfree check", caption="One batch, nothing trained. Time: a step, in plain forward passes.")
    table.add_column("rule", no_wrap=True)
    table.add_column("trains")
    table.add_column("forwards a step", justify="right")
    table.add_column("time a step", justify="right")
    table.add_column("what prevents it, and the cure", ratio=1)
    for rule, cost, obstacle in verdicts:
        numbers = ("-", "-") if cost is None else (number(cost.forward_evals), f"{cost.time_ratio:.1f}x")
        table.add_row(rule, "no" if cost is None else "yes", *numbers, escape(obstacle))
    console().print(table)


def run(arguments: Sequence[str]) -> int:
    """Run ``bpfree check``; the code is 0 also where no rule can train the module, for it is a report."""
    parser = check_options.parser()
    options, given = parser.parse_known_args(arguments)
    overrides = configuration_options(given, parser.options())
    if options.repeats < 1:
        raise CommandError(f"--repeats {options.repeats}: give 1 or more.")
    require("rich")
    show(check(Blueprint([*recipes.config_arguments(options.config), *overrides]), options.repeats))
    return 0
