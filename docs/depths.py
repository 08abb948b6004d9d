"""The figure of memory against depth, from rows of a benchmark that are named ``KIND memory, SCHEDULE, depth N``."""

from __future__ import annotations

import re

from lightning_bpfree.cli.common.drawing import colors

ROW = re.compile(r"(?P<kind>saved|peak) memory, (?P<label>.+), depth (?P<depth>\d+)$")
TITLES = {"saved": "saved for the backward pass", "peak": "peak of live tensors in a step"}


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
    drawing = Figure(figsize=(5.6, 3.6), layout="constrained", dpi=130)
    panels = drawing.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, (kind, lines) in zip(panels, kinds.items(), strict=True):
        color = colors(list(lines))
        for label, points in lines.items():
            depths, values = zip(*points, strict=True)
            dashed = "--" if label == "parallel" else ":" if "," in label else "-"
            axes.plot(depths, values, dashed, marker="o", markersize=3, label=label, color=color[label])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
        axes.set_xlabel("blocks")
        axes.set_title(TITLES[kind], fontsize=10)
        axes.grid(color="0.9")
    panels[0].set_ylabel("MiB")
    handles = panels[0].get_legend_handles_labels()
    drawing.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    return drawing
