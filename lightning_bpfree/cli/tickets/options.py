"""The options of ``bpfree tickets``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_bpfree.cli.common.arguments import Parser

# What the ways to find a ticket are called, and the arguments of LotteryTicket that make them.
KINDS: dict[str, dict[str, Any]] = {
    "snr": {"score": "snr", "weights": "init"},
    "magnitude": {"score": "magnitude", "weights": "init"},
    "random": {"score": "random", "weights": "fresh"},
    "fresh": {"score": "magnitude", "weights": "fresh"},
    "permuted": {"score": "magnitude", "weights": "permuted"},
    "permuted_masks": {"score": "magnitude", "weights": "permuted", "permute_masks": True},
    "snip": {"score": "snip", "weights": "init"},
}


def parser() -> Parser:
    """Return the parser of the command's own options; all others are those of the configuration."""
    made = Parser(
        "bpfree tickets",
        "Find lottery tickets in several ways, from a configuration with a rule and a LotteryTicket; train tickets of\n"
        "the first kind under other rules; measure how the loss rises on the lines between trained networks.\n"
        "Runs on one device. Other options are those of bpfree fit.",
        [
            "bpfree tickets -c papers/es_lottery_tickets --out runs/tickets",
            "bpfree tickets -c papers/es_lottery_tickets --kinds magnitude random --no-connectivity --out out",
        ],
        usage="bpfree tickets -c FILE --out DIR [option ...]",
    )
    add = made.add_argument
    add("-c", "--config", action="append", required=True, metavar="FILE", help="base: YAML files or recipes")
    add(
        "--kinds",
        nargs="+",
        choices=tuple(KINDS),
        default=["snr", "magnitude", "random"],
        metavar="KIND",
        help=f"ways to find tickets: {', '.join(KINDS)}; the first is transferred (default: snr magnitude random)",
    )
    add("--transfer", nargs="+", default=[], metavar="FILE", help="overlays with one other rule each")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="one study for each (default: 0 1 2)")
    add("--no-connectivity", action="store_true", help="leave out the lines between networks")
    add("--metric", default="test_acc", metavar="NAME", help="metric of the test set (default: test_acc)")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of tickets.json, tickets.csv, figures and tickets",
    )
    return made
