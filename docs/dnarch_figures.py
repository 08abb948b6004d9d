"""The figures of learned architectures, drawn from docs/results: python docs/dnarch_figures.py."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

HERE = Path(__file__).parent
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t, 97.5 %, by degrees of freedom
COLORS = {
    "reference": "0.3",
    "learned W": "C0",
    "learned W+D": "C4",
    "uniform": "C1",
    "torch-pruning": "C2",
    "K": "C0",
    "K+R": "C5",
    "K+R+W": "C6",
    "K+R+W+D": "C3",
}
TITLES = {
    "sequence": "digits as a sequence: accuracy",
    "image": "Fashion-MNIST, 14 x 14: accuracy",
    "dense": "digits, denoising: mean squared error",
}


def interval(values):
    """Return mean and half width of the 95 % confidence interval of the mean."""
    if len(values) < 2:
        return statistics.fmean(values), 0.0
    half = T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def scores(runs, **key):
    return [run["score"] for run in runs if all(run[name] == value for name, value in key.items())]


def draw(axis, rows, runs, keys):
    for place, key in enumerate(keys):
        values = scores(runs, **key)
        if not values:
            continue
        mean, half = interval(values)
        color = COLORS[key["arm"]]
        axis.plot(values, [place] * len(values), "|", color=color, alpha=0.5, markersize=9)
        axis.errorbar(mean, place, xerr=half, fmt="o", color=color, markersize=5)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=8)


def smaller(found):
    """Draw accuracies of a residual network made smaller."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, share in ((left, 0.5), (right, 0.25)):
        arms = ["uniform", "learned W", "learned W+D", "torch-pruning"]
        keys = [{"arm": "reference", "share": 1.0}, *({"arm": arm, "share": share} for arm in arms)]
        draw(axis, [key["arm"] for key in keys], found["pruning"]["runs"], keys)
        axis.set_title(f"{share:.0%} of the multiply-accumulates (right is better)", fontsize=8)
    figure.supxlabel("test accuracy; a stroke for each seed, 95 % interval of the mean", fontsize=8)
    return figure


def ablation(found):
    """Draw the scores of more and more learned dimensions."""
    from matplotlib.figure import Figure

    parts = [part for part in TITLES if part in found]
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    for axis, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        keys = [{"arm": arm} for arm in ("K", "K+R", "K+R+W", "K+R+W+D", "reference")]
        draw(axis, [key["arm"] for key in keys], found[part]["runs"], keys)
        axis.set_title(TITLES[part], fontsize=8)
    figure.supxlabel("a stroke for each seed, 95 % interval of the mean", fontsize=8)
    return figure


def architectures(found, part="sequence", seed=0):
    """Draw the sizes that were found, and the way to them."""
    from matplotlib.figure import Figure

    arms = [run for run in found[part]["runs"] if run["seed"] == seed and "sizes" in run]
    names = list(arms[-1]["sizes"])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.2])
    for run in arms:
        steps, costs = ([h[key] for h in run["history"]] for key in ("step", "cost"))
        left.plot(steps, costs, color=COLORS[run["arm"]], label=run["arm"])
    left.axhline(1, color="0.4", linewidth=0.8)
    left.set_xlabel("step", fontsize=8)
    left.set_ylabel("cost / budget", fontsize=8)
    left.set_yscale("log")
    left.legend(fontsize=8)
    shares = [[(run["history"][-1]["shares"]).get(name, math.nan) for run in arms] for name in names]
    mesh = right.pcolormesh(range(len(arms) + 1), range(len(names) + 1), shares, cmap="viridis", vmin=0, vmax=1)
    for row, name in enumerate(names):
        for column, run in enumerate(arms):
            if name in run["sizes"]:
                right.text(column + 0.5, row + 0.5, run["sizes"][name], ha="center", va="center", fontsize=8, color="w")
    right.set_xticks([c + 0.5 for c in range(len(arms))], [run["arm"] for run in arms], fontsize=8)
    labels = ["width/stream" if "stem.1 +" in name else name for name in names]
    right.set_yticks([r + 0.5 for r in range(len(names))], labels, fontsize=7)
    right.invert_yaxis()
    figure.colorbar(mesh, ax=right, label="size / largest size")
    left.tick_params(labelsize=8)
    return figure


def main() -> None:
    found = json.loads((HERE / "results" / "dnarch_accuracy.json").read_text())
    for name, figure in (
        ("dnarch_smaller", smaller(found)),
        ("dnarch_ablation", ablation(found)),
        ("dnarch_architectures", architectures(found)),
    ):
        figure.savefig(HERE / "img" / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
