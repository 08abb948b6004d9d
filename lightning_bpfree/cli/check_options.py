"""The options of ``bpfree check``."""

from __future__ import annotations

from lightning_bpfree.cli.common.arguments import Parser


def parser() -> Parser:
    """Return the parser of the command's own options; all others are those of the configuration."""
    made = Parser(
        "bpfree check",
        "List, for every rule, whether it can train the module, what prevents it, and what a step costs.\n"
        "One batch is evaluated and nothing is trained. Other options are those of bpfree fit.",
        ["bpfree check -c mine.yaml", "bpfree check -c mine.yaml -c rules/zeroth_order --trainer.precision=bf16-mixed"],
        usage="bpfree check -c FILE [option ...]",
    )
    add = made.add_argument
    add("-c", "--config", action="append", required=True, metavar="FILE", help="a YAML file or a recipe")
    add("--repeats", type=int, default=3, metavar="N", help="timings of each step; the shortest counts (default: 3)")
    return made
