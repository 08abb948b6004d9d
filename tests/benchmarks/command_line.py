"""Seconds from a command to its answer: `bpfree --version`, `--help`, `recipes list` and the like.

    python tests/benchmarks/command_line.py --out docs/results/command_line.json

Each command runs in a process of its own, `--repeats` times; the shortest and the median count, for what is longer is
other processes' doing. `python -c pass` is measured beside them, and `import torch` and `import lightning.pytorch`,
which every command paid for before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import lightning_bpfree

BPFREE = [sys.executable, "-c", "import sys; from lightning_bpfree.cli import main; sys.exit(main())"]
COMMANDS = {
    "bpfree --version": [*BPFREE, "--version"],
    "bpfree --help": [*BPFREE, "--help"],
    "bpfree recipes list": [*BPFREE, "recipes", "list"],
    "bpfree recipes show quickstart": [*BPFREE, "recipes", "show", "quickstart"],
    "bpfree fit --help": [*BPFREE, "fit", "--help"],
    "bpfree compare --help": [*BPFREE, "compare", "--help"],
    "bpfree fitt (a misspelt command)": [*BPFREE, "fitt"],
    "python -c pass": [sys.executable, "-c", "pass"],
    "import all of the package": [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        "import lightning_bpfree; dir(lightning_bpfree)",
    ],
}
LIMIT = 1.0  # seconds


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for name, command in COMMANDS.items():
        taken = [seconds(command) for _ in range(options.repeats if name.startswith(("bpfree", "python")) else 3)]
        rows.append(
            {"command": name, "shortest_s": round(min(taken), 4), "median_s": round(statistics.median(taken), 4)}
        )
        print(f"{name:<34} shortest {min(taken):.3f} s, median {statistics.median(taken):.3f} s")
    whole = rows[-1]["shortest_s"]
    for row in rows[:-1]:
        row["share_of_import"] = round(row["shortest_s"] / whole, 4)
    found = {
        "command": ["python", "tests/benchmarks/command_line.py", "--repeats", str(options.repeats)],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "lightning_bpfree": lightning_bpfree.__version__},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        "limit_s": LIMIT,
        "rows": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
