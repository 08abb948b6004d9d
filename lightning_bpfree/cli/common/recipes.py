"""The shipped YAML files: their location, and ``bpfree recipes list|show|copy``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lightning_bpfree.cli.common.arguments import Parser
from lightning_bpfree.cli.common.preconditions import CommandError, did_you_mean, nearest, require_writable
from lightning_bpfree.cli.common.yaml_files import check_yaml

SUFFIXES = (".yaml", ".yml")


def folder() -> Path:
    """Return the folder of the recipes: inside the installed package, or next to it in a source checkout."""
    package = Path(str(resources.files("lightning_bpfree")))
    for place in (package / "recipes", package.parent / "recipes"):
        if (place / "quickstart.yaml").is_file():
            return place
    raise CommandError(f"the recipes are not in {package}: install the package again.")


def names() -> list[str]:
    """Return the names of all recipes, such as ``rules/forward_gradient``."""
    root = folder()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def find(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: such as ``quickstart``, ``rules/forward_gradient.yaml`` or ``recipes/quickstart.yaml``.

    Raises:
        CommandError: if there is no such recipe; the message names the most similar ones.
    """
    plain = name.removeprefix("./").removeprefix("recipes/")
    for suffix in SUFFIXES:
        plain = plain.removesuffix(suffix)
    known = names()
    if plain in known:
        return folder() / f"{plain}.yaml"
    raise CommandError(f"no recipe of this name{nearest(plain, known)} 'bpfree recipes list' shows all.")


def resolve(name: str) -> str:
    """Return the path of a configuration file, which may be given as the name of a recipe.

    Raises:
        CommandError: if it is neither a file nor a recipe.
    """
    if not name:
        raise CommandError("-c: the name of the file is empty. Give a YAML file or a recipe, such as -c quickstart.")
    if any(mark in name for mark in ("{", "\n", ": ", "://")):  # YAML itself or an address, which Lightning takes
        return name
    is_folder = Path(name).is_dir()  # which may have the name of a recipe
    if Path(name).exists() and not is_folder:
        check_yaml(Path(name))
        return name
    try:
        return str(find(name))
    except CommandError as error:
        if is_folder:
            raise CommandError(f"{name} is a folder: give a YAML file in it.") from error
        near = [str(path) for suffix in SUFFIXES for path in Path(name).parent.glob(f"*{suffix}")]
        meant = did_you_mean(name, near)
        message = f"there is no file {name}.{meant}" if meant else f"there is no file {name}, and {error}"
        raise CommandError(message) from error


def with_paths(arguments: Sequence[str]) -> list[str]:
    """Return the command-line arguments with every ``-c NAME`` of a recipe replaced by the path of its file.

    Examples:
        >>> with_paths(["-c", "quickstart", "--trainer.max_epochs=1"])[2]
        '--trainer.max_epochs=1'
    """
    resolved: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if resolved and resolved[-1] in ("-c", "--config"):
            resolved.append(resolve(argument))
        elif equals and option in ("-c", "--config"):
            resolved.append(f"{option}={resolve(value)}")
        else:
            resolved.append(argument)
    return resolved


def config_arguments(files: Sequence[str]) -> list[str]:
    """Return the command-line arguments that read configuration files or recipes, later ones over earlier ones."""
    return [argument for file in files for argument in ("-c", resolve(file))]


def title(path: Path) -> str:
    """Return the description in the first line of a recipe."""
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()


def run(arguments: Sequence[str]) -> int:
    """Run ``bpfree recipes``."""
    options = parser().parse_args(arguments)
    if options.action == "show":
        sys.stdout.write(find(options.name).read_text(encoding="utf-8"))
    elif options.action == "copy":
        sys.stdout.write(f"{copy(options.name, options.dir, options.force)}\n")
    else:
        width = max(len(name) for name in names())
        for name in names():
            sys.stdout.write(f"{name:<{width}}  {title(find(name))}\n")
    return 0


def copy(name: str, target: Path, force: bool = False) -> Path:
    """Copy a recipe to the folder ``target`` and return the new file; overwrites only with ``force``."""
    source = find(name)
    copied = target / source.name
    if copied.exists() and not force:
        raise CommandError(f"{copied} exists: pass --force to overwrite it, or give another DIR.")
    require_writable(target, "the argument DIR")
    shutil.copyfile(source, copied)
    return copied


def parser() -> Parser:
    """Return the parser of the command."""
    made = Parser(
        "bpfree recipes",
        "List, show or copy the YAML files that come with the package.",
        [
            "bpfree recipes list",
            "bpfree recipes show rules/forward_gradient",
            "bpfree recipes copy quickstart my_folder",
        ],
    )
    actions = made.add_subparsers(dest="action", metavar="list|show|copy")
    actions.add_parser("list", description="Print names and titles.", help="print names and titles (the default)")
    show = actions.add_parser("show", description="Print a recipe.", help="print a recipe")
    show.add_argument("name", metavar="NAME", help="such as quickstart or rules/forward_gradient")
    copying = actions.add_parser("copy", description="Copy a recipe to a folder.", help="copy a recipe to a folder")
    copying.add_argument("name", metavar="NAME", help="such as quickstart or rules/forward_gradient")
    copying.add_argument("dir", metavar="DIR", type=Path, help="created if it does not exist")
    copying.add_argument("--force", action="store_true", help="overwrite an existing file")
    return made
