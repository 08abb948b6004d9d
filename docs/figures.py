"""The figures of the results: which are out of date, and how each is drawn."""

from __future__ import annotations

import hashlib
import json

import bars
import depths
from concepts import concept_drawings, concept_images
from studies import drawings, images

from lightning_bpfree.cli.compare import curves as compare_curves

TITLES = {"epochs": "the same epochs", "forwards": "the same forward passes"}


def stale_figures(results, folder):
    """Yield the figures that are missing, or were drawn from another file: each holds the hash of its own."""
    for path in sorted(results.glob("*.json")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        for image in _images(path, json.loads(path.read_text(encoding="utf-8"))):
            if _is_stale(folder / f"{image}.png", digest):
                yield folder / f"{image}.png", path, digest


def _images(path, found):
    """Return the stems of the figures that belong to a file."""
    if path.stem.endswith("comparison"):
        return [path.stem, *([f"{path.stem}_curves"] if "curve" in found else [])]
    if path.stem.endswith("benchmarks"):
        drawn = {"depths": depths.series(found), "bars": bars.bars(path.stem, found)}
        return [f"{path.stem}_{kind}" for kind, what in drawn.items() if what]
    if path.stem.endswith("_study"):
        return list(images(path, found))
    return list(concept_images(path, found)) if path.stem.endswith("_concepts") else []


def _is_stale(figure, digest):
    return not figure.exists() or digest.encode() not in figure.read_bytes()


def draw(figure, path, digest):
    """Draw one figure of a file of results: of a comparison, the metric of every rule, or its curves."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if path.stem.endswith("_concepts"):
        drawing = dict(concept_drawings(path, found))[figure.stem]()
    elif "curve" in found and figure.stem != path.stem:
        drawing = compare_curves.figure(found)
    elif figure.stem.endswith("_bars"):
        drawing = bars.figure(path.stem, found)
    elif "rows" in found:
        drawing = depths.figure(found)
    elif "barriers" in found:
        drawing = dict(drawings(path, found))[figure.stem]
    elif "vary" in found:
        from lightning_bpfree.cli.compare.conditions import figure as over_conditions

        drawing = over_conditions(found)
    else:
        drawing = by_rule(found)
    drawing.savefig(figure, metadata={"Source": digest, "Software": None})


def by_rule(found):
    from matplotlib.figure import Figure

    summary = found["summary"]
    height = 0.9 + 0.34 * len(found["rules"])
    drawing = Figure(figsize=(7.2, height * len(summary)), layout="constrained", dpi=150)
    panels = drawing.subplots(len(summary), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (budget, rows) in zip(panels, summary.items(), strict=True):
        for place, row in enumerate(rows):
            if row["mean"] is None:
                axes.annotate("failed", (0, place), va="center", color="tab:red")
                continue
            color = "0.35" if row["label"].startswith("backprop") else "tab:blue"
            axes.errorbar(row["mean"], place, xerr=row["ci95"], fmt="o", capsize=4, color=color)
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x", color="0.9")
        axes.set_title(f"after {TITLES.get(budget, budget)}", fontsize=10)
    panels[-1].set_xlabel(f"{found['metric']}, mean and 95 % confidence interval over {len(found['seeds'])} seeds")
    return drawing
