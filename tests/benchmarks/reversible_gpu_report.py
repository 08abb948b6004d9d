"""What ``reversible_gpu.py`` writes: rows made from all of its points, and the file."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import lightning
import torch

import lightning_bpfree as bpf

Point = dict[str, Any]
GOAL, FLOOR = 1.15, 0.98
KEYS = ("model", "size", "precision", "schedule", "batch")


def row(
    name: str, what: str, value: float | None, limit: float | None = None, unit: str = "x", least: bool = False
) -> Point:
    """A row of results; ``least`` for a limit from below."""
    value = None if value is None else float(f"{value:.4g}")
    reached = None if limit is None or value is None else bool(value >= limit if least else value <= limit)
    what += f" (goal: at least {limit:g})" if least and limit else ""
    return {"name": name, "unit": unit, "value": value, "limit": limit, "reached": reached, "what": what}


def summary(points: list[Point]) -> list[Point]:
    """Return rows of the best rates, of ratios between schedules, and of memory."""
    groups: dict[str, dict[str, dict[int, Point]]] = {}
    for p in points:
        if p["rate"] is not None:
            group = groups.setdefault(f"{p['model']} {p['size']} {p['precision']}", {})
            group.setdefault(p["schedule"], {})[p["batch"]] = p
    rows: list[Point] = []
    lowest: list[tuple[float, str]] = []
    for name, found in groups.items():
        unit = "sequences/s" if name.startswith("roberta") else "images/s"
        for schedule, many in found.items():
            best = max(many.values(), key=lambda p: p["rate"])
            what = f"best of batches {', '.join(map(str, many))}: at {best['batch']}"
            rows.append(row(f"throughput, {name}, {schedule}", what, best["rate"], unit=unit))
        for pair in (("parallel", "sequential"), ("sequential", "checkpoint"), ("sequential", "autograd")):
            rows += compared(name, *pair, found)
        a, b = found.get("parallel", {}), found.get("sequential", {})
        lowest += [(a[batch]["rate"] / b[batch]["rate"], f"{name}, batch {batch}") for batch in a.keys() & b.keys()]
    if lowest:
        ratio, where = min(lowest)
        rows.append(row("parallel over sequential, lowest of all", f"throughput, {where}", ratio, FLOOR, least=True))
    return rows


def compared(name: str, over: str, under: str, found: dict[str, dict[int, Point]]) -> list[Point]:
    """Return rows of one schedule over another."""
    a, b = found.get(over, {}), found.get(under, {})
    batches = sorted(a.keys() & b.keys())
    if not batches:
        return []
    best = max(p["rate"] for p in a.values()) / max(p["rate"] for p in b.values())
    each = ", ".join(f"{a[batch]['rate'] / b[batch]['rate']:.3f} at {batch}" for batch in batches)
    goal = GOAL if name.startswith("swin") and over == "parallel" else None
    what = f"best throughput of each, at any batch; {each}; largest batch that ran {max(a)} and {max(b)}"
    rows = [row(f"{over} over {under}, {name}", what, best, goal, least=True)]
    one, other = a[batches[-1]], b[batches[-1]]
    if one["allocated"]:
        what = (
            f"peak allocated at batch {batches[-1]}, with parameters and gradients: {one['allocated']:.0f} over "
            f"{other['allocated']:.0f} MiB; reserved {one['reserved']:.0f} over {other['reserved']:.0f} MiB"
        )
        rows.append(row(f"memory, {over} over {under}, {name}", what, one["allocated"] / other["allocated"]))
    return rows


class Report:
    """The file, written again after every model, so that what was measured is there whatever happens.

    Args:
        out: the file; None for none.
        device: what is measured on.
        append: whether to keep what the file has, if it comes from the same device and versions.

    Raises:
        SystemExit: if it does not.
    """

    def __init__(self, out: Path | None, device: torch.device, append: bool) -> None:
        self.out, self.checks, self.points = out, [], []
        self.command = " ".join(["python tests/benchmarks/reversible_gpu.py", *sys.argv[1:]])
        self.device, self.versions = f"CPU, {platform.machine()}", {"python": platform.python_version()}
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory / 2**30
            self.device = f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB"
            self.versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        self.versions |= {"torch": torch.__version__, "lightning": lightning.__version__}
        self.versions["lightning_bpfree"] = bpf.__version__
        if append and out is not None and out.exists():
            self._keep(json.loads(out.read_text(encoding="utf-8")))

    def _keep(self, old: Point) -> None:
        if (old["device"], old["versions"]) != (self.device, self.versions):
            raise SystemExit(
                f"--append: {self.out} was measured on {old['device']} with {old['versions']}, this is {self.device} "
                f"with {self.versions}: give another --out."
            )
        self.checks, self.points = old["checks"], old["points"]
        self.command = f"{old['command']} && {self.command}"

    def rows(self) -> list[Point]:
        """Return the rows of all results so far."""
        return self.checks + summary(self.points)

    def add(self, points: list[Point] | None = None, checks: list[Point] | None = None) -> None:
        """Take in new results, in the place of older ones of the same, and write the file."""
        points, checks = points or [], checks or []
        new = [[p[key] for key in KEYS] for p in points]
        self.points = [p for p in self.points if [p[key] for key in KEYS] not in new] + points
        names = {check["name"] for check in checks}
        self.checks = [check for check in self.checks if check["name"] not in names] + checks
        if self.out is None:
            return
        result = {
            "command": self.command,
            "date": datetime.date.today().isoformat(),
            "seed": 0,
            "device": self.device,
            "versions": self.versions,
            "rows": self.rows(),
            "checks": self.checks,
        }
        lines = ",\n  ".join(map(json.dumps, self.points))  # there are hundreds: a line each
        self.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1)[:-2] + f',\n "points": [\n  {lines}\n ]\n}}\n'
        self.out.write_text(text, encoding="utf-8")
