"""One-line errors for this package and the libraries it uses. Errors in the user's code keep their traceback."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator

from lightning_bpfree.cli.common.preconditions import CommandError

OWN = "lightning_bpfree"
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities")
# Where a traceback helps the developers of these libraries rather than the user. All other modules are the user's.
LIBRARIES = (
    *(OWN, *LIGHTNING, "torch", "torchmetrics", "jsonargparse", "yaml", "numpy", "sklearn", "scipy", "fsspec", "wandb"),
    *("tensorboard", "rich", "matplotlib", "mnist1d", "gymnasium", "diffusers", "transformers", "peft", "safetensors"),
    *("PIL", "typeshed_client", "docstring_parser", "tqdm", "packaging", "torchdiffeq", "shtab"),
)


def explained(error: BaseException) -> str | None:
    """Return an error's message with what to do, in one line; None if it was raised in the user's own code.

    Args:
        error: the error, with its traceback.
    """
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, CommandError) or type(link).__name__ == "MisconfigurationException":
            return in_one_line(str(link))
    if any(_is_users(module) for link in chain for module, _ in _places(link)):
        return None
    first = chain[-1]
    known = _of_state_dict(str(first)) or refusal(error)
    if known:
        return known
    places = _places(first)[::-1] or [("", 0)]
    place = next((place for place in places if place[0].split(".")[0] == OWN), places[0])
    what = in_one_line(str(first)) or "no message"
    return (
        f"{type(first).__name__}: {what} (in {place[0]}, line {place[1]}). Set BPFREE_TRACEBACK=1 to see the traceback."
    )


def refusal(error: BaseException) -> str | None:
    """Return the message of this package or Lightning about an argument that they refuse; None for other errors.

    Args:
        error: the error, with its traceback.
    """
    for link in _chain(error):
        module = next(reversed(_places(link)), ("", 0))[0]
        if module.split(".")[0] in (OWN, *LIGHTNING) and isinstance(
            link, ValueError | TypeError | ImportError | OSError
        ):
            return in_one_line(str(link))
    return None


def in_one_line(message: str) -> str:
    r"""Return a message without line breaks.

    Examples:
        >>> in_one_line("two\n  lines")
        'two lines'
    """
    return " ".join(message.split())


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it, back to the first: parsers wrap what a constructor raises at every level."""
    yield error
    while error.__cause__ is not None:
        error = error.__cause__
        yield error


def _places(error: BaseException) -> list[tuple[str, int]]:
    """Return the module and line of each call, outermost first."""
    walked = traceback.walk_tb(error.__traceback__)
    return [(frame.f_globals.get("__name__", ""), line) for frame, line in walked]


def _is_users(module: str) -> bool:
    top = module.split(".")[0]
    return top == "__main__" or not (top in sys.stdlib_module_names or top in LIBRARIES)


def _of_state_dict(message: str) -> str:
    r"""Return what is wrong if a checkpoint is of another network; empty for other errors.

    Examples:
        >>> said = 'Error(s) in loading state_dict for Net:\n\tMissing key(s) in state_dict: "a", "b". '
        >>> _of_state_dict(said).partition(". ")[0]
        "the checkpoint does not fit the model: 2 parameters are missing in the checkpoint (the first is 'a')"
    """
    if "Error(s) in loading state_dict" not in message:
        return ""
    found = []
    patterns = {
        "missing in the checkpoint": r"Missing key\(s\) in state_dict: ([^\n]*)",
        "unknown to the model": r"Unexpected key\(s\) in state_dict: ([^\n]*)",
    }
    for what, pattern in patterns.items():
        names = re.findall(r'"([^"]+)"', "".join(re.findall(pattern, message)))
        if names:
            found.append(f"{len(names)} parameters are {what} (the first is {names[0]!r})")
    shapes = re.findall(r"size mismatch for ([\w.]+)", message)
    if shapes:
        found.append(f"{len(shapes)} parameters have another shape (the first is {shapes[0]!r})")
    said = "; ".join(found) or in_one_line(message)
    return (
        f"the checkpoint does not fit the model: {said}. Give the configuration with which it was trained: config.yaml "
        "in the folder of its run."
    )
