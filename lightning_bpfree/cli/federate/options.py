"""The options of ``bpfree federate``."""

from __future__ import annotations

from pathlib import Path

from lightning_bpfree.cli.common.arguments import Parser


def parser() -> Parser:
    """Return the parser of the command's own options; all others are those of the configuration."""
    made = Parser(
        "bpfree federate",
        "Train a module in a federation whose clients make only forward passes. Other options, such as --rounds=50 or\n"
        "--federation.num_clients=4, override the configuration.",
        [
            "bpfree federate -c papers/baffle --out runs/baffle",
            "bpfree federate -c papers/baffle --out runs/baffle --resume",
            "bpfree federate -c papers/baffle --engine flower-processes --tls --federation.num_clients=3 --rounds=5",
        ],
        usage="bpfree federate -c FILE [option ...]",
    )
    add = made.add_argument
    add("-c", "--config", action="append", required=True, metavar="FILE", help="base: YAML files or recipes")
    add(
        "--engine",
        default="in-process",
        metavar="ENGINE",
        help="in-process, flower-simulation or flower-processes (default: in-process)",
    )
    add("--out", type=Path, default=Path("runs/federate"), metavar="DIR", help="default: runs/federate")
    add("--resume", action="store_true", help="continue from the checkpoint in --out")
    add("--overwrite", action="store_true", help="replace an earlier federation in --out")
    add("--save-every", type=int, default=10, metavar="N", help="rounds between checkpoints (default: 10)")
    add("--timeout", type=float, default=60.0, metavar="S", help="seconds a round waits for answers (default: 60)")
    add("--nodes", type=int, metavar="N", help="nodes that Flower starts (default: one per client)")
    add("--port", type=int, metavar="PORT", help="port of the SuperLink of flower-processes (default: a free one)")
    add("--tls", action="store_true", help="flower-processes: TLS and node authentication, with new certificates")
    return made
