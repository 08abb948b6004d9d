"""``bpfree fit|validate|test|predict``: LightningCLI, with a report behind fit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_bpfree.cli import report
from lightning_bpfree.cli.common import recipes
from lightning_bpfree.cli.common.configured import ConfigCLI
from lightning_bpfree.cli.common.evaluation import evaluated
from lightning_bpfree.cli.common.preconditions import require, require_writable
from lightning_bpfree.training.trainer_attributes import is_dry_run


class FitCLI(ConfigCLI):
    """Runs a Trainer's methods from configuration files.

    Args:
        args: the command and its options, such as ``["fit", "-c", "mine.yaml"]``.
    """

    def __init__(self, args: Sequence[str]) -> None:
        # A run in a folder that has a config.yaml, such as that of a logger with a fixed version, replaces it.
        super().__init__(args, save_config_kwargs={"overwrite": True})

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Return the configured Trainer; for a report, with a CSVLogger among its loggers."""
        trainer = super().instantiate_trainer(**kwargs)
        if self._reports and not is_dry_run(trainer):
            require("rich", "matplotlib")
            if report.csv_logger(trainer) is None:
                trainer.loggers = [*trainer.loggers, CSVLogger(trainer.default_root_dir)]
        return trainer

    @property
    def _reports(self) -> bool:
        return self.subcommand == "fit" and bool(self._get(self.config, "report"))

    def before_fit(self) -> None:
        """Refuse a folder that cannot be written to, before any training."""
        if self.trainer.is_global_zero:
            for folder, option in _outputs(self.trainer):
                require_writable(folder, option)
        self._started = time.perf_counter()

    def after_fit(self) -> None:
        """Test the module and report, where that is asked for."""
        if not self._reports:
            return
        seconds = time.perf_counter() - self._started
        metrics = evaluated("test", self.trainer, self.model, self.datamodule)
        if self.trainer.is_global_zero:
            report.show(self.trainer, metrics, seconds)


def _outputs(trainer: pl.Trainer) -> Iterator[tuple[str, str]]:
    """Yield the folders that a fit writes to, with the option that changes each."""
    if is_dry_run(trainer):
        return
    root = "--trainer.default_root_dir=DIR"
    for logger in trainer.loggers:
        folder = logger.log_dir or logger.save_dir
        if folder is not None:
            yield (
                str(folder),
                f"the logger's save_dir (--trainer.logger.init_args.save_dir=DIR), or, without one, {root}",
            )
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            yield str(callback.dirpath), "the checkpoint callback's dirpath"
    if not trainer.loggers:
        yield trainer.default_root_dir, root


def run(arguments: Sequence[str]) -> int:
    """Run ``bpfree fit``, ``validate``, ``test`` or ``predict``."""
    FitCLI(recipes.with_paths(arguments))
    return 0
