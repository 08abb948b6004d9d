"""Configuration files for LightningCLI: parsed once, built as often as a command needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import yaml
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers.logger import DummyLogger
from lightning_utilities.core.imports import RequirementCache
from lightning_utilities.core.rank_zero import rank_zero_info

import lightning_bpfree
from lightning_bpfree.cli.common.checkpoints import check_checkpoint
from lightning_bpfree.cli.common.errors import refusal
from lightning_bpfree.cli.common.parse_errors import parse_error
from lightning_bpfree.cli.common.preconditions import CommandError, require
from lightning_bpfree.training.quiet_lightning import quiet_lightning
from lightning_bpfree.training.training_rule import TrainingRule

# Dump all entries, also those that are None: the new name of the option and the old.
WHOLE = {"skip_unset" if RequirementCache("jsonargparse>=4.49") else "skip_none": False}
RulesChoice = Callable[[list[TrainingRule]], list[TrainingRule]]

SHOWING = (Checkpoint, ProgressBar, ModelSummary)  # what these show and write belongs to `bpfree fit`
SILENT: dict[str, Any] = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "barebones": False,
    "num_nodes": 1,
}


class ConfigCLI(LightningCLI):
    """LightningCLI for any module and data module, with one-line parsing errors instead of a page of usage.

    Args:
        args: the command-line arguments.
        **kwargs: see ``lightning.pytorch.cli.LightningCLI``.
    """

    def __init__(self, args: Sequence[str], **kwargs: Any) -> None:
        require("jsonargparse", "docstring_parser")
        dir(lightning_bpfree)  # imports all public classes, so that a configuration can name them without their module
        self._given = [argument.partition("=")[0].rstrip("+") for argument in args]
        self._files = [Path(after) for option, after in pairwise(args) if option in ("-c", "--config")]
        plain: dict[str, Any] = {"exit_on_error": False}
        for_commands = {command: dict(plain) for command in self.subcommands()} if kwargs.get("run", True) else {}
        # Without a class for model and data any subclass goes, and a module that brings its own loaders needs no data.
        super().__init__(args=list(args), parser_kwargs={"prog": "bpfree", **plain, **for_commands}, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``report`` to the allowed keys of a configuration file."""
        parser.add_argument(
            "--report",
            type=bool,
            default=False,
            help="After fit: test, print a table with the result and the cost, write metrics.csv and training.png.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse ``args``; raise CommandError for a mistake in them."""
        subparsers = getattr(self, "_subcommand_parsers", {})
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            known = [option for part in (parser, *subparsers.values()) for option in part._option_string_actions]
            raise CommandError(parse_error(str(error), known, self._files, self._given)) from error
        name = self.config.get("subcommand")
        check_checkpoint(None if name is None else self.config[name].get("ckpt_path"))

    def _parse_ckpt_path(self) -> None:
        """Take the hyperparameters of the checkpoint, as LightningCLI does, if they fit the configured model."""
        try:
            super()._parse_ckpt_path()
        except (KeyError, argparse.ArgumentError):  # written by a script rather than by LightningCLI
            rank_zero_info(
                "The model is built from the configuration, because the checkpoint does not contain its arguments."
            )

    def instantiate_classes(self) -> None:
        """Instantiate all classes; raise CommandError if this package or Lightning refuses an argument.

        Errors that start elsewhere, such as in the user's module, keep their traceback.
        """
        try:
            super().instantiate_classes()
        except Exception as error:
            message = refusal(error)
            if message is None:
                raise
            raise CommandError(message) from error


class Built(NamedTuple):
    """A module, its data and a Trainer, built from one configuration.

    Args:
        module: the module.
        data: the data module; None if the module has its own loaders.
        trainer: the Trainer.
        rules: the training rules that the configuration names, whether or not they are in the Trainer.
    """

    module: pl.LightningModule
    data: pl.LightningDataModule | None
    trainer: pl.Trainer
    rules: list[TrainingRule]


class Blueprint(ConfigCLI):
    """A configuration that is rebuilt for every run, silently, on one device and without writing files.

    Args:
        args: command-line arguments of ``fit``, such as ``["-c", "mine.yaml"]``.

    Raises:
        CommandError: if the configuration cannot be parsed.
    """

    def __init__(self, args: Sequence[str]) -> None:
        with quiet_lightning():
            super().__init__(args, run=False, save_config_callback=None, load_from_checkpoint_support=False)

    def instantiate_classes(self) -> None:
        """Do nothing yet: see :meth:`build`."""

    def build(
        self,
        rules: RulesChoice = lambda configured: configured,
        *,
        seed: int | None = None,
        callbacks: Sequence[Callback] = (),
        dropped: tuple[type[Callback], ...] = (),
        **trainer_settings: Any,
    ) -> Built:
        """Return a new module, data module and Trainer.

        Args:
            rules: returns the rules for the Trainer, given those of the configuration.
            seed: seed for ``seed_everything``; None uses the configuration's.
            callbacks: further callbacks, after all others.
            dropped: classes of callbacks to remove from the configuration's.
            **trainer_settings: arguments of the Trainer that replace the configuration's.
        """
        seed_everything(self.config.seed_everything if seed is None else seed, workers=True, verbose=False)
        original = self.config
        self.config = original.clone()
        # False keeps loggers and profilers from being made at all, which for some needs a package or a network.
        self.config.trainer.logger, self.config.trainer.profiler = False, None
        self._settings = {**SILENT, "devices": _one_device(original.trainer.devices), **trainer_settings}
        configured: list[TrainingRule] = []

        def chosen(found: list[Callback]) -> list[Callback]:
            configured.extend(cb for cb in found if isinstance(cb, TrainingRule))
            unwanted: tuple[type, ...] = (TrainingRule, *SHOWING, *dropped)
            return [*rules(configured), *(cb for cb in found if not isinstance(cb, unwanted)), *callbacks]

        self._chosen = chosen
        try:
            super().instantiate_classes()
        finally:
            self.config = original
        return Built(self.model, self.datamodule, self.trainer, configured)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Return a Trainer that shows and writes nothing."""
        callbacks = self._chosen(_listed(self._get(self.config_init, "trainer").get("callbacks")))
        # Unlike False, the logger that logs nowhere satisfies callbacks that ask for one.
        return super().instantiate_trainer(logger=DummyLogger(), callbacks=callbacks, **self._settings, **kwargs)

    @property
    def callbacks(self) -> list[Any]:
        """The callbacks of the configuration, parsed but not instantiated."""
        return _listed(self.config.trainer.callbacks)

    def dump(self) -> str:
        """Return the whole configuration as YAML, which parses to the same configuration."""
        text: str = self.parser.dump(self.config, **WHOLE)
        return text


def dumped(parser: LightningArgumentParser, config: Any) -> dict[str, Any]:
    """Return a parsed configuration in plain values."""
    plain: dict[str, Any] = yaml.safe_load(parser.dump(config, **WHOLE))
    return plain


def _listed(callbacks: Any) -> list[Any]:
    """Return the Trainer's argument ``callbacks``, which may be None or one callback, as a list."""
    if callbacks is None:
        return []
    return callbacks if isinstance(callbacks, list) else [callbacks]


def _one_device(devices: Any) -> Any:
    return devices[:1] if isinstance(devices, list) else 1
