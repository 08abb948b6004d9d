"""Write the figures and tables of gradients through diffusion samplers from docs/results; ``--check`` only looks.

    python docs/diffusion_figures.py [--images runs/images]

Figures come from ``diffusion_benchmarks.json`` and ``adjoint_dpm.json``; ``--images`` is the folder of images that the
study wrote, for the figure of samples, which is left alone without. Tables of ``adjoint_dpm.json`` stand between
``<!-- adjoint_dpm:NAME -->`` and ``<!-- /adjoint_dpm -->``; NAME is ``outcomes``, ``paired``, ``gradients``,
``bias`` or ``rates``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))  # this file is run as a script and loaded by path: its neighbor is found either way

from paired import difference  # noqa: E402

from lightning_bpfree.cli.common.drawing import colors  # noqa: E402

RESULTS, IMAGES = DOCS / "results", DOCS / "img"
PART = re.compile(r"(<!-- adjoint_dpm:(?P<name>\w+) -->\n).*?(<!-- /adjoint_dpm -->)", re.DOTALL)
GRADIENTS = ("autograd", "exact_adjoint", "adjoint", "torchdiffeq", "checkpoint", "truncated", "evolution_strategy")
COLORS = colors(GRADIENTS)
COLORS["direct"] = COLORS["autograd"]  # elsewhere, "direct" is a rule with feedback
WIDTHS = {"exact_adjoint": 6, "adjoint": 3.5, "checkpoint": 1.2}
TASKS = {
    "noise": "initial noise",
    "noise_30": "initial noise, 30 steps",
    "embedding": "conditioning embedding",
    "weights": "LoRA weights",
}
PANELS = {**TASKS, "printed": "LoRA, a reward without a derivative"}
UNITS = {
    "noise": "margin of the wrong class",
    "noise_30": "margin of the wrong class",
    "embedding": "minus squared error",
    "weights": "minus squared distance, px²",
}


BIAS_BY = {"noise": "noise", "conditioning": "embedding", "weights": "weights"}  # of the study's tasks


def loaded(*names):
    """Return the contents of files, None for those that do not exist, and a hash of all."""
    paths = [RESULTS / f"{name}.json" for name in names]
    texts = [path.read_bytes() if path.exists() else None for path in paths]
    digest = hashlib.sha256(b"".join(text or b"" for text in texts)).hexdigest()
    return [text and json.loads(text) for text in texts], digest


def points(found, quantity):
    """Return by gradient the pairs of steps and value of rows named ``QUANTITY, GRADIENT, N steps``."""
    made = {}
    for row in found["rows"]:
        match = re.fullmatch(rf"{quantity}, (\w+), (\d+) steps", row["name"])
        if match:
            made.setdefault(match[1], []).append((int(match[2]), row["value"]))
    return made


def over_steps(found):
    """Memory and time against steps, a line for each gradient."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9.4, 3.8), layout="constrained", dpi=150)
    left, right = drawing.subplots(1, 2)
    for axes, quantity, label in ((left, "memory", "MiB alive at most"), (right, "time", "time over direct")):
        for kind, line in points(found, quantity).items():
            style = "--" if kind == "torchdiffeq" else "-"
            width = WIDTHS.get(kind, 1.5)  # lines that coincide are all seen
            drawn = {"marker": "o", "markersize": 3, "color": COLORS[kind], "linewidth": width}
            axes.plot(*zip(*line, strict=True), style, label=kind, **drawn)
        axes.set(xlabel="steps of the sampler", ylabel=label, xscale="log")
        axes.set_xticks([5, 20, 50, 100], ["5", "20", "50", "100"])
        axes.minorticks_off()
        axes.grid(color="0.9")
    left.set_yscale("log")
    right.axhline(1.4, color="0.6", linewidth=0.8, linestyle=":")
    right.set_ylim(bottom=0)
    left.legend(fontsize=8)
    return drawing


