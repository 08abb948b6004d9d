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
        "Find lottery tickets of several kinds, starting from a configuration with a rule and a LotteryTicket. Then\n"
        "train the tickets of the first kind by other rules (--transfer), and measure the metric and the loss on the\n"
        "straight lines between trained networks. Runs on one device. Other options are those of bpfree fit.",
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
        help=f"kinds of tickets: {', '.join(KINDS)}; the first one is transferred (default: snr magnitude random)",
    )
    add("--transfer", nargs="+", default=[], metavar="FILE", help="overlays, each with another rule")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="one study for each seed (default: 0 1 2)")
    add("--no-connectivity", action="store_true", help="skip the lines between networks")
    add("--overwrite", action="store_true", help="replace the results of an earlier study in --out")
    add("--metric", default="test_acc", metavar="NAME", help="metric of the test set (default: test_acc)")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of tickets.json, tickets.csv, figures and tickets",
    )
    return made
