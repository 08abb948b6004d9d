"""What a study of lottery tickets has found: statistics over seeds, its table, its files and its plots."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bpfree.cli.compare_results import confidence
from lightning_bpfree.cli.tables import console

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.progress import Progress

Study = dict[str, Any]
Cells = dict[tuple[str, str], dict[float, list[float]]]  # (rule, tickets) -> weights left -> values, one a seed
FIELDS = ("rule", "tickets", "seed", "level", "weights_left", "kept", "value", "forward_evals", "seconds")


def progress() -> Progress:
    """Return the bar that a study shows."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    texts = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("levels"))
    return Progress(*texts, TimeElapsedColumn(), console=console())


def cells(study: Study) -> Cells:
    """Return the metric by rule, kind of tickets, and weights left; repeated trainings are left out."""
    found: Cells = {}
    for run in study["runs"]:
        if not run["tickets"].endswith("_again"):
            levels = found.setdefault((run["rule"], run["tickets"]), {})
            levels.setdefault(round(run["weights_left"], 6), []).append(run["value"])
    return found


def differences(study: Study) -> dict[str, dict[float, list[float]]]:
    """Return the first kind's metric minus that of each other kind, paired by seed, by weights left."""
    values = {(run["tickets"], run["seed"], run["level"]): run for run in study["runs"] if run["rule"] == study["rule"]}
    first, *others = study["kinds"]
    found: dict[str, dict[float, list[float]]] = {kind: {} for kind in others}
    for (kind, seed, level), run in values.items():
        own = values.get((first, seed, level))
        if kind in found and own is not None:
            found[kind].setdefault(round(own["weights_left"], 6), []).append(own["value"] - run["value"])
    return found


def written(values: list[float], signed: bool = False) -> str:
    """Return the mean with its 95 % confidence interval."""
    spread = confidence(values)
    mean = statistics.fmean(values)
    return f"{mean:{'+' * signed}.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def table_rows(study: Study) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the rows of the table: a row a kind of tickets, a column a sparsity."""
    found = cells(study)
    left = sorted({level for levels in found.values() for level in levels}, reverse=True)
    rows = [
        [rule, kind, *(written(levels[level]) if level in levels else "-" for level in left)]
        for (rule, kind), levels in found.items()
    ]
    first = study["kinds"][0]
    for kind, levels in differences(study).items():
        if levels:
            cells_of = (written(levels[level], signed=True) if level in levels else "-" for level in left)
            rows.append([study["rule"], f"{first} - {kind}", *cells_of])
    return ["rule", "tickets", *(f"{100 * level:.3g} %" for level in left)], rows


def barrier_rows(study: Study, of: str = "metric") -> tuple[list[str], list[list[str]]]:
    """Return the heads and the rows of the table of barriers, of the metric or of the loss."""
    found = barriers(study, of)
    left = sorted({level for levels in found.values() for level in levels}, reverse=True)
    rows = [
        [rule, between, *(written(levels[level]) if level in levels else "-" for level in left)]
        for (rule, between), levels in found.items()
    ]
    return ["rule", "between", *(f"{100 * level:.3g} %" for level in left)], rows


def barriers(study: Study, of: str = "metric") -> Cells:
    """Return the barriers by rule and by what lies at the ends, by weights left."""
    found: Cells = {}
    for entry in study["barriers"]:
        if of in entry:
            levels = found.setdefault((entry["rule"], entry["between"]), {})
            levels.setdefault(round(entry["weights_left"], 6), []).append(entry[of]["barrier"])
    return found


def show(study: Study) -> None:
    """Print the tables."""
    from rich.table import Table

    seeds = f"mean ± 95 % confidence interval over {len(study['seeds'])} seed(s), by weights left"
    for title, (heads, rows) in (
        (f"{study['metric']} of trained tickets", table_rows(study)),
        (f"barriers of {study['metric']} on straight lines between trained networks", barrier_rows(study)),
    ):
        if not rows:
            continue
        table = Table(title=f"bpfree tickets: {title}", caption=seeds)
        for head in heads:
            table.add_column(head, justify="left" if head in ("rule", "tickets", "between") else "right")
        for row in rows:
            table.add_row(*row)
        console().print(table)


def write(study: Study, folder: Path) -> None:
    """Write tickets.json and tickets.csv, each whole or not at all."""
    temporary = folder / "tickets.json.tmp"
    temporary.write_text(json.dumps(study, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(folder / "tickets.json")
    temporary = folder / "tickets.csv.tmp"
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(study["runs"])
    temporary.replace(folder / "tickets.csv")


# --- plots ------------------------------------------------------------------------------------------------------------


def plots(study: Study, folder: Path) -> list[Path]:
    """Draw all plots that the study has results for, and return their files."""
    files = []
    for name, figure in figures(study):
        file = folder / f"{name}.png"
        figure.savefig(file)
        files.append(file)
    return files


def figures(study: Study) -> Iterable[tuple[str, Figure]]:
    """Yield the plots by name: pruning, transfer, connectivity."""
    found = cells(study)
    own = {kind: levels for (rule, kind), levels in found.items() if rule == study["rule"]}
    yield "pruning", _levels_figure(own, f"tickets trained by {study['rule']}", study["metric"])
    targets = list(dict.fromkeys(rule for rule, _ in found if rule != study["rule"]))
    for target in targets:
        lines = {kind: levels for (rule, kind), levels in found.items() if rule == target}
        name = "transfer" if len(targets) == 1 else f"transfer_{target}"
        yield name, _levels_figure(lines, f"tickets trained by {target}", study["metric"])
    if study["barriers"]:
        yield "connectivity", _connectivity_figure(study)


def _levels_figure(lines: dict[str, dict[float, list[float]]], title: str, label: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    for kind, levels in lines.items():
        _curve(axes, levels, kind.replace("_", " "))
    _finish(axes, title, label)
    return figure


def _connectivity_figure(study: Study) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained", dpi=150)
    between = {"levels": "between neighbouring levels", "seeds": "between two trainings of a ticket"}
    for axes, (ends, title) in zip(figure.subplots(1, 2, sharey=True), between.items(), strict=True):
        for (rule, kind), levels in barriers(study).items():
            if kind == ends:
                _curve(axes, levels, rule)
        _finish(axes, title, f"barrier of {study['metric']}")
    return figure


def _curve(axes: Axes, levels: dict[float, list[float]], label: str) -> None:
    left = sorted(levels, reverse=True)
    means = [statistics.fmean(levels[level]) for level in left]
    spreads = [confidence(levels[level]) or 0.0 for level in left]
    axes.errorbar([100 * level for level in left], means, yerr=spreads, fmt="o-", capsize=3, label=label)


def _finish(axes: Axes, title: str, label: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("weights left, %")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.grid(color="0.9")
    axes.legend()
