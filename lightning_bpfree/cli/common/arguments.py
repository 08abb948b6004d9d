"""Parsers of the command line: examples in the help, one-line errors, and suggestions for misspelled options."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from lightning_bpfree.cli.common.preconditions import CommandError, did_you_mean

# What the configuration of a run holds at its top, which any command that reads one takes as options too.
CONFIGURATION = ("model", "data", "trainer", "optimizer", "lr_scheduler", "seed_everything", "report")


class Parser(argparse.ArgumentParser):
    """A parser with one-line errors.

    Args:
        prog: the command, such as ``bpfree compare``.
        description: what it does, in one or two sentences.
        examples: whole command lines.
    """

    def __init__(self, prog: str, description: str = "", examples: Sequence[str] = (), **settings: Any) -> None:
        lines = "\n".join(f"  {example}" for example in examples)
        settings.setdefault("epilog", f"examples:\n{lines}" if examples else None)
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=formatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise CommandError, with the nearest option or choice for a misspelled one."""
        raise CommandError(f"{message}.{self._meant(message)} '{self.prog} --help' shows the options.")

    def _meant(self, message: str) -> str:
        _, found, rest = message.partition("unrecognized arguments: ")
        if found:
            return did_you_mean(rest.split()[0].partition("=")[0], self.options())
        _, found, rest = message.partition("invalid choice: ")
        given, _, choices = rest.partition(" (choose from ")
        if not found:
            return ""
        return did_you_mean(given.strip("'"), [choice.strip("' )") for choice in choices.split(",")])

    def options(self) -> list[str]:
        """Return all options, such as ``--out``."""
        return [option for option in self._option_string_actions if option.startswith("--")]


def configuration_options(given: Sequence[str], own: Iterable[str]) -> list[str]:
    """Return the arguments that a command passes to the configuration, such as ``--trainer.max_epochs=3``.

    Args:
        given: the arguments that the command does not know.
        own: the command's own options, to suggest one for a misspelled argument.

    Raises:
        CommandError: if one of them cannot be an option of a configuration.

    Examples:
        >>> configuration_options(["--trainer.max_epochs=3"], ["--out"])
        ['--trainer.max_epochs=3']
    """
    known = [*own, *(f"--{name}" for name in CONFIGURATION)]
    for argument in given:
        option = argument.partition("=")[0]
        if option.startswith("--") and option.partition(".")[0].rstrip("+") not in known:
            head = option.partition(".")[0]
            raise CommandError(f"there is no option {option}.{did_you_mean(head, known)}")
    return list(given)
