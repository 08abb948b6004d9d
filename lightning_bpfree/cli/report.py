"""The report of ``bpfree fit --report true``: a table, and a figure of the training."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger

from lightning_bpfree.cli.common.evaluation import mean_cosine
from lightning_bpfree.cli.common.tables import console, number
from lightning_bpfree.cli.run_files import upload_figure
from lightning_bpfree.training.trainer_attributes import callbacks_of
from lightning_bpfree.training.training_rule import TrainingRule

STYLES = ("-", ":", "--", "-.")  # of the curves of one rule: colors tell rules apart (cli/common/drawing.py)
COSINE = "bpfree/cosine_to_backprop"
Curve = tuple[list[float], list[float]]


def csv_logger(trainer: pl.Trainer) -> CSVLogger | None:
    """Return the logger that writes metrics.csv, if the Trainer has one."""
    return next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)


def show(trainer: pl.Trainer, metrics: dict[str, float], seconds: float) -> None:
    """Print the table, draw the figure, show it in the loggers that take images, and print where the files are.

    Args:
        trainer: the Trainer after fit and test.
        metrics: metrics of the test set.
        seconds: duration of the fit.
    """
    from rich.table import Table

    table = Table("", "result", title="bpfree report", show_header=False)
    for name, value in _rows(trainer, metrics, seconds).items():
        table.add_row(name, value)
    screen = console()
    screen.print(table)
    logger = csv_logger(trainer)
    if logger is None:  # fast_dev_run takes the loggers away
        return
    logger.save()
    folder = Path(logger.log_dir)
    plot(read_metrics(folder / "metrics.csv"), folder / "training.png")
    upload_figure(trainer.loggers, "training", folder / "training.png")
    for name in ("metrics.csv", "training.png"):
        screen.print(str(folder / name), soft_wrap=True, highlight=False, markup=False)


def _rows(trainer: pl.Trainer, metrics: dict[str, float], seconds: float) -> dict[str, str]:
    rule = next(iter(callbacks_of(trainer, TrainingRule)), None)
    rows = {"rule": "none (plain Lightning)" if rule is None else type(rule).__name__}
    rows.update({name: number(value, 4) for name, value in metrics.items()})
    cosine = mean_cosine(trainer)
    if cosine is not None:
        rows["mean cosine to backprop"] = number(cosine)
    if rule is not None:
        rows["forward evaluations"] = f"{rule.record.forward_evals:,.0f}"
    rows["seconds of fit"] = f"{seconds:.1f}"
    return rows


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a CSVLogger's file, each without its empty columns."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def curves(rows: Iterable[dict[str, float]], quantity: str) -> dict[str, Curve]:
    """Return the curves of a quantity by epoch, from columns such as ``train_acc`` and ``val/acc_epoch``.

    Args:
        rows: rows of metrics.csv.
        quantity: ``"acc"``, ``"return"`` or ``"loss"``.
    """
    wanted = re.compile(rf"(train|val|valid|validation)[_/](?!.*_step$).*{quantity}")
    found: dict[str, Curve] = {}
    for row in rows:
        for name, value in row.items():
            if wanted.match(name) and "epoch" in row:
                epochs, values = found.setdefault(name, ([], []))
                epochs.append(row["epoch"])
                values.append(value)
    return found


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """Draw accuracy (or return, or loss) by epoch, and the cosine to backprop by step if it was measured."""
    from matplotlib.figure import Figure

    cosine = [(row["step"], row[COSINE]) for row in rows if COSINE in row]
    titles = {"acc": "accuracy", "return": "return", "loss": "loss"}
    quantity = next((quantity for quantity in titles if curves(rows, quantity)), "loss")
    figure = Figure(figsize=(7, 6 if cosine else 3.5), layout="constrained", dpi=120)
    top, *below = figure.subplots(2 if cosine else 1, 1, squeeze=False)[:, 0]
    for (name, (epochs, values)), style in zip(curves(rows, quantity).items(), cycle(STYLES)):
        top.plot(epochs, values, style, marker=".", color="0.25", label=name)
    top.set(xlabel="epoch", ylabel=titles[quantity])
    if top.has_data():
        top.legend()
    for axes in below:
        axes.plot(*zip(*cosine, strict=True), color="0.25", linewidth=1)
        axes.axhline(0, color="gray", linewidth=0.8)
        axes.set(xlabel="step", ylabel="cosine to backprop")
    figure.savefig(path)
