"""``bpfree completion``: a shell script that completes commands, options and recipes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pkgutil import resolve_name
from typing import Any, NoReturn, get_args

from lightning_bpfree.cli.commands import COMMANDS
from lightning_bpfree.cli.common import recipes
from lightning_bpfree.cli.common.arguments import Parser
from lightning_bpfree.cli.common.preconditions import require

SHELLS = ("bash", "zsh", "tcsh")
READS_RECIPES = ("config", "rules", "transfer")  # options that take a YAML file or the name of a recipe
RECIPES = {
    "bash": '_bpfree_recipes() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
    "zsh": "_bpfree_recipes() {{ _alternative 'recipes:recipe:({names})' 'files:file:_files' }}",
    "tcsh": "",
}


def parser() -> Parser:
    """Return the parser of the command."""
    made = Parser(
        "bpfree completion",
        "Print a script with which a shell completes commands, options and recipes.\n"
        'It needs pip install "lightning-bpfree[completion]".',
        [
            "bpfree completion bash > ~/.bpfree.bash       with source ~/.bpfree.bash in ~/.bashrc",
            "bpfree completion zsh > ~/.zfunc/_bpfree      with fpath+=~/.zfunc before compinit in ~/.zshrc",
        ],
    )
    made.add_argument("shell", choices=SHELLS)
    return made


def script(shell: str) -> str:
    """Return the script of a shell.

    Args:
        shell: ``bash``, ``zsh`` or ``tcsh``.
    """
    import shtab

    whole: Any = _configuration_parser()
    actions = whole._subcommands_action
    for name, row in COMMANDS.items():
        if name not in actions._name_parser_map:
            actions._name_parser_map[name] = _parser_of(name)
            actions._choices_actions.append(actions._ChoicesPseudoAction(name, (), row.summary))
    names = " ".join(recipes.names())
    preamble = RECIPES[shell].format(names=names)
    for part in _parsers(whole):
        vars(part).setdefault("_subcommands_action", None)  # jsonargparse looks for it in plain parsers too
        for action in part._actions:
            if action.dest in READS_RECIPES:
                action.complete = {"bash": "_bpfree_recipes", "zsh": "_bpfree_recipes"}  # tcsh has no functions
            elif not action.choices and _takes_a_class(action):
                # Else jsonargparse lists the options of all subclasses of nn.Module, and of their own modules in turn,
                # for more than a minute. A class may be described by a file.
                action.complete = shtab.FILE
    text: str = whole.get_completion_script(f"shtab-{shell}", preambles=[preamble] if preamble else [])
    return text


def _takes_a_class(action: argparse.Action) -> bool:
    """Whether an option of the configuration is annotated with a class, alone or in a union or list."""
    hint = getattr(action, "_typehint", None)
    parts = [hint, *get_args(hint)]
    parts += [inner for part in parts[1:] for inner in get_args(part)]
    return any(
        isinstance(part, type) and part.__module__.partition(".")[0] not in ("builtins", "typing") for part in parts
    )


def _parser_of(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command that reads no configuration, or only adds options to those of ``fit``."""
    made: argparse.ArgumentParser = resolve_name(COMMANDS[name].options or f"{recipes.__name__}:parser")()
    return made


def _parsers(top: Any) -> Iterator[Any]:
    yield top
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                yield from _parsers(part)


def _configuration_parser() -> Any:
    """Return the parser of ``fit``, ``validate``, ``test`` and ``predict``, which LightningCLI makes of signatures."""
    from lightning_bpfree.cli.common.configured import ConfigCLI

    made: list[Any] = []

    class Made(Exception):  # noqa: N818  # stops LightningCLI before it parses
        pass

    class ParserOnly(ConfigCLI):
        def parse_arguments(self, parser: Any, args: Any) -> NoReturn:
            made.append(parser)
            raise Made

    try:
        ParserOnly([])
    except Made:
        return made[0]
    raise AssertionError("LightningCLI has made no parser")


def run(arguments: Sequence[str]) -> int:
    """Run ``bpfree completion``."""
    shell = parser().parse_args(arguments).shell
    require("jsonargparse", "shtab", extra="completion")
    sys.stdout.write(script(shell))
    return 0
