"""Write the figures and tables of BAFFLE's pages from docs/results; ``--check`` only looks at the tables.

A page marks a table by ``<!-- baffle:NAME -->`` and ``<!-- /baffle -->``; NAME is a key of :data:`TABLES`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

from lightning_bpfree.cli.common.drawing import COLORS, GRAY

PART = re.compile(r"(<!-- baffle:(?P<name>\w+) -->\n).*?(<!-- /baffle -->)", re.DOTALL)
HERE = Path(__file__).parent
# Student's t, 97.5 %, by degrees of freedom: SciPy is no dependency of the documentation.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
NUMS = (20, 50, 100, 200, 500)
# More directions, darker: a quantity, not a kind.
SHADES = ("#9edae5", COLORS["zeroth_order"], "#1f77b4", "#2c5aa0", "#1a2a5e")
ARMS = {f"K={num}": (color, "-") for num, color in zip(NUMS, SHADES, strict=True)}
ARMS |= {"backprop, gradients": (GRAY, "-"), "backprop, FedAvg": (GRAY, "--")}
SPLITS = {"iid": "even clients", "dirichlet": "Dirichlet(0.3)"}


def interval(values):
    """Return mean and half width of the 95 % confidence interval of the mean; NaN for one value."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), T[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def runs_of(found, split, arm):
    """Return the runs of an arm by seed."""
    return {run["seed"]: run for run in found["runs"] if run["split"] == split and run["arm"] == arm}


def curves(found, split):
    """Draw accuracy against rounds, and against bytes that a client has sent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.9), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for arm, (color, style) in ARMS.items():
        runs = list(runs_of(found, split, arm).values())
        for column, axis in enumerate(axes):
            scale = [run["bytes_up"] if column else 1 for run in runs]
            for run, factor in zip(runs, scale, strict=True):
                axis.plot([r * factor for r in run["rounds"]], run["test_acc"], color=color, alpha=0.3, linewidth=0.7)
            mean = [statistics.fmean(values) for values in zip(*(run["test_acc"] for run in runs), strict=True)]
            if runs:
                axis.plot([r * scale[0] for r in runs[0]["rounds"]], mean, style, color=color, linewidth=1.6, label=arm)
    for axis, label in zip(axes, ("rounds", "bytes that a client has sent"), strict=True):
        axis.set_ylim(0.5, 1.0)
        axis.axhline(0.93, color="0.7", linewidth=0.8, linestyle=":")
        axis.tick_params(labelsize=8)
        axis.set_xlabel(label, fontsize=8)
        axis.grid(alpha=0.2)
    axes[1].set_xscale("log")
    axes[0].set_ylabel(f"{SPLITS[split]}\ntest accuracy", fontsize=8)
    axes[0].legend(fontsize=7, loc="lower right")
    return figure


def directions(found):
    """Draw the distance of each K to backprop with the same batches, paired by seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axis, (split, title) in zip(figure.subplots(1, 2, sharey=True), SPLITS.items(), strict=True):
        kinds = (("", COLORS["zeroth_order"], NUMS, 1), ("per client ", COLORS["evolution_strategy"], (20, 100), 1.07))
        for name, color, nums, beside in kinds:
            means = {num: gap(found, split, f"{name}K={num}") for num in nums}
            for num in nums:
                mean, half, values = means[num]
                axis.plot([num * beside] * len(values), values, "_", color=color, alpha=0.6)
                axis.errorbar(num * beside, mean, yerr=half, fmt="o", color=color, markersize=4, capsize=2)
            label = "directions of its own for each client" if name else "shared directions"
            axis.plot(
                [num * beside for num in nums], [means[num][0] for num in nums], color=color, linewidth=1, label=label
            )
        axis.axhline(0, color="0.5", linewidth=0.8)
        axis.set_ylim(-0.11, 0.03)
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


def lined(head, rows):
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def accuracy():
    """Return the table of the study."""
    found = read("accuracy")
    head = ["", "even clients", "less backprop", "≥ 93 % from", "Dirichlet(0.3)", "less backprop", "up", "forwards"]
    lines = []
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
        lines.append([arm, *cells, f"{run['bytes_up']:,} B", f"{run['forward_passes']:,.0f}"])
    return lined(head, lines)


