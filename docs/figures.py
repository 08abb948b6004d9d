"""The figures of the results: which are out of date, and how each is drawn."""

from __future__ import annotations

import hashlib
import json

import bars
import depths
from concepts import concept_drawings, concept_images
from studies import drawings, images

from lightning_bpfree.cli.common.drawing import colors
from lightning_bpfree.cli.compare import curves as compare_curves
from lightning_bpfree.cli.compare.results import figure as by_rule

TITLES = {"epochs": "the same epochs", "forwards": "the same forward passes"}
DRAWN = b"5"  # a new number draws all figures anew: they are known by the hash of their file and of it


def stale_figures(results, folder):
    """Yield the figures that are missing, or were drawn from another file: each holds the hash of its own."""
    for path in sorted(results.glob("*.json")):
        digest = _digest(path)
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


def _digest(path):
    return hashlib.sha256(path.read_bytes() + DRAWN).hexdigest()


def _is_stale(figure, digest):
    return not figure.exists() or digest.encode() not in figure.read_bytes()


def draw(figure, path, digest):
    """Draw one figure of a file of results: of a comparison, the metric of every rule, or its curves."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if path.stem.endswith("_concepts"):
        drawing = dict(concept_drawings(path, found))[figure.stem]()
    elif "curve" in found and figure.stem != path.stem:
        drawing = curves(found)
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


MANY = 5  # rules; more curves in one panel hide one another


def curves(found):
    """Return the curves of a comparison; for many rules a panel each, with the first one in gray beside it."""
    if len(found["rules"]) <= MANY or len(found["budgets"]) > 1:
        return compare_curves.figure(found)
    from matplotlib.figure import Figure

    rules, budget = found["rules"], found["budgets"][0]
    first, others = rules[0], rules[1:]
    color = colors([rule["label"] for rule in rules])
    rows = -(-len(others) // 2)
    drawing = Figure(figsize=(5.6, 1.75 * rows + 0.6), layout="constrained", dpi=130)
    panels = drawing.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, rule in zip(panels, others, strict=False):
        for one in (first, rule):
            known = compare_curves.curves(one, budget)
            for curve in known:
                axes.plot(*zip(*curve, strict=True), color=color[one["label"]], linewidth=0.7, alpha=0.6)
            batches, means, *_ = zip(*compare_curves.mean_curve(known), strict=True)
            axes.plot(batches, means, color=color[one["label"]], linewidth=2)
        for value in found["curve"]["reach"]:
            axes.axhline(value, color="0.4", linestyle=":", linewidth=0.8)
        axes.set_title(rule["label"], fontsize=11, color=color[rule["label"]])
        axes.grid(axis="y", color="0.92")
    for axes in panels[len(others) :]:
        axes.set_visible(False)
    drawing.supxlabel(
        f"training batches; thick: mean of {len(found['seeds'])} seeds, thin: each, gray: {first['label']}", fontsize=10
    )
    drawing.supylabel(found["curve"]["metric"], fontsize=10)
    return drawing
