"""Write the figures and tables of learned architectures from docs/results; ``--check`` only looks.

    python docs/dnarch_figures.py

Sources are ``dnarch_accuracy.json``, ``dnarch_benchmarks.json`` and ``dnarch_toys.json``. Tables stand between
``<!-- dnarch:NAME -->`` and ``<!-- /dnarch -->``; NAME is ``smaller``, ``ablation``, ``budgets``, ``seeds``,
``times``, ``toys`` or ``decides``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import statistics
import sys
from pathlib import Path

DOCS = Path(__file__).parent
RESULTS, IMAGES = DOCS / "results", DOCS / "img"
PART = re.compile(r"(<!-- dnarch:(?P<name>\w+) -->\n).*?(<!-- /dnarch -->)", re.DOTALL)
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


def draw(axis, rows, runs, keys, highest=1.0):
    """Draw seeds, means and intervals, which end where the scores do: at 0 and at ``highest``."""
    for place, key in enumerate(keys):
        values = scores(runs, **key)
        if not values:
            continue
        mean, half = interval(values)
        color = COLORS[key["arm"]]
        axis.plot(values, [place] * len(values), "|", color=color, alpha=0.5, markersize=9)
        reach = [[min(half, mean)], [min(half, highest - mean)]]
        axis.errorbar(mean, place, xerr=reach, fmt="o", color=color, markersize=5)
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
        highest = math.inf if "error" in TITLES[part] else 1.0
        draw(axis, [key["arm"] for key in keys], found[part]["runs"], keys, highest)
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
    left.set_yticks([0.8, 1, 1.5, 2, 3], ["0.8", "1", "1.5", "2", "3"])
    left.minorticks_off()
    left.legend(fontsize=8)
    shares = [[(run["history"][-1]["shares"]).get(name, math.nan) for run in arms] for name in names]
    mesh = right.pcolormesh(range(len(arms) + 1), range(len(names) + 1), shares, cmap="viridis", vmin=0, vmax=1)
    for row, name in enumerate(names):
        for column, run in enumerate(arms):
            if name in run["sizes"]:
                color = "k" if shares[row][column] > 0.6 else "w"  # on light and on dark
                at = {"ha": "center", "va": "center", "fontsize": 8, "color": color}
                right.text(column + 0.5, row + 0.5, run["sizes"][name], **at)
    right.set_xticks([c + 0.5 for c in range(len(arms))], [run["arm"] for run in arms], fontsize=8)
    labels = ["width/stream" if "stem.1 +" in name else name for name in names]
    right.set_yticks([r + 0.5 for r in range(len(names))], labels, fontsize=7)
    right.invert_yaxis()
    figure.colorbar(mesh, ax=right, label="size / largest size")
    left.tick_params(labelsize=8)
    return figure


PLANTED = {
    "one lag": "label: sign of one earlier sample",
    "rank": "linear map of some rank",
}
PULLS = {
    "strong pull": "C3",
    "weak pull": "C1",
    "weak pull, weights at a tenth": "C0",
    "weak pull, weights at a hundredth": "C2",
}


def toys(found):
    """Draw the sizes that were found over those that suffice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.9), layout="constrained")
    for axis, (task, title) in zip(figure.subplots(1, 2), PLANTED.items(), strict=True):
        runs = [run for run in found["runs"] if run["task"] == task]
        needed = sorted({run["suffices"] for run in runs})
        axis.plot(needed, needed, color="0.6", linewidth=0.8)
        for place, (arm, color) in enumerate(PULLS.items()):
            own = [run for run in runs if run["arm"] == arm]
            shift = 0.02 * (place - 1.5) * needed[-1]
            at = {"color": color, "markersize": 4, "linestyle": "none"}
            for marker, works in (("o", True), ("x", False)):
                points = [run for run in own if (run["score"] > 0.9) == works]
                at["label"] = arm if works else None
                axis.plot([run["suffices"] + shift for run in points], [run["size"] for run in points], marker, **at)
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("units that suffice" if task == "rank" else "taps that suffice", fontsize=8)
        axis.set_xticks(needed)
        axis.tick_params(labelsize=8)
    figure.axes[0].set_ylabel("size found", fontsize=8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure


# --- tables ---


def table(head, rows):
    """Return a Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def cell(values):
    """Return mean and half width of the interval, or nothing where there are no values."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:.3f} ± {half:.3f}"


def provenance(found):
    """Return the versions and the date of a file."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['date'][:10]}; {versions}."


def smaller_table(found):
    """The accuracies of the residual network, by its share of multiply-accumulates."""
    runs = found["pruning"]["runs"]
    arms = ["uniform", "learned W", "learned W+D", "torch-pruning"]
    rows = [["100 %", cell(scores(runs, arm="reference")), "", "", ""]]
    rows += [[f"{s:.0%}".replace("%", " %"), *(cell(scores(runs, arm=a, share=s)) for a in arms)] for s in (0.5, 0.25)]
    head = ["multiply-accumulates", "uniform widths", "learned widths", "learned widths and depth", "torch-pruning"]
    return "\n".join([table(head, rows), "", provenance(found)])


def ablation_table(found):
    """The scores of more and more learned dimensions."""
    arms = ("K", "K+R", "K+R+W", "K+R+W+D", "reference")
    rows = [[arm, *(cell(scores(found[part]["runs"], arm=arm)) for part in TITLES)] for arm in arms]
    return "\n".join([table(["learned", *TITLES.values()], rows), "", provenance(found)])


def budgets_line(found):
    """How near the exported networks are to their budgets, over all runs."""
    runs = [run for part in ("pruning", *TITLES) for run in found[part]["runs"]]
    off = [abs(r["of_budget"] - 1) for r in runs if "of_budget" in r]
    off += [abs(r["of_reference"] / r["share"] - 1) for r in runs if r["arm"].startswith("learned")]
    errors = [run["export_error"] for run in runs if "export_error" in run]
    return (
        f"{len(off)} exported networks: at most {max(off):.2%} off the budget, counted by PyTorch; outputs at most "
        f"{max(errors):.1e} off those of the masked network."
    )


def spread(sizes):
    """Return how many of some sizes differ between seeds, and by how much of the largest at most."""
    own = [(max(values), min(values)) for values in sizes if max(values) != min(values)]
    return len(own), max(((high - low) / high for high, low in own), default=0.0)


def seeds_table(found):
    """For each run, in how many sizes the seeds differ, by kind of size."""
    rows = []
    for part, title in {"pruning": "residual network", **TITLES}.items():
        runs = [run for run in found[part]["runs"] if "sizes" in run]
        for arm, share in dict.fromkeys((run["arm"], run.get("share")) for run in runs):
            of = [run["sizes"] for run in runs if (run["arm"], run.get("share")) == (arm, share)]
            cells = []
            for kind in ("width", "depth", "kernel", "resolution"):
                names = [name for name in of[0] if name.startswith(kind)]
                differ, most = spread([[sizes[name] for sizes in of] for name in names])
                cells.append(f"{differ} of {len(names)}" + (f", up to {most:.0%}" if differ else "") if names else "")
            what = title.partition(":")[0] + (f", {share:.0%}" if share else "")
            rows.append([f"{what}: {arm}", *(cell.replace("%", " %") for cell in cells)])
    return "\n".join([table(["sizes that differ between seeds", "width", "depth", "kernel", "resolution"], rows), ""])


def decides_table(found):
    """How much the loss says about the sizes of the residual network, and what becomes of the accuracy without it."""
    as_is = [run for run in found["runs"] if run["arm"] == "as in the study"]
    usual = {(run["share"], run["dims"], run["seed"]): run["sizes"] for run in as_is}
    rows = []
    for share, dims, arm in dict.fromkeys((run["share"], run["dims"], run["arm"]) for run in found["runs"]):
        runs = [run for run in found["runs"] if (run["share"], run["dims"], run["arm"]) == (share, dims, arm)]
        others = [usual[share, dims, run["seed"]] for run in runs]
        moved = [
            sum(abs(run["sizes"][name] - own[name]) for name in own) for run, own in zip(runs, others, strict=True)
        ]
        counts = f"{min(moved)}" if min(moved) == max(moved) else f"{min(moved)} to {max(moved)}"
        ratio, reached = (statistics.fmean(run[key] for run in runs) for key in ("ratio", "reached"))
        score = "" if arm == "shuffled labels" else cell([run["score"] for run in runs])
        rows.append([f"{100 * share:g} %, {dims}: {arm}", f"{100 * ratio:.1f} %", f"{reached:.2f}", counts, score])
    head = ["search", "gradient of the loss / of the budget", "reached cost / budget", "units moved", "accuracy"]
    return "\n".join([table(head, rows), "", provenance(found)])


def times_table(found):
    """Step times over those of the plain network, by the share of multiply-accumulates."""
    shares = [row["share"] for row in next(iter(found["networks"].values()))["shares"]]
    rows = []
    for name, own in found["networks"].items():
        for kind in ("masked", "exported"):
            values = [
                f"{row[f'{kind}_over_plain']:.2f} ({row[f'{kind}_range'][0]:.2f}–{row[f'{kind}_range'][1]:.2f})"
                for row in own["shares"]
            ]
            rows.append([f"{name}, {kind}", *values])
    return table(["multiply-accumulates", *(f"{100 * share:g} %" for share in shares)], rows)


def toys_table(found):
    """The sizes found in each seed, and the mean score of the exported networks."""
    rows = []
    for task, what in PLANTED.items():
        for suffices in sorted({run["suffices"] for run in found["runs"] if run["task"] == task}):
            cells = []
            for arm in PULLS:
                own = [r for r in found["runs"] if (r["task"], r["suffices"], r["arm"]) == (task, suffices, arm)]
                sizes = ", ".join(str(run["size"]) for run in own)
                cells.append(f"{sizes} ({statistics.fmean(run['score'] for run in own):.2f})" if own else "")
            rows.append([what, suffices, *cells])
    return "\n".join([table(["planted", "suffices", *PULLS], rows), "", provenance(found)])


TABLES = {
    "smaller": ("dnarch_accuracy", smaller_table),
    "ablation": ("dnarch_accuracy", ablation_table),
    "budgets": ("dnarch_accuracy", budgets_line),
    "seeds": ("dnarch_accuracy", seeds_table),
    "times": ("dnarch_benchmarks", times_table),
    "toys": ("dnarch_toys", toys_table),
    "decides": ("dnarch_decides", decides_table),
}
FIGURES = {
    "dnarch_smaller": ("dnarch_accuracy", smaller),
    "dnarch_ablation": ("dnarch_accuracy", ablation),
    "dnarch_architectures": ("dnarch_accuracy", architectures),
    "dnarch_toys": ("dnarch_toys", toys),
}


def loaded(name):
    """Return the contents of a file, and a hash of them."""
    text = (RESULTS / f"{name}.json").read_bytes()
    return json.loads(text), hashlib.sha256(text).hexdigest()


def main(arguments=None):
    """Bring tables and figures up to date, or with ``--check`` return 1 if they are not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is out of date")
    check, stale = parser.parse_args(arguments).check, []
    for name, (source, draw_figure) in FIGURES.items():
        found, digest = loaded(source)
        path = IMAGES / f"{name}.png"
        if not path.exists() or digest.encode() not in path.read_bytes():
            stale.append(path)
            if not check:
                draw_figure(found).savefig(path, dpi=110, metadata={"Source": digest, "Software": None})
    for page in sorted(DOCS.rglob("*.md")):
        old = page.read_text(encoding="utf-8")
        new = PART.sub(lambda part: f"{part[1]}\n{made(part['name'])}\n\n{part[3]}", old)
        if new != old:
            stale.append(page)
            if not check:
                page.write_text(new, encoding="utf-8")
    for path in stale:
        print(f"{'out of date' if check else 'written'}: {path.relative_to(DOCS.parent)}")
    return int(check and bool(stale))


def made(name):
    """Return the table of a name."""
    source, make = TABLES[name]
    return make(loaded(source)[0]).strip()


if __name__ == "__main__":
    sys.exit(main())
