"""Results of a comparison: statistics over seeds, table and files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_bpfree.cli.common.drawing import colors, interval
from lightning_bpfree.cli.common.records import write_csv, write_json
from lightning_bpfree.cli.common.tables import console, counted, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    "epochs": "the same epochs for every rule",
    "forwards": "the same forward passes for every rule, as many as backprop used",
}
# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


class Row(NamedTuple):
    """One rule under one budget.

    Args:
        label: name of the rule's overlay.
        mean: mean of the metric over seeds; None if no run has a result.
        ci95: half width of the 95 % confidence interval of the mean; None for fewer than two seeds.
        gap: the mean minus backprop's.
        forward_evals: mean over seeds of the forward passes used.
        seconds: mean over seeds of the time of training.
        peak_memory_mib: peak memory of a few training steps.
        mean_cosine: mean over seeds of the cosine to backprop's gradient.
        error: the error, if there was one.
    """

    label: str
    mean: float | None
    ci95: float | None
    gap: float | None
    forward_evals: float | None
    seconds: float | None
    peak_memory_mib: float | None
    mean_cosine: float | None
    error: str | None


def t95(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution.

    Examples:
        >>> t95(2), round(t95(40), 3)
        (4.303, 2.021)
    """
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z = 1.959964  # of the normal distribution, corrected by Fisher's expansion in 1 / degrees
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


def confidence(values: Sequence[float]) -> float | None:
    """Return the half width of the 95 % confidence interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    return t95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def rows(comparison: dict[str, Any], budget: str) -> list[Row]:
    """Return a row per rule, in the order of the comparison."""
    found = [_row(rule, budget, comparison["metric"]) for rule in comparison["rules"]]
    is_backprop = [rule.get("rule") == "Backprop" for rule in comparison["rules"]]
    base = next((row.mean for row, backprop in zip(found, is_backprop, strict=True) if backprop), None)
    if base is None:
        return found
    return [row if row.mean is None else row._replace(gap=row.mean - base) for row in found]


def _row(rule: dict[str, Any], budget: str, metric: str) -> Row:
    runs = [run for run in rule["runs"] if run["budget"] == budget]
    good = [run for run in runs if run["error"] is None]
    values = [run["metrics"][metric] for run in good]
    errors = [f"seed {run['seed']}: {run['error']}" for run in runs if run["error"] is not None]

    def mean(key: str) -> float | None:
        known = [run[key] for run in good if run[key] is not None]
        return statistics.fmean(known) if known else None

    return Row(
        label=rule["label"],
        mean=statistics.fmean(values) if values else None,
        ci95=confidence(values),
        gap=None,
        forward_evals=mean("forward_evals"),
        seconds=mean("seconds"),
        peak_memory_mib=rule.get("peak_memory_mib"),
        mean_cosine=mean("mean_cosine"),
        error=rule["error"] or (errors[0] if errors else None),
    )


def show(comparison: dict[str, Any]) -> None:
    """Print a table for each budget, and the errors below."""
    from rich.table import Table

    screen = console()
    for budget in comparison["budgets"]:
        found = rows(comparison, budget)
        caption = f"mean ± 95 % confidence interval over {counted(len(comparison['seeds']), 'seed')}. Peak MiB: growth "
        caption += "in a few steps; on a CPU, differences below 30 are not significant."
        if any(row.mean_cosine is not None for row in found):
            caption += " The seconds include the measurements of GradientAlignment."
        table = Table(title=f"bpfree compare: {TITLES[budget]}", caption=caption)
        table.add_column("rule")
        for name in (comparison["metric"], "gap to backprop", "forwards", "seconds", "peak MiB", "cosine"):
            table.add_column(name, justify="right")
        for row in found:
            table.add_row(*_cells(row))
        screen.print(table)


def _cells(row: Row) -> list[str]:
    from rich.markup import escape

    result = "failed" if row.mean is None else f"{row.mean:.4f}" + ("" if row.ci95 is None else f" ± {row.ci95:.4f}")
    if row.error is not None:
        result += f"\n[red]{escape(row.error.splitlines()[0])}[/red]"
    return [
        row.label,
        result,
        "-" if row.gap is None else f"{row.gap:+.4f}",
        number(row.forward_evals),
        number(row.seconds),
        number(row.peak_memory_mib),
        number(row.mean_cosine),
    ]


def summary(comparison: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each budget, as in comparison.json."""
    return {budget: [row._asdict() for row in rows(comparison, budget)] for budget in comparison["budgets"]}


