"""Results of a study of lottery tickets: statistics over seeds, table, files and plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_bpfree.cli.common.drawing import colors, interval
from lightning_bpfree.cli.common.records import write_csv, write_json
from lightning_bpfree.cli.common.tables import console, counted
from lightning_bpfree.cli.compare.results import confidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.progress import Progress

Study = dict[str, Any]
Levels = dict[float, list[float | None]]  # weights left -> values, one a seed; None where one is not finite
Cells = dict[tuple[str, str], Levels]  # by rule and tickets
BETWEEN = {"levels": "neighboring levels", "seeds": "two trainings"}  # of a ticket
FIELDS = ("rule", "tickets", "seed", "level", "weights_left", "kept", "value", "forward_evals", "seconds")


def progress() -> Progress:
    """Return the bar that a study shows."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    texts = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("levels"))
    return Progress(*texts, TimeElapsedColumn(), console=console())


def cells(study: Study) -> Cells:
    """Return the metric by rule, kind of tickets, and share of weights left, without repeated trainings."""
    found: Cells = {}
    for run in study["runs"]:
        if not run["tickets"].endswith("_again"):
            levels = found.setdefault((run["rule"], run["tickets"]), {})
            levels.setdefault(round(run["weights_left"], 6), []).append(run["value"])
    return found


def differences(study: Study) -> Cells:
    """Return the metric of one kind minus that of another, paired by seed, by rule and ``"one minus other"``.

    The first kind is compared with each other kind; for a rule that it is transferred to, with that rule's own tickets.
    """
    first, moved = study["kinds"][0], f"{study['kinds'][0]}_of_{study['rule']}"
    found: Cells = {}
    values = {(run["rule"], run["tickets"], run["seed"], run["level"]): run for run in study["runs"]}
    for (rule, kind, seed, level), run in values.items():
        one = first if rule == study["rule"] else moved
        own = values.get((rule, one, seed, level))
        if own is None or kind == one or kind.endswith("_again"):
            continue
        failed = own["value"] is None or run["value"] is None
        difference = None if failed else own["value"] - run["value"]
        levels = found.setdefault((rule, f"{one} minus {kind}"), {})
        levels.setdefault(round(own["weights_left"], 6), []).append(difference)
    return found


def written(values: Sequence[float | None], signed: bool = False) -> str:
    """Return the mean with its 95 % confidence interval, and the number of missing values."""
    good = _known(values)
    lost = f" ({len(values) - len(good)} failed)" if len(good) < len(values) else ""
    if not good:
        return "failed"
    spread = confidence(good)
    return f"{statistics.fmean(good):{'+' * signed}.3f}" + ("" if spread is None else f" ± {spread:.3f}") + lost


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def table_rows(study: Study) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table, with one row per kind of tickets and one column per sparsity."""
    found = cells(study)
    left = sorted({level for levels in found.values() for level in levels}, reverse=True)
    rows = [
        [rule, kind, *(written(levels[level]) if level in levels else "-" for level in left)]
        for (rule, kind), levels in found.items()
    ]
    for (rule, pair), levels in differences(study).items():
        cells_of = (written(levels[level], signed=True) if level in levels else "-" for level in left)
        rows.append([rule, pair, *cells_of])
    return ["rule", "tickets", *(f"{100 * level:.3g} %" for level in left)], rows


def barrier_rows(study: Study, of: str = "metric") -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table of barriers, of the metric or of the loss."""
    found = barriers(study, of)
    left = sorted({level for levels in found.values() for level in levels}, reverse=True)
    rows = [
        [rule, BETWEEN.get(between, between), *(written(levels[level]) if level in levels else "-" for level in left)]
        for (rule, between), levels in found.items()
    ]
    return ["rule", "between", *(f"{100 * level:.3g} %" for level in left)], rows


def barriers(study: Study, of: str = "metric") -> Cells:
    """Return the barriers by rule, by the networks at the ends, and by share of weights left."""
    found: Cells = {}
    for entry in study["barriers"]:
        if of in entry:
            levels = found.setdefault((entry["rule"], entry["between"]), {})
            levels.setdefault(round(entry["weights_left"], 6), []).append(entry[of]["barrier"])
    return found


def show(study: Study) -> None:
    """Print the tables."""
    from rich.table import Table

    seeds = f"mean ± 95 % confidence interval over {counted(len(study['seeds']), 'seed')}, by share of weights left"
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
    """Write tickets.json and tickets.csv atomically."""
    write_json(study, folder / "tickets.json")
    write_csv(FIELDS, study["runs"], folder / "tickets.csv")


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


def _levels_figure(lines: dict[str, Levels], title: str, label: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.4), layout="constrained", dpi=130)
    _panel(figure.subplots(), {kind.replace("_", " "): levels for kind, levels in lines.items()}, title, label)
    return figure


def _connectivity_figure(study: Study) -> Figure:
    from matplotlib.figure import Figure

    figure, found = Figure(figsize=(5.6, 7.6), layout="constrained", dpi=130), barriers(study)
    titles = {"levels": "between neighboring levels", "seeds": "between two trainings of the same ticket"}
    ends = [between for between in titles if any(kind == between for _, kind in found)]
    panels = figure.subplots(len(ends), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, between in zip(panels, ends, strict=True):
        lines = {rule: levels for (rule, kind), levels in found.items() if kind == between}
        _panel(axes, lines, titles[between], f"barrier of {study['metric']}")
    for axes in panels[:-1]:
        axes.get_legend().remove()  # the lowest one has the same
        axes.tick_params(labelbottom=True)
    # The panels share their axis, hence its ticks, which are those of all levels.
    _ticks(panels[0], {level for levels in found.values() for level in levels})
    return figure


def _panel(axes: Axes, lines: dict[str, Levels], title: str, label: str) -> None:
    left = {level for levels in lines.values() for level in levels}
    width, color = math.log(max(left) / min(left)), colors(["", *lines])  # no line is the baseline
    for place, (name, levels) in enumerate(lines.items()):
        aside = math.exp(0.008 * width * ((len(lines) - 1) / 2 - place))  # so that bars do not overlap
        points = {level: good for level in sorted(levels, reverse=True) if (good := _known(levels[level]))}
        means = [statistics.fmean(values) for values in points.values()]
        ends = [interval(values) or (mean, mean) for mean, values in zip(means, points.values(), strict=True)]
        below = [max(0.0, mean - float(low)) for mean, (low, _) in zip(means, ends, strict=True)]
        above = [max(0.0, float(high) - mean) for mean, (_, high) in zip(means, ends, strict=True)]
        axes.errorbar(
            [100 * level * aside for level in points],
            means,
            yerr=[below, above],
            fmt="o-",
            markersize=4,
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
            color=color[name],
            label=name,
        )
    axes.set_xscale("log")
    axes.set_xlabel("weights left, %")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=11)
    axes.grid(color="0.9")
    axes.legend(fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
    _ticks(axes, left)
    if not axes.xaxis_inverted():
        axes.invert_xaxis()  # of all panels that share the axis


def _ticks(axes: Axes, left: set[float]) -> None:
    """Mark the levels themselves, for there are rarely two powers of ten among them, as far apart as labels need."""
    marked: list[float] = []
    room = math.log(max(left) / min(left)) / 10
    for level in sorted(left, reverse=True):
        if not marked or math.log(marked[-1] / level) >= 0.95 * room > 0:
            marked.append(level)
    axes.set_xticks([100 * level for level in marked], [f"{100 * level:.3g}" for level in marked])
    axes.set_xticks([], minor=True)