def bias(found, study):
    """The continuous adjoint's distance from the gradient of the solver, against steps."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9.4, 3.2), layout="constrained", dpi=150)
    lines = {}
    for row in found["rows"]:
        match = re.fullmatch(r"bias of adjoint, (\w+), (\d+) steps, by (\w+)", row["name"])
        if match:
            lines.setdefault(match[3], {}).setdefault(match[1], []).append((int(match[2]), row["value"]))
    for axes, (by, solvers) in zip(drawing.subplots(1, len(lines), sharey=True), lines.items(), strict=True):
        for solver, line in solvers.items():
            axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label=solver)
        trained = [(row["steps"], row["error"]) for row in study["bias"] if row["task"] == BIAS_BY[by]]
        axes.plot(*zip(*trained, strict=True), "--", marker="s", markersize=3, color="0.3", label="euler, digits")
        axes.set(xscale="log", yscale="log", xlabel="steps of the sampler", title=f"by {by}")
        axes.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
        axes.minorticks_off()
        axes.grid(color="0.9")
    drawing.axes[0].set_ylabel("relative error of adjoint")
    drawing.legend(*drawing.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return drawing


def rewards(found):
    """The reward of every training step: each seed a thin line, their mean a thick one."""
    from matplotlib.figure import Figure

    panels = {task: [run for run in found["runs"] if (run["task"], printed(run)) == (task, False)] for task in TASKS}
    panels["printed"] = [run for run in found["runs"] if printed(run)]
    panels = {name: runs for name, runs in panels.items() if runs}
    drawing = Figure(figsize=(7.6, 4.8), layout="constrained", dpi=150)
    places, legend = drawing.subplots(-(-len(panels) // 2), 2).flatten(), {}
    for axes in places:
        axes.set_axis_off()
    for axes, (name, of) in zip(places, panels.items(), strict=False):
        axes.set_axis_on()
        for gradient in dict.fromkeys(run["gradient"] for run in of):
            curves = [smooth(run["rewards"]) for run in of if run["gradient"] == gradient]
            for curve in curves:
                axes.plot(curve, color=COLORS[gradient], linewidth=0.7, alpha=0.5)
            mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
            (legend[gradient],) = axes.plot(mean, color=COLORS[gradient], linewidth=2.2)
        axes.set(xlabel="training step", ylabel=UNITS[of[0]["task"]])
        axes.set_title(PANELS[name], fontsize=10)
        axes.grid(color="0.9")
    drawing.legend(legend.values(), legend, loc="outside lower center", ncols=len(legend), fontsize=10)
    return drawing


def printed(run):
    """Return whether a run raised the reward without a derivative."""
    return run["gradient"] == "evolution_strategy"


def smooth(values, width=5):
    """Return means over the last few steps, as each step has other noise."""
    return [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def samples(folder):
    """Samples before and after, of the same noise: a row for each task."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    drawing = Figure(figsize=(12.6, 7.0), layout="constrained", dpi=130)
    for row, (task, shown) in zip(drawing.subplots(len(SAMPLES), 5), SAMPLES.items(), strict=True):
        for axes, name in zip(row, shown, strict=True):
            axes.set_axis_off()
            path = folder / f"adjoint_dpm_{name}.png"
            if path.exists():
                axes.imshow(imread(path), cmap="gray", interpolation="nearest")
                axes.set_title(f"{TASKS[task]}:\n{titled(name, task)}", fontsize=10)
    return drawing


SAMPLES = {
    "noise": (
        "noise_exact_adjoint_before",
        "noise_exact_adjoint_after",
        "noise_adjoint_after",
        "noise_30_exact_adjoint_after",
        "noise_30_adjoint_after",
    ),
    "embedding": (
        "embedding_exact_adjoint_before",
        "embedding_exact_adjoint_after",
        "embedding_adjoint_after",
        "embedding_truncated_after",
        "embedding_reference",
    ),
    "weights": (
        "weights_exact_adjoint_before",
        "weights_exact_adjoint_after",
        "weights_adjoint_after",
        "weights_truncated_after",
        "weights_evolution_strategy_after",
    ),
}


def titled(name, task):
    """Return what an image of samples shows: before training, or the gradient after it."""
    rest = name.removeprefix(f"{task}_")
    steps = re.match(r"(\d+)_", rest)
    rest = rest[steps.end() :] if steps else rest
    text = "before" if rest.endswith("_before") else rest.removesuffix("_after")
    text = "reference image" if text == "reference" else text
    return f"{text}, {steps[1]} steps" if steps else text


def outcomes(found):
    """The table of metrics before and after."""
    lines = ["| application | gradient | seeds | metric | before | after |", "| --- | --- | ---: | --- | ---: | ---: |"]
    cells = {(r["task"], r["gradient"], r["metric"], r["when"]): r for r in found["summary"]}
    for task, gradient, metric, when in sorted(cells, key=lambda cell: list(TASKS).index(cell[0])):
        if when == "before":
            before, after = (shown(cells[task, gradient, metric, one]) for one in ("before", "after"))
            seeds = sum((run["task"], run["gradient"]) == (task, gradient) for run in found["runs"])
            lines.append(f"| {TASKS[task]} | `{gradient}` | {seeds} | {metric} | {before} | {after} |")
    return "\n".join([*lines, "", provenance(found)])


def shown(row):
    return f"{row['mean']:.4f}" + ("" if row["ci95"] is None else f" ± {row['ci95']:.4f}")


