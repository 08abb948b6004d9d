"""``bpfree metrics``: the metrics that rules and companion callbacks log, one line per metric."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

from lightning_bpfree.cli.common.arguments import Parser
from lightning_bpfree.cli.common.preconditions import CommandError, nearest


def parser() -> Parser:
    """Return the parser of the command."""
    made = Parser(
        "bpfree metrics",
        "List what a rule or another callback of this package logs, one line per metric.",
        ["bpfree metrics", "bpfree metrics ForwardGradient", "bpfree metrics GradientAlignment"],
    )
    made.add_argument("name", nargs="?", metavar="RULE", help="class, such as ForwardGradient (default: all)")
    return made


def tables() -> dict[str, dict[str, str]]:
    """Return the metrics of every class that logs any, by class, each with its meaning.

    Examples:
        >>> tables()["GradientAlignment"]["bpfree/norm_ratio"]
        "norm of the estimate divided by the norm of backprop's gradient"
    """
    import lightning_bpfree

    kinds = inspect.getmembers(lightning_bpfree, inspect.isclass)
    found = {name: getattr(kind, "logged", None) for name, kind in kinds if not inspect.isabstract(kind)}
    return {name: dict(logged) for name, logged in found.items() if logged}


def run(arguments: Sequence[str]) -> int:
    """Run ``bpfree metrics``."""
    name = parser().parse_args(arguments).name
    known = tables()
    if name is not None:
        plain = {key.lower(): key for key in known}
        found = plain.get(name.rpartition(".")[2].lower().replace("_", ""))
        if found is None:
            raise CommandError(f"no class of this name logs metrics{nearest(name, list(known))}")
        known = {found: known[found]}
    for index, (kind, metrics) in enumerate(known.items()):
        sys.stdout.write(f"{chr(10) if index else ''}{kind}\n")
        width = max(map(len, metrics))
        sys.stdout.writelines(f"  {metric:<{width}}  {meaning}\n" for metric, meaning in metrics.items())
    return 0
