"""Results of a comparison for every value of a varied key: table, files and figure."""

from __future__ import annotations

import contextlib
import math
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

Cell = dict[str, Any]  # one rule under one condition: a row of compare_results with what it loses to the first


def cells(comparison: dict[str, Any], budget: str) -> list[Cell]:
    """Return one cell for each condition and rule, in the order of training.

    ``drop`` is the difference of the metric from the first condition (positive is worse), as the mean over the seeds
    that have a result under both; ``drop_ci95`` is the half width of its 95 % confidence interval, from the same pairs.
    """
    metric, sign = comparison["metric"], 1 if comparison["larger_is_better"] else -1
    found: list[Cell] = []
    for condition in comparison["conditions"]:
        part = {**comparison, "rules": condition["rules"]}
        rows = compare_results.rows(part, budget)
        firsts = comparison["conditions"][0]["rules"]
        for row, rule, first in zip(rows, condition["rules"], firsts, strict=False):
            here, there = _by_seed(rule, budget, metric), _by_seed(first, budget, metric)
            drops = [sign * (there[seed] - here[seed]) for seed in there if seed in here]
            mean = math.fsum(drops) / len(drops) if drops else None
            drop = {"drop": mean, "drop_ci95": confidence(drops)}
            found.append({"condition": condition["value"], **row._asdict(), **drop})
    return found


def _by_seed(rule: dict[str, Any], budget: str, metric: str) -> dict[int, float]:
    good = [run for run in rule["runs"] if run["budget"] == budget and run["error"] is None]
    return {run["seed"]: run["metrics"][metric] for run in good}


def _with_summary(comparison: dict[str, Any]) -> dict[str, Any]:
    return {**comparison, "summary": {budget: cells(comparison, budget) for budget in comparison["budgets"]}}


def write(comparison: dict[str, Any], folder: Path) -> None:
    """Write comparison.json, with a summary, and comparison.csv, with a line per run, atomically."""
    write_json(_with_summary(comparison), folder / "comparison.json")
    lines = (
        {**line, "condition": condition["value"]}
        for condition in comparison["conditions"]
        for line in run_lines(condition["rules"])
    )
    write_csv(["condition", *csv_fields(comparison["metric"])], lines, folder / "comparison.csv")


def by_rule(found: Sequence[Cell]) -> dict[str, dict[str, Cell]]:
    """Return the cells of a budget by rule and condition.

    Examples:
        >>> by_rule([{"label": "backprop", "condition": "none", "mean": 0.9}])["backprop"]["none"]["mean"]
        0.9
    """
    table: dict[str, dict[str, Cell]] = {}
    for cell in found:
        table.setdefault(cell["label"], {})[cell["condition"]] = cell
    return table


def show(comparison: dict[str, Any]) -> None:
    """Print a table for each budget, with one row per rule and one column per condition, and the errors below."""
    from rich.table import Table

    screen, metric = console(), comparison["metric"]
    key, values = comparison["vary"]["key"], comparison["vary"]["values"]
    sign = " ± " if len(values) <= 5 else "±"  # more columns break
    for budget in comparison["budgets"]:
        found = cells(comparison, budget)
        seeds = counted(len(comparison["seeds"]), "seed")
        caption = f"{metric}: mean ± 95 % confidence interval over {seeds}; "
        caption += f"below it: by how much it is worse than at {values[0]}, paired by seed"
        table = Table(title=f"bpfree compare by {key}: {TITLES[budget]}", caption=caption)
        table.add_column("rule")
        for value in values:
            table.add_column(value, justify="right")
        for label, row in by_rule(found).items():
            texts = [_text(row.get(value), value != values[0], sign) for value in values]
            table.add_row(label, *texts)
        screen.print(table)
        for cell in (cell for cell in found if cell["error"] is not None):
            text = f"{cell['label']}, {cell['condition']}: {cell['error'].splitlines()[0]}"
            screen.print(text, style="red", markup=False, highlight=False)


def _text(cell: Cell | None, with_drop: bool, sign: str) -> str:
    if cell is None or cell["mean"] is None:
        return "-" if cell is None else "failed"
    text = f"{cell['mean']:.4f}" + ("" if cell["ci95"] is None else f"{sign}{cell['ci95']:.4f}")
    if with_drop and cell["drop"] is not None:
        text += f"\n{cell['drop']:+.4f}" + ("" if cell["drop_ci95"] is None else f"{sign}{cell['drop_ci95']:.4f}")
    return text


def plot(comparison: dict[str, Any], path: Path) -> None:
    """Draw :func:`figure`."""
    figure(_with_summary(comparison)).savefig(path)


