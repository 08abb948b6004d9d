"""Learning curves of a comparison: files and tables with the values they reach, and their figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bpfree.cli.common.drawing import colors, interval
from lightning_bpfree.cli.common.records import write_csv, write_json
from lightning_bpfree.cli.common.tables import console, counted
from lightning_bpfree.cli.compare import results as compare_results
from lightning_bpfree.cli.compare.results import TITLES, confidence, csv_fields, run_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = list[list[Any]]  # [batches, value] of each validation; the value is None where it is not finite
STYLES: Any = ("-", "--", "-.", (0, (1, 1)), (0, (6, 1.5, 1, 1.5, 1, 1.5)))
FEW = 30  # points of a line, up to which each is marked


def curves(rule: dict[str, Any], budget: str) -> list[Curve]:
    """Return the curve of each seed whose run did not fail and was validated."""
    good = [run for run in rule["runs"] if run["budget"] == budget and run["error"] is None]
    return [run["curve"] for run in good if run["curve"]]


def first_reached(curve: Curve, value: float, larger_is_better: bool) -> int | None:
    """Return the batches at the first validation that was as good as ``value``; None if none was.

    Examples:
        >>> first_reached([[4, 0.5], [8, None], [12, 0.9], [16, 0.7]], 0.7, larger_is_better=True)
        12
    """
    sign = 1 if larger_is_better else -1
    return next((batches for batches, found in curve if found is not None and sign * (found - value) >= 0), None)


def summary(comparison: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each budget, each with its number of curves and when they reached each value."""
    asked = comparison["curve"]
    found = compare_results.summary(comparison)
    for budget, rows in found.items():
        for row, rule in zip(rows, comparison["rules"], strict=True):
            known = curves(rule, budget)
            row["curves"], row["reach"] = len(known), []
            for value in asked["reach"]:
                firsts = [first_reached(curve, value, asked["larger_is_better"]) for curve in known]
                row["reach"].append({"value": value, **_reached(firsts, len(comparison["seeds"]))})
    return found


def _reached(firsts: Sequence[int | None], seeds: int) -> dict[str, Any]:
    """Return in how many seeds a value was reached, and the mean batches over these with its 95 % interval."""
    batches = [first for first in firsts if first is not None]
    mean = statistics.fmean(batches) if batches else None
    return {"reached": len(batches), "seeds": seeds, "batches": mean, "ci95": confidence(batches)}


def _with_summary(comparison: dict[str, Any]) -> dict[str, Any]:
    return {**comparison, "summary": summary(comparison)}


def write(comparison: dict[str, Any], folder: Path) -> None:
    """Write comparison.json, with a summary, and comparison.csv, with a line per run, atomically."""
    write_json(_with_summary(comparison), folder / "comparison.json")
    write_csv(csv_fields(comparison["metric"]), run_lines(comparison["rules"]), folder / "comparison.csv")


