"""The short help of ``bpfree fit``, ``validate``, ``test`` and ``predict``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lightning_bpfree.cli.common.arguments import Parser

DOES = {
    "fit": "Train a module: model, data and Trainer come from YAML files and options (LightningCLI).",
    "validate": "Evaluate a module on the validation set: model, data and Trainer come from YAML files and options.",
    "test": "Evaluate a module on the test set: model, data and Trainer come from YAML files and options.",
    "predict": "Compute predictions of a module: model, data and Trainer come from YAML files and options.",
}
EXAMPLES = {
    "fit": [
        "bpfree fit -c quickstart",
        "bpfree fit -c mine.yaml -c rules/forward_gradient",
        "bpfree fit -c mine.yaml --trainer.max_epochs=5 --trainer.callbacks+=ZerothOrder",
        "bpfree fit -c mine.yaml -c loggers/wandb --report=true",
        "bpfree fit -c mine.yaml --ckpt_path=runs/mine/version_0/checkpoints/last.ckpt",
    ],
    "validate": ["bpfree validate -c mine.yaml --ckpt_path=last.ckpt"],
    "test": ["bpfree test -c mine.yaml --ckpt_path=last.ckpt"],
    "predict": ["bpfree predict -c mine.yaml --ckpt_path=last.ckpt"],
}
# The options that most runs need. `--help-all` shows all, from the signatures of the classes.
COMMON = {
    "--model=CLASS": "the LightningModule, such as my_module.MyModel; its arguments: --model.init_args.NAME=VALUE",
    "--data=CLASS": "the LightningDataModule; its arguments: --data.init_args.NAME=VALUE",
    "--trainer.max_epochs=N": "arguments of the Trainer: --trainer.NAME=VALUE",
    "--trainer.callbacks+=CLASS": "add a callback, such as a rule; its arguments: --trainer.callbacks.NAME=VALUE",
    "--seed_everything=N": "the seed of all random numbers",
}


def parser(command: str) -> Parser:
    """Return a parser with the options that most runs need.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
    """
    made = Parser(f"bpfree {command}", DOES[command], EXAMPLES[command], usage=f"bpfree {command} -c FILE [option ...]")
    add = made.add_argument
    add(
        "-c",
        "--config",
        action="append",
        metavar="FILE",
        help="YAML file or recipe; later files override earlier ones",
    )
    add("--ckpt_path", metavar="FILE", help="a checkpoint to load; fit continues from it")
    if command == "fit":
        add("--report", metavar="BOOL", help="test after fit, print a table, write metrics.csv and training.png")
    add("--print_config", action="store_true", help="print the whole configuration and exit")
    add("--help-all", action="store_true", help="show all options, several hundred lines")
    more = made.add_argument_group("options of the configuration")
    for option, meaning in COMMON.items():
        name, _, value = option.partition("=")
        more.add_argument(name, metavar=value, help=meaning)
    return made


fit, validate, test, predict = (partial(parser, command) for command in DOES)


def accepted(command: str, arguments: Sequence[str]) -> None:
    """Raise CommandError for an option that cannot exist, before importing the libraries that define all others."""
    from lightning_bpfree.cli.common.arguments import configuration_options

    own = [*parser(command).options(), "--verbose", "--weights_only", "--return_predictions", "--print_completion"]
    options = [argument for argument in arguments if argument.startswith("--")]
    configuration_options([option for option in options if option.partition("=")[0] not in own], own)
