"""The figures of the ensembles' page and study, drawn from docs/results: python docs/deep_ensemble_figures.py."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

HERE = Path(__file__).parent
# Student's t, 97.5 %, by degrees of freedom: SciPy is no dependency of the documentation.
T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
COLORS = {"stacked": "C0", "sequential": "C1", "torchensemble": "C2", "scikit-learn": "C3"}
LABELS = {"stacked": "DeepEnsemble, side by side", "sequential": "DeepEnsemble, in turn"}


def interval(values):
    """Return mean and half width of the 95 % confidence interval of the mean."""
    half = T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def differences(runs, score, how="mean"):
    """Return, by seed, the ensemble's score less its members' mean score."""
    return [run[how][score] - statistics.fmean(member[score] for member in run["members"]) for run in runs]


def tables(found):
    """Draw the paired differences of every table and arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    names = list(found["tables"])
    panels = {
        "acc": "accuracy (right is better)",
        "nll": "relative log-likelihood loss (left is better)",
        "ece": "calibration error (left is better)",
    }
    for axis, (score, title) in zip(axes, panels.items(), strict=True):
        arms = list(next(iter(found["tables"].values()))["arms"])
        for place, arm in enumerate(arms):
            for row, name in enumerate(names):
                if arm not in found["tables"][name]["arms"]:
                    continue
                runs = found["tables"][name]["arms"][arm]["runs"]
                values = differences(runs, score)
                if score == "nll":  # tables differ by orders of magnitude
                    members = [statistics.fmean(m["nll"] for m in run["members"]) for run in runs]
                    values = [value / own for value, own in zip(values, members, strict=True)]
                mean, half = interval(values)
                y = row + 0.25 * (place - (len(arms) - 1) / 2)
                axis.plot(values, [y] * len(values), "|", color=f"C{place}", alpha=0.4, markersize=5)
                axis.errorbar(
                    mean, y, xerr=half, fmt="o", color=f"C{place}", markersize=4, label=arm if row == 0 else None
                )
        axis.axvline(0, color="0.5", linewidth=0.8)
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=4)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.supxlabel("ensemble minus its mean member: mean and 95 % interval; thin marks: each split", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figure


def ratios(found, way, members):
    """Return, by repeat, the time of an epoch over that of one network in Lightning."""
    one = {run["repeat"]: run["seconds"] for run in found["runs"] if run["way"] == "one"}
    own = [run for run in found["runs"] if run["way"] == way and run["members"] == members]
    return [run["seconds"] / one[run["repeat"]] for run in own]


def times(found):
    """Draw the time of an epoch, and memory, by the number of members."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for way, color in COLORS.items():
        counts = sorted({run["members"] for run in found["runs"] if run["way"] == way})
        if not counts:
            continue
        label = LABELS.get(way, way)
        repeats = [ratios(found, way, m) for m in counts]
        left.plot(counts, [statistics.median(own) for own in repeats], "o-", color=color, label=label, markersize=4)
        for one in zip(*repeats, strict=True):
            left.plot(counts, one, color=color, linewidth=0.5, alpha=0.5)
        grown = {run["members"]: run["grown_mib"] for run in found["memory"] if run["way"] == way}
        right.plot(list(grown), list(grown.values()), "o-", color=color, label=label, markersize=4)
    left.axhline(3, color="0.5", linewidth=0.8, linestyle=":")
    for axis, title in (
        (left, "time of an epoch, over one network's in Lightning"),
        (right, "memory grown in training, MiB"),
    ):
        axis.set_xscale("log")
        axis.set_xticks([1, 3, 10, 30], ["1", "3", "10", "30"])
        axis.minorticks_off()
        axis.set_xlabel("members")
        axis.set_title(title, fontsize=9)
    left.set_yscale("log")
    left.set_yticks([0.3, 1, 3, 10, 30], ["0.3", "1", "3", "10", "30"])
    left.legend(fontsize=8)
    return figure


def main():
    """Draw both."""
    for stem, draw in (("deep_ensemble_tables", tables), ("deep_ensemble_times", times)):
        path = HERE / "results" / f"{stem}.json"
        if path.exists():
            draw(json.loads(path.read_text(encoding="utf-8"))).savefig(
                HERE / "img" / f"{stem}.png", dpi=130, metadata={"Software": None}
            )


if __name__ == "__main__":
    main()