def paired(found):
    """The table of the exact gradient against the others: rewards after training, paired by seed, and time."""
    lines = ["| application | against | seeds | reward of `exact_adjoint` minus its | training time, exact over it |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    runs = {}
    for run in found["runs"]:
        if not printed(run):  # it raises another reward
            runs.setdefault((run["task"], run["gradient"]), {})[run["seed"]] = run
    for task, gradient in sorted(runs, key=lambda pair: list(TASKS).index(pair[0])):
        exact, other = runs.get((task, "exact_adjoint"), {}), runs[task, gradient]
        seeds = [seed for seed in other if seed in exact]
        if gradient == "exact_adjoint" or not seeds:
            continue
        gap = difference(*({seed: of[seed]["after"]["test_reward"] for seed in seeds} for of in (exact, other)))
        times = statistics.median(exact[seed]["seconds"] / other[seed]["seconds"] for seed in seeds)
        lines.append(f"| {TASKS[task]} | `{gradient}` | {len(seeds)} | {gap} | {times:.2f} |")
    return "\n".join([*lines, "", provenance(found)])


def gradient_table(found):
    """The table of gradients at the first step."""
    head = "| application | gradient | cosine to exact | relative error | time over direct | peak MiB |"
    lines = [head, "| --- | --- | ---: | ---: | ---: | ---: |"]
    for row in found["rules"]:
        numbers = f"{row['cosine']:.4f} | {row['error']:.2g} | {row['time']:.2f} | {row['peak_mib']:.0f}"
        lines.append(f"| {TASKS[row['task']]} | `{row['gradient']}` | {numbers} |")
    return "\n".join([*lines, "", provenance(found)])


def provenance(found):
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"`{found['command']}`, {found['date'][:10]}, {found['device']}; {versions}."


def bias_table(found):
    """The table of the adjoint's gradient against the exact one, over steps."""
    steps = sorted({row["steps"] for row in found["bias"]})
    cells = {(row["task"], row["steps"]): row for row in found["bias"]}
    lines = ["| application | " + " | ".join(f"{n} steps" for n in steps) + " |", "| --- |" + " ---: |" * len(steps)]
    for task in dict.fromkeys(row["task"] for row in found["bias"]):
        rows = [cells.get((task, n)) for n in steps]
        numbers = ["–" if row is None else f"{row['cosine']:.3f} ({row['error']:.2f})" for row in rows]
        lines.append(f"| {TASKS[task]} | {' | '.join(numbers)} |")
    return "\n".join([*lines, "", provenance(found)])


def rates(found):
    """The table of the learning rates that were tried."""
    if not found["tuning"]:
        return "Not measured yet."
    lines = ["| application | gradient | learning rate: objective | chosen |", "| --- | --- | --- | ---: |"]
    pairs = dict.fromkeys((row["task"], row["gradient"]) for row in found["tuning"])
    for task, gradient in sorted(pairs, key=lambda pair: list(TASKS).index(pair[0])):
        tried = {}
        for row in found["tuning"]:
            if (row["task"], row["gradient"]) == (task, gradient):
                tried.setdefault(row["lr"], []).append(row["objective"])
        means = {rate: statistics.mean(tried[rate]) for rate in sorted(tried)}
        text = ", ".join(f"{rate:.2g}: {mean:.4f}" for rate, mean in means.items())
        lines.append(f"| {TASKS[task]} | `{gradient}` | {text} | {max(means, key=means.get):.2g} |")
    return "\n".join([*lines, "", provenance(found)])


TABLES = {"outcomes": outcomes, "paired": paired, "gradients": gradient_table, "bias": bias_table, "rates": rates}
FIGURES = {
    "diffusion_steps": (("diffusion_benchmarks",), over_steps),
    "diffusion_bias": (("diffusion_benchmarks", "adjoint_dpm"), bias),
    "adjoint_dpm_rewards": (("adjoint_dpm",), rewards),
}


def main(arguments=None):
    """Bring tables and figures up to date, or with ``--check`` return 1 if they are not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is out of date")
    parser.add_argument("--images", type=Path, help="folder of the study's images")
    chosen, stale = parser.parse_args(arguments), []
    for name, (sources, draw) in FIGURES.items():
        found, digest = loaded(*sources)
        path = IMAGES / f"{name}.png"
        if all(found) and (not path.exists() or digest.encode() not in path.read_bytes()):
            stale.append(path)
            if not chosen.check:
                draw(*found).savefig(path, metadata={"Source": digest, "Software": None})
    (found,), _ = loaded("adjoint_dpm")
    for page in sorted(DOCS.rglob("*.md")) if found is not None else ():
        old = page.read_text(encoding="utf-8")
        new = PART.sub(lambda part: f"{part[1]}\n{TABLES[part['name']](found)}\n\n{part[3]}", old)
        if new != old:
            stale.append(page)
            if not chosen.check:
                page.write_text(new, encoding="utf-8")
    if chosen.images is not None and not chosen.check:
        samples(chosen.images).savefig(IMAGES / "adjoint_dpm_samples.png", metadata={"Software": None})
    for path in stale:
        print(f"{'out of date' if chosen.check else 'written'}: {path.relative_to(DOCS.parent)}")
    return int(chosen.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
