"""The figure of memory against depth, from rows of a benchmark that are named ``KIND memory, SCHEDULE, depth N``."""

from __future__ import annotations

import re

ROW = re.compile(r"(?P<kind>saved|peak) memory, (?P<label>.+), depth (?P<depth>\d+)$")
TITLES = {"saved": "saved for the backward pass", "peak": "peak of live tensors in a step"}
COLORS = {"autograd": "0.35", "checkpoint": "tab:orange", "sequential": "tab:blue", "parallel": "tab:green"}


def series(found):
    """Return memory over depth: kind, then label, then pairs of depth and MiB."""
    made = {}
    for row in found.get("rows", ()):
        match = ROW.match(row["name"])
        if match:
            by_label = made.setdefault(match["kind"], {})
            by_label.setdefault(match["label"], []).append((int(match["depth"]), row["value"]))
    return made


def figure(found):
    """Return a panel for each kind of memory, a line for each schedule."""
    from matplotlib.figure import Figure

    kinds = series(found)
    drawing = Figure(figsize=(8.4, 3.8), layout="constrained", dpi=150)
    for axes, (kind, lines) in zip(drawing.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
        for label, points in lines.items():
            depths, values = zip(*points, strict=True)
            dashed = "--" if label == "parallel" else ":" if "," in label else "-"
            axes.plot(
                depths, values, dashed, marker="o", markersize=3, label=label, color=COLORS.get(label, "tab:purple")
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
        axes.set_xlabel("blocks")
        axes.set_ylabel("MiB")
        axes.set_title(TITLES[kind], fontsize=10)
        axes.grid(color="0.9")
    drawing.axes[0].legend(fontsize=8)
    return drawing
