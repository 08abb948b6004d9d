"""A picture of the architecture over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS = 40


def architecture_picture(history: Sequence[Mapping[str, Any]], fixed_at: int | None = None) -> Figure:
    """Return a figure: the share of each size over the steps of a search, and the cost over the budget.

    Args:
        history: one entry a moment: ``step``, ``cost`` over the budget, and ``shares`` in [0, 1] by name.
        fixed_at: step from which sizes are held.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Pictures need matplotlib: pip install "lightning-bpfree[recipes]", or pictures=False.'
        ) from error
    names = list(history[-1]["shares"])
    shown = names[:MOST_ROWS]
    steps = [entry["step"] for entry in history]
    figure = Figure(figsize=(8.0, 1.9 + 0.19 * len(shown)), layout="constrained")
    cost, sizes = figure.subplots(2, 1, sharex=True, height_ratios=[1.0, max(1.0, 0.14 * len(shown))])
    cost.plot(steps, [entry["cost"] for entry in history], color="C0")
    cost.axhline(1.0, color="0.4", linewidth=0.8)
    cost.set_ylabel("cost / budget", fontsize=8)
    # Time is even: a column stands for the same number of steps.
    rows = [[entry["shares"][name] for entry in history] for name in shown]
    edges = [*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)]
    mesh = sizes.pcolormesh(edges, range(len(shown) + 1), rows, cmap="viridis", vmin=0.0, vmax=1.0)
    last = history[-1]["shares"]
    labels = [f"{name if len(name) <= 44 else '…' + name[-43:]}  {last[name]:.2f}" for name in shown]
    sizes.set_yticks([row + 0.5 for row in range(len(shown))], labels, fontsize=7)
    sizes.invert_yaxis()
    sizes.set_xlabel(
        "steps of the optimizer" + (f"; first {MOST_ROWS} sizes" if len(names) > MOST_ROWS else ""), fontsize=8
    )
    for axes in (cost, sizes):
        axes.tick_params(axis="x", labelsize=8)
        if fixed_at is not None:
            axes.axvline(fixed_at, color="tab:red", linewidth=0.8)
    cost.tick_params(axis="y", labelsize=8)
    figure.colorbar(mesh, ax=sizes, label="size / largest size")
    return figure
