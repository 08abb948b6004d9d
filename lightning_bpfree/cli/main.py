"""The entry point ``bpfree``: finds the command, and turns expected errors into one line and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name

import lightning_bpfree
from lightning_bpfree.cli.commands import COMMANDS
from lightning_bpfree.cli.common.preconditions import CommandError, nearest

HELP = """\
usage: bpfree COMMAND ...

Train any LightningModule with a training rule other than backprop, or compare such rules with backprop.

commands:
{commands}

examples:
  bpfree fit -c quickstart                                   train a small network with forward gradients
  bpfree fit -c mine.yaml -c rules/forward_gradient          train your module with another rule
  bpfree check -c mine.yaml                                  list the rules that can train your module
  bpfree compare -c mine.yaml --rules rules/zeroth_order --out comparison

FILE is a YAML file or the name of a shipped recipe (bpfree recipes list).
bpfree COMMAND --help shows the options of a command; bpfree --version shows the version.
"""
INTERRUPTED, TERMINATED = 130, 143  # 128 + the number of the signal, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    The code is 0 for success, 2 for an error that the user can correct, 1 for a command without a result, 130 after
    Ctrl-C, and 143 after SIGTERM. Errors in the user's own code are raised, with their traceback.

    Args:
        argv: the arguments after ``bpfree``; None uses those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        sys.stdout.write(f"lightning-bpfree {lightning_bpfree.__version__}\n")
        return 0
    try:
        code = _run(arguments[0], arguments[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        return _without_reader()
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        # Lightning exits with 1 after Ctrl-C.
        code = TERMINATED if type(error).__name__ == "Terminated" else INTERRUPTED
        return _ended(arguments[0], code, str(error) if isinstance(error, KeyboardInterrupt) else "")
    except Exception as error:
        return _failed(arguments[0], error)
    return code


def _failed(command: str, error: Exception) -> int:
    """Print an error in one line and return the exit code; raise it again if it is one of the user's own code."""
    from lightning_bpfree.cli.common.errors import explained

    if type(error).__name__ == "SIGTERMException":  # Lightning's
        return _ended(command, TERMINATED)
    message = explained(error)
    if message is None or os.environ.get("BPFREE_TRACEBACK"):
        raise error
    sys.stderr.write(f"bpfree {command}: error: {message}\n")
    return 2


def _ended(command: str, code: int, what: str = "") -> int:
    ended = "interrupted" if code == INTERRUPTED else "terminated"
    sys.stderr.write(f"\nbpfree {command}: {ended}.{' ' if what else ''}{what}\n")
    return code


def _without_reader() -> int:
    """Return the exit code where what reads the output has ended, as ``head`` does; Python would print an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _run(name: str, arguments: list[str]) -> int:
    command = COMMANDS.get(name)
    if command is None:
        raise CommandError(f"there is no such command{nearest(name, list(COMMANDS))} 'bpfree --help' lists all.")
    if command.options and any(argument in ("-h", "--help") for argument in arguments):
        resolve_name(command.options)().print_help()
        return 0
    # Modules beside the user are found, as with `python -m`; an installed script looks beside itself only.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    code: int = resolve_name(command.run)(arguments)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    return HELP.format(commands="\n".join(f"  {name:<{width}}  {row.summary}" for name, row in COMMANDS.items()))
