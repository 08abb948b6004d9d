"""``bpfree check``: which rules can train a module, what prevents the others, and the cost of a step; no training."""

from __future__ import annotations

import inspect
import math
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
from lightning_bpfree.cli.common.configured import Blueprint, RulesChoice
from lightning_bpfree.cli.common.preconditions import CommandError, require
from lightning_bpfree.cli.common.tables import console, number
from lightning_bpfree.core.replay.batch import BatchCopies
from lightning_bpfree.core.step import loss_of
from lightning_bpfree.training.module_state import SilencedLogging
from lightning_bpfree.training.quiet_lightning import quiet_lightning
from lightning_bpfree.training.trainer_attributes import callbacks_of
from lightning_bpfree.training.training_rule import TrainingRule


class Cost(NamedTuple):
    """The cost of a rule's step.

    Args:
        forward_evals: evaluations of the training step, in forward passes.
        time_ratio: seconds of a step and its backward pass, in units of one forward pass without a graph.
    """

    forward_evals: float
    time_ratio: float


class Verdict(NamedTuple):
    """The result of ``check`` for one rule: the cost of a step, or what prevents training."""

    rule: str
    cost: Cost | None
    obstacle: str = ""


class _Measured(Exception):  # noqa: N818  # no error: it ends a fit in front of the optimizer's first step
    pass


class CostMeter(Callback):
    """Runs a fit up to the optimizer's first step, measures the rule's step there, and ends the fit.

    Since the check runs a fit, it raises every error of the fit's setup, rehearsal, training step or backward pass.

    Args:
        repeats: number of measurements; the shortest is used.

    Attributes:
        reached: whether the fit reached the first step.
        cost: the measured cost; NaN if the step cannot run twice on its batch.
    """

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.reached = False
        self.cost: Cost | None = None
        self._batch: BatchCopies | None = None
        self._evals = math.nan

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start the rule in the first epoch, since its own epochs may start later."""
        for rule in callbacks_of(trainer, TrainingRule):
            rule.start_epoch, rule.stop_epoch = 0, None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the arguments of Lightning's call of the training step, for the measurement."""
        strategy: Any = trainer.strategy
        self._step = strategy.training_step
        rule = callbacks_of(trainer, TrainingRule)[0]

        def kept(*args: Any, **kwargs: Any) -> Any:
            self._batch = BatchCopies(args, kwargs, always=True)
            before = rule.record.forward_evals
            output = self._step(*args, **kwargs)
            self._evals = rule.record.forward_evals - before
            return output

        strategy.training_step = kept

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Measure, and end the fit."""
        self.reached = True
        rule = callbacks_of(trainer, TrainingRule)[0]
        rule.observers.clear()
        try:
            with SilencedLogging(pl_module)():
                self.cost = self._measured(trainer, rule)
        except Exception:  # of a second step on the same batch, which a fit does not take
            self.cost = Cost(self._evals, math.nan)
        raise _Measured

    def _measured(self, trainer: pl.Trainer, rule: TrainingRule) -> Cost:
        original, device, batch = rule.original_step, trainer.strategy.root_device, self._batch
        assert original is not None
        assert batch is not None

        def plain() -> None:
            args, kwargs = batch.fresh()
            with torch.no_grad(), rule.without(), trainer.precision_plugin.train_step_context():
                original(*args, **kwargs)

        def ruled() -> None:
            args, kwargs = batch.fresh()
            with torch.enable_grad():
                loss_of(self._step(*args, **kwargs)).backward()

        before = rule.record.forward_evals
        ruled()  # some rules choose their way at the first batch
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
    """Return the rules of the package that can be constructed with their default settings."""
    public = [value for _, value in inspect.getmembers(lightning_bpfree, inspect.isclass)]
    return [kind for kind in public if issubclass(kind, TrainingRule) and not inspect.isabstract(kind)]


def check(blueprint: Blueprint, repeats: int = 3) -> list[Verdict]:
    """Return a verdict on every rule of the package, and on those of the configuration with their settings.

    Raises:
        CommandError: if the configuration cannot be built, or its data cannot be loaded.
    """
    with quiet_lightning():
        try:
            configured = blueprint.build().rules
        except Exception as error:
            raise CommandError(f"the configuration cannot be built: {_said(error)}") from error
        verdicts = [_verdict(blueprint, name, choice, repeats) for name, choice in _choices(configured)]
    ((obstacle, times),) = Counter(verdict.obstacle for verdict in verdicts).most_common(1)
    # An obstacle of one rule is that rule's; one that all rules meet belongs to the module or the data.
    if times > 1 and all(verdict.cost is None for verdict in verdicts):
        raise CommandError(f"no rule reached its first step: {obstacle}")
    return verdicts


def _choices(configured: list[TrainingRule]) -> Iterator[tuple[str, RulesChoice]]:
    for kind in shipped_rules():
        yield f"{kind.__name__}()", partial(_made, kind)
    if configured:  # all of them, as fit has it
        yield f"{', '.join(type(rule).__name__ for rule in configured)} as configured", lambda found: found


def _made(kind: type[TrainingRule], _: list[TrainingRule]) -> list[TrainingRule]:
    return [kind()]


def _verdict(blueprint: Blueprint, name: str, rules: RulesChoice, repeats: int) -> Verdict:
    meter = CostMeter(repeats)
    # fast_dev_run: one batch; checkpoints, early stopping, tuners and loggers do nothing.
    built = blueprint.build(rules, callbacks=[meter], fast_dev_run=True)
    return judged(name, built.trainer, built.module, meter, built.data)


def judged(
    name: str, trainer: pl.Trainer, module: pl.LightningModule, meter: CostMeter, data: pl.LightningDataModule | None
) -> Verdict:
    """Return a verdict on the rule of a Trainer, after a fit that ends before the optimizer's first step.

    Args:
        name: the rule's name in the verdict.
        trainer: the Trainer; its callbacks include the rule, followed by the meter.
        module: the module, which cannot be used afterward.
        meter: ends the fit.
        data: the data module; None if the module has its own loaders.
    """
    try:
        trainer.fit(module, datamodule=data)
    except Exception as error:
        if not meter.reached:  # else what ends the fit, or someone who minds that
            return Verdict(name, None, _said(error))
    return Verdict(name, meter.cost, "" if meter.reached else "the data has no training batch")


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
        numbers = ("-", "-")
        if cost is not None:
            numbers = (_shown(cost.forward_evals, number), _shown(cost.time_ratio, lambda ratio: f"{ratio:.1f}x"))
        table.add_row(rule, "no" if cost is None else "yes", *numbers, escape(obstacle))
    console().print(table)


def _shown(value: float, form: Callable[[float], str]) -> str:
    return "-" if math.isnan(value) else form(value)


def run(arguments: Sequence[str]) -> int:
    """Run ``bpfree check``; the exit code is 0 even if no rule can train the module, because it is a report."""
    parser = check_options.parser()
    options, given = parser.parse_known_args(arguments)
    overrides = configuration_options(given, parser.options())
    if options.repeats < 1:
        raise CommandError(f"--repeats {options.repeats}: give 1 or more.")
    require("rich")
    show(check(Blueprint([*recipes.config_arguments(options.config), *overrides]), options.repeats))
    return 0
