"""The commands of ``bpfree``: one line each, imported when they are used."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """One command.

    Args:
        run: ``module:function``; the function takes the arguments after the command and returns an exit code.
        summary: one line for ``bpfree --help``.
        options: ``module:function`` that returns the command's parser and imports neither torch nor Lightning, so that
            ``--help`` and shell completion respond immediately. Empty if ``run`` creates the parser.
    """

    run: str
    summary: str
    options: str = ""


_CLI = "lightning_bpfree.cli"
COMMANDS: dict[str, Command] = {
    "fit": Command(f"{_CLI}.fit:fit", "train a module", f"{_CLI}.fit_options:fit"),
    "validate": Command(f"{_CLI}.fit:validate", "evaluate on the validation set", f"{_CLI}.fit_options:validate"),
    "test": Command(f"{_CLI}.fit:test", "evaluate on the test set", f"{_CLI}.fit_options:test"),
    "predict": Command(f"{_CLI}.fit:predict", "compute predictions", f"{_CLI}.fit_options:predict"),
    "check": Command(f"{_CLI}.check:run", "list the rules that can train a module", f"{_CLI}.check_options:parser"),
    "compare": Command(
        f"{_CLI}.compare.command:run", "train a module under several rules", f"{_CLI}.compare.options:parser"
    ),
    "tickets": Command(f"{_CLI}.tickets.command:run", "find lottery tickets", f"{_CLI}.tickets.options:parser"),
    "federate": Command(
        f"{_CLI}.federate.command:run", "train in a federation of clients", f"{_CLI}.federate.options:parser"
    ),
    "metrics": Command(f"{_CLI}.metrics:run", "list the metrics that a rule logs", f"{_CLI}.metrics:parser"),
    "recipes": Command(f"{_CLI}.common.recipes:run", "list, show or copy the shipped YAML files"),
    "completion": Command(f"{_CLI}.completion:run", "print a script for shell completion", f"{_CLI}.completion:parser"),
}