def figure(found: dict[str, Any]) -> Figure:
    """Return a panel for each budget, with the results of each rule over the conditions.

    Lines connect the conditions only if these are numbers: names have no order.

    Args:
        found: the contents of comparison.json.
    """
    from matplotlib.figure import Figure

    values, budgets = found["vary"]["values"], found["budgets"]
    places = _numbers(values)
    drawing = Figure(figsize=(5.6, 1.2 + 3.4 * len(budgets)), layout="constrained", dpi=130)
    panels: Any = drawing.subplots(len(budgets), 1, squeeze=False, sharex=True)[:, 0]
    for axes, budget in zip(panels, budgets, strict=True):
        _panel(axes, found, budget, places)
    if places is None:
        panels[-1].set_xticks(range(len(values)), values)
        if len(values) * max(map(len, values)) > 30:
            panels[-1].tick_params(axis="x", rotation=35)
            for tick in panels[-1].get_xticklabels():
                tick.set(horizontalalignment="right", rotation_mode="anchor")
    elif min(places) > 0 and max(places) / min(places) > 30:
        panels[-1].set_xscale("log")
    mark = f"mean, 95 % bootstrap interval, and each of {counted(len(found['seeds']), 'seed')}"
    panels[-1].set_xlabel(f"{found['vary']['key']}\n{mark}", fontsize=10)
    handles = panels[0].get_legend_handles_labels()
    drawing.legend(*handles, loc="outside upper center", ncols=3, frameon=False, fontsize=10)
    return drawing


def _panel(axes: Axes, found: dict[str, Any], budget: str, places: list[float] | None) -> None:
    """Draw all rules under one budget."""
    from matplotlib.transforms import ScaledTranslation

    values, rules = found["vary"]["values"], by_rule(found["summary"][budget])
    color, root = colors(list(rules)), axes.get_figure(root=True)
    assert root is not None
    for index, (label, row) in enumerate(rules.items()):
        # Side by side, so that error bars do not hide one another; less so where the place on the axis is a number.
        points = (index - (len(rules) - 1) / 2) * (min(7, 28 / len(rules)) if places is None else 2)
        aside = axes.transData + ScaledTranslation(points / 72, 0, root.dpi_scale_trans)
        known = [(x, row.get(value), _seeds(found, value, label, budget)) for x, value in _ordered(places, values)]
        _line(axes, index, (label, color[label], places is not None), known, aside)
    axes.margins(x=0.07)
    axes.set_ylabel(found["metric"])
    axes.set_title(TITLES.get(budget, budget), fontsize=10)
    axes.grid(axis="y", color="0.9")


def _seeds(found: dict[str, Any], value: str, label: str, budget: str) -> list[float]:
    """Return the metric of every seed of a rule under a condition."""
    conditions = [one for one in found["conditions"] if one["value"] == value]
    rules = [rule for one in conditions for rule in one["rules"] if rule["label"] == label]
    return [each for rule in rules for each in _by_seed(rule, budget, found["metric"]).values()]


Known = tuple[float, Cell | None, list[float]]  # place on the axis, its cell, the metric of each seed


def _line(axes: Axes, index: int, named: tuple[str, str, bool], known: Sequence[Known], place: Any) -> None:
    """Draw one rule; a condition without a result is a gap in its line."""
    label, color, joined = named
    means = [math.nan if cell is None or cell["mean"] is None else cell["mean"] for _, cell, _ in known]
    if all(map(math.isnan, means)):
        label += " (failed)"
    xs = [x for x, _, _ in known]
    spreads = [_spread(mean, cell, values) for mean, (_, cell, values) in zip(means, known, strict=True)]
    below, above = zip(*spreads, strict=True)
    drawn = axes.errorbar(xs, means, yerr=[below, above], label=label, color=color, capsize=3, markersize=5)
    style = ("-" if 0 < index <= 10 else "--") if joined else "none"
    drawn.lines[0].set(marker="osD^vP*X<>"[index % 10], linestyle=style)
    seeds = [(x, value) for x, _, values in known for value in values]
    dots = axes.plot([x for x, _ in seeds], [value for _, value in seeds], ".", color=color, markersize=3, alpha=0.5)
    for artist in (*drawn.get_children(), *dots):
        artist.set_transform(place)  # now that the limits of the axes are known


def _spread(mean: float, cell: Cell | None, values: Sequence[float]) -> tuple[float, float]:
    """Return how far the interval reaches below the mean, and above it."""
    ends = interval(values)
    if ends is not None:
        return max(0.0, mean - float(ends[0])), max(0.0, float(ends[1]) - mean)
    half = math.nan if cell is None or cell["ci95"] is None else cell["ci95"]
    return half, half


def _numbers(values: Sequence[str]) -> list[float] | None:
    """Return the values as numbers, or None if one of them is none."""
    with contextlib.suppress(ValueError):
        numbers = [float(value) for value in values]
        return numbers if all(map(math.isfinite, numbers)) else None
    return None


def _ordered(places: list[float] | None, values: Sequence[str]) -> list[tuple[float, str]]:
    """Return where each value stands on the axis, from left to right."""
    return sorted(zip(places or map(float, range(len(values))), values, strict=True))