def write(comparison: dict[str, Any], folder: Path) -> None:
    """Write comparison.json, with a summary, and comparison.csv, with a line per run, atomically."""
    write_json({**comparison, "summary": summary(comparison)}, folder / "comparison.json")
    write_csv(csv_fields(comparison["metric"]), run_lines(comparison["rules"]), folder / "comparison.csv")


def run_lines(rules: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a line of comparison.csv for each run."""
    for rule in rules:
        for run in rule["runs"]:
            own = {"rule": rule["label"], "peak_memory_mib": rule.get("peak_memory_mib")}
            yield {**run.get("metrics", {}), **run, **own}


def csv_fields(metric: str) -> list[str]:
    """Return the columns of comparison.csv."""
    fields = ["budget", "rule", "seed", metric, "steps", "forward_evals", "seconds", "peak_memory_mib"]
    return [*fields, "mean_cosine", "reused", "error"]


def plot(comparison: dict[str, Any], path: Path) -> None:
    """Draw :func:`figure`."""
    figure(comparison).savefig(path)


def figure(comparison: dict[str, Any]) -> Figure:
    """Return a panel for each budget: the mean of each rule with its 95 % interval, and a thin mark for each seed.

    Args:
        comparison: the contents of comparison.json, with or without the summary.
    """
    from matplotlib.figure import Figure

    budgets = comparison.get("budgets", list(comparison.get("summary", ())))
    labels = [rule["label"] for rule in comparison["rules"]]
    height = 1.1 + 0.34 * len(labels)
    drawing = Figure(figsize=(5.6, height * len(budgets) + 0.4), layout="constrained", dpi=130)
    panels: Any = drawing.subplots(len(budgets), 1, squeeze=False, sharex=True)[:, 0]
    for axes, budget in zip(panels, budgets, strict=True):
        found = comparison["summary"][budget] if "summary" in comparison else summary(comparison)[budget]
        for place, (row, color) in enumerate(zip(found, colors(labels).values(), strict=True)):
            _mark(axes, place, row, color, _values(comparison, place, budget))
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(axis="x", color="0.9")
        axes.set_title(TITLES.get(budget, budget).replace(", as many", ",\nas many"), fontsize=11)
    seeds = counted(len(comparison["seeds"]), "seed")
    panels[-1].set_xlabel(f"{comparison['metric']}: mean and 95 % bootstrap interval;\nthin marks: {seeds}")
    return drawing


def _values(comparison: dict[str, Any], place: int, budget: str) -> list[float]:
    runs = comparison["rules"][place].get("runs", ())
    good = [run for run in runs if run["budget"] == budget and run["error"] is None]
    return [run["metrics"][comparison["metric"]] for run in good]


def _mark(axes: Axes, place: int, row: dict[str, Any], color: str, values: Sequence[float]) -> None:
    """Draw one rule."""
    mean = row["mean"]
    if mean is None:
        axes.annotate("failed", (0.02, place), xycoords=("axes fraction", "data"), va="center", color="tab:red")
        return
    ends = interval(values) or (mean - (row["ci95"] or 0), mean + (row["ci95"] or 0))
    reach = [[max(0.0, mean - float(ends[0]))], [max(0.0, float(ends[1]) - mean)]]
    axes.plot(values, [place] * len(values), "|", color=color, markersize=13, alpha=0.55)
    axes.errorbar(mean, place, xerr=reach, fmt="o", capsize=4, color=color)
    above: dict[str, Any] = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "fontsize": 8}
    axes.annotate(f"{mean:#.3g}".rstrip("."), (mean, place), **above)
