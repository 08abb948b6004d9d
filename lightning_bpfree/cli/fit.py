"""``bpfree fit|validate|test|predict``: LightningCLI, with a report after fit."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_bpfree.cli import fit_options, report
from lightning_bpfree.cli.common import recipes
from lightning_bpfree.cli.common.configured import ConfigCLI
from lightning_bpfree.cli.common.evaluation import evaluated
from lightning_bpfree.cli.common.preconditions import require, require_writable
from lightning_bpfree.cli.run_files import RunFiles
from lightning_bpfree.training.trainer_attributes import is_dry_run


class FitCLI(ConfigCLI):
    """Runs a Trainer's methods from configuration files.

    Args:
        args: the command and its options, such as ``["fit", "-c", "mine.yaml"]``.
    """

    def __init__(self, args: Sequence[str]) -> None:
        # A run in a folder that has a config.yaml, such as that of a logger with a fixed version, replaces it.
        kwargs: dict[str, Any] = {"overwrite": True}
        try:
            super().__init__(args, save_config_callback=RunFiles, save_config_kwargs=kwargs)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # Lightning's way to end after Ctrl-C
                raise KeyboardInterrupt(self._how_to_continue()) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Return the configured Trainer; for a report, it also writes metrics.csv."""
        self.save_config_kwargs = {**self.save_config_kwargs, "report": self._reports}
        trainer = super().instantiate_trainer(**kwargs)
        if self._reports and not is_dry_run(trainer):
            require("rich", "matplotlib")
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
        """Test the module and report, if requested."""
        if not self._reports:
            return
        seconds = time.perf_counter() - self._started
        metrics = evaluated("test", self.trainer, self.model, self.datamodule)
        if self.trainer.is_global_zero:
            report.show(self.trainer, metrics, seconds)

    def _how_to_continue(self) -> str:
        """Return how to continue after an interruption; empty if there is no checkpoint."""
        for callback in self.trainer.checkpoint_callbacks:
            path = callback.last_model_path or callback.best_model_path if isinstance(callback, ModelCheckpoint) else ""
            if path:
                return f"To continue, add --ckpt_path={path} to the same command."
        return "There is no checkpoint yet."


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


def _run(command: str, arguments: Sequence[str]) -> int:
    fit_options.accepted(command, arguments)
    given = ["--help" if argument == "--help-all" else argument for argument in recipes.with_paths(arguments)]
    failed = True
    try:
        FitCLI([command, *given])
        failed = False
    finally:
        # A run of Weights & Biases lasts until it is finished, and a second one in this process would join it.
        wandb = sys.modules.get("wandb")
        if wandb is not None and getattr(wandb, "run", None) is not None:
            wandb.finish(exit_code=int(failed))
    return 0


def fit(arguments: Sequence[str]) -> int:
    """Run ``bpfree fit``."""
    return _run("fit", arguments)


def validate(arguments: Sequence[str]) -> int:
    """Run ``bpfree validate``."""
    return _run("validate", arguments)


def test(arguments: Sequence[str]) -> int:
    """Run ``bpfree test``."""
    return _run("test", arguments)


def predict(arguments: Sequence[str]) -> int:
    """Run ``bpfree predict``."""
    return _run("predict", arguments)