def reach_table(found: dict[str, Any], budget: str) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a budget's table, with one row per rule and one column per target value.

    Args:
        found: the contents of comparison.json.
        budget: one of its budgets.
    """
    asked = found["curve"]
    sign = ">=" if asked["larger_is_better"] else "<="
    heads = [f"batches until {asked['metric']} {sign} {value:g}" for value in asked["reach"]]
    rows = [[row["label"], *(_text(row, entry) for entry in row["reach"])] for row in found["summary"][budget]]
    return ["rule", *heads], rows


def _text(row: dict[str, Any], entry: dict[str, Any]) -> str:
    if not row["curves"]:
        return "failed" if row["mean"] is None else "never validated"
    seeds = f"({entry['reached']} of {entry['seeds']})"  # always: a mean over those that succeed flatters
    if entry["batches"] is None:
        return f"not reached {seeds}"
    spread = "" if entry["ci95"] is None else f" ± {entry['ci95']:,.0f}"
    return f"{entry['batches']:,.0f}{spread} {seeds}"


def show(comparison: dict[str, Any]) -> None:
    """Print the tables of the comparison, and one table per budget of the values that the curves reach."""
    from rich.table import Table

    compare_results.show(comparison)
    if not comparison["curve"]["reach"]:
        return
    caption = "batches until a validation first reached the value; mean ± 95 % confidence interval of these seeds"
    found = _with_summary(comparison)
    for budget in comparison["budgets"]:
        heads, rows = reach_table(found, budget)
        table = Table(title=f"bpfree compare: {TITLES[budget]}", caption=caption)
        for head in heads:
            table.add_column(head, justify="left" if head == "rule" else "right")
        for row in rows:
            table.add_row(*row)
        console().print(table)


def plot(comparison: dict[str, Any], path: Path) -> None:
    """Draw the figure of the comparison, and the figure of its curves, whose name ends with ``_curves``."""
    compare_results.plot(comparison, path)
    figure(comparison).savefig(path.with_stem(f"{path.stem}_curves"))


def figure(found: dict[str, Any]) -> Figure:
    """Return a panel for each budget: the mean curve of each rule, its 95 % interval, and a thin curve per seed.

    Args:
        found: the contents of comparison.json.
    """
    from matplotlib.figure import Figure

    asked, budgets, seeds = found["curve"], found["budgets"], len(found["seeds"])
    color = colors([rule["label"] for rule in found["rules"]])
    legend = 0.24 * -(-len(color) // 2)
    drawing = Figure(figsize=(5.6, (3.9 + legend) * len(budgets)), layout="constrained", dpi=130)
    panels: Any = drawing.subplots(len(budgets), 1, squeeze=False)[:, 0]
    for axes, budget in zip(panels, budgets, strict=True):
        for index, rule in enumerate(found["rules"]):
            _line(axes, index, (rule["label"], color[rule["label"]]), curves(rule, budget), seeds)
        for value in asked["reach"]:
            axes.axhline(value, color="0.4", linestyle=":", linewidth=1)
        axes.set(ylabel=asked["metric"], xlabel="training batches")
        axes.set_title(TITLES.get(budget, budget), fontsize=11)
        axes.grid(axis="y", color="0.92")
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.17), frameon=False, fontsize=10, ncols=2)
    drawing.supxlabel(f"mean, 95 % bootstrap interval; thin: each of {counted(seeds, 'seed')}", fontsize=10)
    return drawing


def mean_curve(known: Sequence[Curve]) -> list[tuple[int, float, float, float]]:
    """Return batches, mean, and the ends of its 95 % bootstrap interval, where all curves have a value.

    Examples:
        >>> mean_curve([[[4, 1.0], [8, 2.0]], [[4, 1.0], [8, None]]])
        [(4, 1.0, 1.0, 1.0)]
    """
    values = [{batches: value for batches, value in curve if value is not None} for curve in known]
    shared = sorted(set.intersection(*map(set, values))) if values else []
    rows = [[each[batches] for batches in shared] for each in values]
    means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    low, high = interval(rows) or (means, means)
    return list(zip(shared, means, map(float, low), map(float, high), strict=True))


def _line(axes: Axes, index: int, named: tuple[str, str], known: Sequence[Curve], seeds: int) -> None:
    """Draw one rule, and say if not all seeds are in its mean."""
    from matplotlib.collections import LineCollection

    label, color = named
    points = mean_curve(known)
    if len(known) < seeds:
        label += f" ({len(known)} of {seeds} seeds)"
    style, marker = STYLES[index % len(STYLES)], "." if len(points) <= FEW else ""
    batches, means = [point[0] for point in points], [point[1] for point in points]
    axes.plot(batches, means, color=color, linestyle=style, marker=marker, linewidth=1.8, label=label)
    if len(known) > 1:
        low, high = ([point[end] for point in points] for end in (2, 3))
        axes.fill_between(batches, low, high, color=color, alpha=0.12, linewidth=0)
        thin: Any = [[pair for pair in curve if pair[1] is not None] for curve in known]
        axes.add_collection(LineCollection(thin, colors=color, linewidths=0.5, alpha=0.6))
