"""Configuration files of a federation: a module, its data, a federation, and the Trainer's loggers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from lightning_bpfree.cli.common.configured import ConfigCLI
from lightning_bpfree.cli.common.preconditions import CommandError
from lightning_bpfree.core.arguments import NonNegativeInt, PositiveInt
from lightning_bpfree.federated.federation import Federation
from lightning_bpfree.training.quiet_lightning import quiet_lightning


class FederateCLI(ConfigCLI):
    """Reads ``model``, ``data``, ``trainer`` and ``federation``, and builds them.

    Args:
        args: arguments, such as ``["-c", "mine.yaml", "--federation.num_clients=4"]``.

    Raises:
        CommandError: if the configuration cannot be parsed, or is refused.
    """

    def __init__(self, args: Sequence[str]) -> None:
        with quiet_lightning():
            super().__init__(args, run=False, save_config_callback=None, load_from_checkpoint_support=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``federation``, ``rounds`` and ``evaluate_every`` to the allowed keys of a configuration file."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(Federation, "federation")
        parser.add_argument("--rounds", type=PositiveInt, default=100, help="Rounds of the whole run.")
        parser.add_argument(
            "--evaluate_every", type=NonNegativeInt, default=1, help="Rounds between evaluations; 0 for none."
        )


class Configured(NamedTuple):
    """The objects that a configuration builds.

    Args:
        module: the module.
        datamodule: its data.
        federation: the settings of the federation.
        rounds: number of rounds of the whole run.
        evaluate_every: rounds between evaluations.
        loggers: loggers of the Trainer.
        config: the configuration in YAML.
    """

    module: pl.LightningModule
    datamodule: pl.LightningDataModule
    federation: Federation
    rounds: int
    evaluate_every: int
    loggers: list[Logger]
    config: str


def configured(args: Sequence[str]) -> Configured:
    """Return the objects that configuration files and options build.

    Args:
        args: arguments, such as ``["-c", "mine.yaml"]``, with paths of files.
    """
    cli: Any = FederateCLI(args)
    if cli.datamodule is None:
        raise CommandError(
            "data: a federation splits the training set of a LightningDataModule over its clients: add one."
        )
    found = cli.config_init
    return Configured(
        cli.model,
        cli.datamodule,
        found.federation,
        int(found.rounds),
        int(found.evaluate_every),
        list(cli.trainer.loggers),
        cli.parser.dump(cli.config),
    )