def fashion():
    """Return the table of Fashion-MNIST."""
    runs = read("fashion")["runs"]
    rows = []
    kinds = sorted(
        {(run["rounds"][-1], run["arm"]) for run in runs}, key=lambda kind: (kind[1][0], kind[0], len(kind[1]), kind)
    )
    for rounds, arm in kinds:
        own = [run for run in runs if (run["rounds"][-1], run["arm"]) == (rounds, arm)]
        one = own[0]
        tests = ", ".join(f"{run['test_acc']:.3f}" for run in own)
        sent = one["bytes_up"] * rounds
        curve = ", ".join(f"{acc:.2f}" for acc in one["val_acc"])
        rows.append(
            [
                *(arm, rounds, curve, tests, f"{one['bytes_up']:,} B", f"{sent / 1e3:,.0f} kB"),
                *(f"{one['forward_passes']:,.0f}", f"{one['cpu_seconds']:,.0f} s"),
            ]
        )
    head = ["", "rounds", "validation, at equal steps", "test", "up in a round", "up in all", "forwards", "CPU time"]
    return lined(head, rows)


def wire():
    """Return the table of bytes on the wire."""
    rows = []
    for row in read("cost")["wire"]["rows"]:
        num, parameters = row["numbers"], row["parameters"]
        payload = 4 * parameters if num is None else 8 * num
        kind = "FedAvg by backprop" if num is None else f"BAFFLE, K={num}"
        rows.append([kind, f"{parameters:,}"] + [f"{n:,} B" for n in (row["up"], row["up"] - payload, row["down"])])
    return lined(["", "trained parameters", "pushed", "less the numbers", "pulled"], rows)


KINDS = ("BAFFLE", "BAFFLE, copy", "checkpointed backprop", "backprop")


def memory():
    """Return the table of peak memory."""
    rows = [
        [row["depth"], *(f"{row[name] / 2**20:.2f} MiB" for name in ("parameters", "inference", *KINDS))]
        for row in read("cost")["memory"]
    ]
    return lined(["layers", "parameters", "inference", *KINDS], rows)


def ratios():
    """Return the table of peak memory over that of inference, parameters included in both."""
    rows = read("cost")["memory"]
    names = {"BAFFLE": "default", "BAFFLE, copy": '`perturb="copy"`'}
    cells = [
        [names.get(kind, kind)]
        + [f"{(row[kind] + row['parameters']) / (row['inference'] + row['parameters']):.2f}" for row in rows]
        for kind in KINDS
    ]
    return lined(["layers", *(row["depth"] for row in rows)], cells)


def generators():
    """Return the table of the portable generator's time."""
    rows = {}
    for row in read("cost")["generators"]:
        cells = [f"{row[f'{way}, ratio']:.1f}" for way in ("together", "one by one")]
        rows.setdefault((row["numbers"], row["directions"]), []).extend(cells)
    head = ["numbers in a direction", "directions", "normal, at once", "one by one", "signs, at once", "one by one"]
    return lined(head, [[f"{numbers:,}", num, *cells] for (numbers, num), cells in rows.items()])


TABLES = {own.__name__: own for own in (accuracy, fashion, wire, memory, ratios, generators)}


def read(name):
    """Return what a file of results says."""
    return json.loads((HERE / f"results/baffle_{name}.json").read_text(encoding="utf-8"))


def written(text):
    """Return a page with its tables."""
    return PART.sub(lambda part: f"{part[1]}\n{TABLES[part['name']]()}\n\n{part[3]}", text)


def main(arguments=None):
    """Bring tables and figures up to date, or with ``--check`` return 1 if a table is not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is out of date")
    check = parser.parse_args(arguments).check
    stale = 0
    for page in (HERE / "methods/baffle.md", HERE / "studies/baffle.md"):
        text = page.read_text(encoding="utf-8")
        new = written(text)
        if new != text:
            stale += 1
            sys.stdout.write(f"{'out of date' if check else 'written'}: {page.relative_to(HERE.parent)}\n")
        if not check:
            page.write_text(new, encoding="utf-8")
    if not check:
        found = read("accuracy")
        figures = {
            "curves": curves(found, "iid"),
            "curves_dirichlet": curves(found, "dirichlet"),
            "directions": directions(found),
        }
        for name, figure in figures.items():
            figure.savefig(HERE / f"img/baffle_{name}.png", dpi=110)
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
