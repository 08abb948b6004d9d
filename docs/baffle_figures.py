"""The figures and tables of BAFFLE's pages, from docs/results: python docs/baffle_figures.py."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Student's t, 97.5 %, by degrees of freedom: SciPy is no dependency of the documentation.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
NUMS = (20, 50, 100, 200, 500)
ARMS = {f"K={num}": f"C{i}" for i, num in enumerate(NUMS)}
ARMS |= {"backprop, gradients": "0.4", "backprop, FedAvg": "black"}
SPLITS = {"iid": "even clients", "dirichlet": "Dirichlet(0.3)"}


def interval(values):
    """Return mean and half width of the 95 % confidence interval of the mean; NaN for one value."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def runs_of(found, split, arm):
    """Return the runs of an arm by seed."""
    return {run["seed"]: run for run in found["runs"] if run["split"] == split and run["arm"] == arm}


def curves(found):
    """Draw accuracy against rounds, and against bytes that a client has sent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True)
    for row, (split, title) in zip(axes, SPLITS.items(), strict=True):
        for arm, color in ARMS.items():
            runs = list(runs_of(found, split, arm).values())
            for column, axis in enumerate(row):
                scale = [run["bytes_up"] if column else 1 for run in runs]
                for run, factor in zip(runs, scale, strict=True):
                    axis.plot(
                        [r * factor for r in run["rounds"]], run["test_acc"], color=color, alpha=0.3, linewidth=0.7
                    )
                mean = [statistics.fmean(values) for values in zip(*(run["test_acc"] for run in runs), strict=True)]
                if runs:
                    axis.plot([r * scale[0] for r in runs[0]["rounds"]], mean, color=color, linewidth=1.6, label=arm)
        row[1].set_xscale("log")
        row[0].set_ylabel(f"{title}\ntest accuracy", fontsize=8)
        for axis in row:
            axis.set_ylim(0.5, 1.0)
            axis.axhline(0.93, color="0.7", linewidth=0.8, linestyle=":")
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.2)
    axes[1][0].set_xlabel("rounds", fontsize=8)
    axes[1][1].set_xlabel("bytes that a client has sent", fontsize=8)
    axes[0][0].legend(fontsize=7, loc="lower right")
    return figure


def directions(found):
    """Draw the distance of each K to backprop with the same batches, paired by seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axis, (split, title) in zip(figure.subplots(1, 2, sharey=True), SPLITS.items(), strict=True):
        for name, color, nums in (("", "C0", NUMS), ("per client ", "C1", (20, 100))):
            means = {num: gap(found, split, f"{name}K={num}") for num in nums}
            for num in nums:
                mean, half, values = means[num]
                axis.plot([num] * len(values), values, "_", color=color, alpha=0.6)
                axis.errorbar(num, mean, yerr=half, fmt="o", color=color, markersize=4, capsize=2)
            label = "directions of its own for each client" if name else "shared directions"
            axis.plot(nums, [means[num][0] for num in nums], color=color, linewidth=1, label=label)
        axis.axhline(0, color="0.5", linewidth=0.8)
        axis.set_ylim(-0.15, 0.02)
        axis.set_xscale("log")
        axis.set_xticks(NUMS, [str(num) for num in NUMS], fontsize=8)
        axis.minorticks_off()
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("directions K", fontsize=8)
        axis.grid(alpha=0.2)
        axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, loc="lower right")
    figure.axes[0].set_ylabel("test accuracy less backprop's", fontsize=8)
    return figure


def gap(found, split, arm, base="backprop, gradients"):
    """Return mean, half interval and values of the differences to a baseline, paired by seed."""
    one, other = runs_of(found, split, arm), runs_of(found, split, base)
    values = [run["test_acc"][-1] - other[seed]["test_acc"][-1] for seed, run in one.items() if seed in other]
    return (*interval(values), values)


def first_round(runs, level=0.93):
    """Return the first evaluated round from which on every seed has that test accuracy; None without one."""
    for i, number in enumerate(runs[0]["rounds"]):
        if all(min(run["test_acc"][i:]) >= level for run in runs):
            return number
    return None


def table(found):
    """Return the table of the study in Markdown."""
    head = ["", "even clients", "less backprop", "≥ 93 % from", "Dirichlet(0.3)", "less backprop", "up", "forwards"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for arm in dict.fromkeys(run["arm"] for run in found["runs"]):
        cells = []
        for split in SPLITS:
            runs = list(runs_of(found, split, arm).values())
            if not runs:
                cells += ["–"] * (3 if split == "iid" else 2)
                continue
            mean, half = interval([run["test_acc"][-1] for run in runs])
            cells.append(f"{mean:.3f} ± {half:.3f}")
            mean, half, _ = gap(found, split, arm)
            cells.append("–" if arm == "backprop, gradients" else f"{mean:+.3f} ± {half:.3f}")
            if split == "iid":
                cells.append(str(first_round(runs) or "–"))
        run = next(iter(runs_of(found, "iid", arm).values()))
        lines.append(f"| {arm} | {' | '.join(cells)} | {run['bytes_up']:,} B | {run['forward_passes']:,.0f} |")
    return "\n".join(lines)


def main():
    """Draw the figures, and print the tables."""
    found = json.loads((HERE / "results/baffle_accuracy.json").read_text(encoding="utf-8"))
    for name, figure in {"curves": curves(found), "directions": directions(found)}.items():
        figure.savefig(HERE / f"img/baffle_{name}.png", dpi=110)
    sys.stdout.write(table(found) + "\n")


if __name__ == "__main__":
    main()
