"""The entry point ``bpfree``: finds the command, and turns expected errors into one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_bpfree
from lightning_bpfree.cli.common.preconditions import CommandError, nearest

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")
COMMANDS = (*LIGHTNING_COMMANDS, "check", "compare", "tickets", "federate", "recipes")

HELP = """\
usage: bpfree COMMAND ...

Training rules for any LightningModule. FILE is a YAML file or the name of a shipped recipe.

  fit -c FILE [-c FILE ...]     train; later files overlay earlier ones (also: validate, test, predict)
  check -c FILE                 which rules can train this module, at what cost; one batch, no training
  compare -c FILE --rules ...   train the same module under several rules and backprop; one table
  tickets -c FILE               lottery tickets of several kinds, their transfer, the lines between them; one table
  federate -c FILE              federated learning by forward passes, in one process or on Flower
  recipes list|show|copy        the YAML files that come with the package

first steps:
  bpfree fit -c quickstart
  bpfree fit -c mine.yaml -c rules/forward_gradient

bpfree COMMAND --help tells more; bpfree --version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 for an error that the user can mend.

    Args:
        argv: the arguments behind ``bpfree``; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        sys.stdout.write(f"lightning-bpfree {lightning_bpfree.__version__}\n")
        return 0
    try:
        return _run(arguments[0], arguments[1:])
    except (CommandError, MisconfigurationException) as error:
        sys.stderr.write(f"bpfree {arguments[0]}: error: {error}\n")
        return 2


def _run(command: str, arguments: list[str]) -> int:
    # Modules beside the user are found, as with `python -m`; an installed script looks beside itself only.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    # Commands are imported where used, so that `bpfree recipes` needs no optional package.
    if command in LIGHTNING_COMMANDS:
        from lightning_bpfree.cli import fit

        return fit.run([command, *arguments])
    if command == "check":
        from lightning_bpfree.cli import check

        return check.run(arguments)
    if command == "compare":
        from lightning_bpfree.cli.compare import command as compare

        return compare.run(arguments)
    if command == "tickets":
        from lightning_bpfree.cli.tickets import command as tickets

        return tickets.run(arguments)
    if command == "federate":
        from lightning_bpfree.cli.federate import command as federate

        return federate.run(arguments)
    if command == "recipes":
        from lightning_bpfree.cli.common import recipes

        return recipes.run(arguments)
    raise CommandError(f"no such command{nearest(command, COMMANDS)} The commands are {', '.join(COMMANDS)}.")
