"""Budgets: the allowed cost of a network, absolute or relative to a reference, and whether it can be met."""

from __future__ import annotations

from typing import NamedTuple

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_bpfree.methods.learnable_architecture.architecture import Architecture
from lightning_bpfree.methods.learnable_architecture.search import seconds
from lightning_bpfree.methods.learnable_architecture.sizes.cost import Cost, Measure
from lightning_bpfree.methods.learnable_architecture.tracing.counting import CostBuilder, count_macs

_UNITS = {"macs": "multiply-accumulates a sample", "params": "parameters", "latency": "seconds"}


class Latency(NamedTuple):
    """A line through measured times: ``constant + slope * macs``.

    Args:
        constant: in seconds.
        slope: seconds for one multiply-accumulate.
    """

    constant: float
    slope: float


class Budget(NamedTuple):
    """A cost, and its target.

    Args:
        cost: of the network by its sizes; for latency its multiply-accumulates.
        target: in the cost's unit.
        reference: the cost of the reference, in the budget's unit.
        seconds: target in seconds, for latency.
        constant: seconds of a network without multiply-accumulates, for latency.
    """

    cost: Cost
    target: float
    reference: float
    seconds: float | None = None
    constant: float = 0.0


def make_budget(
    trainer: pl.Trainer,
    architecture: Architecture,
    measure: Measure,
    budget: float,
    relative: bool,
    reference: nn.Module | None,
) -> Budget:
    """Return the budget of a network; before its layers are cropped.

    Args:
        trainer: the Trainer, whose ranks agree on measurements.
        architecture: the sizes.
        measure: the kind of cost.
        budget: absolute, or relative to the reference.
        relative: whether it is relative.
        reference: a network; None for the network itself, uncropped.

    Raises:
        MisconfigurationException: for a budget that the network cannot meet; it gives the smallest and the largest.
    """
    builder = CostBuilder(architecture)
    cost = builder.params() if measure == "params" else builder.macs()
    axes = architecture.axes
    low, high = cost.at(axes, smallest=True), cost.at(axes, smallest=False)
    if measure != "latency":
        full = _reference(architecture, measure, reference, high)
        wanted = budget * full if relative else budget
        _check(measure, wanted, low, high, full)
        return Budget(cost, wanted, full)
    line = _line(trainer, architecture, low, high)
    ends = line.constant + line.slope * low, line.constant + line.slope * high
    full = ends[1]
    if reference is not None:
        full = float(trainer.strategy.broadcast(seconds(reference, architecture.call)))
    wanted = budget * full if relative else budget
    _check(measure, wanted, *ends, full)
    return Budget(cost, (wanted - line.constant) / line.slope, full, wanted, line.constant)


def _reference(architecture: Architecture, measure: Measure, reference: nn.Module | None, high: float) -> float:
    if reference is None:
        return high
    if measure == "params":
        return float(sum(p.numel() for p in reference.parameters()))
    call = architecture.call
    return float(count_macs(reference, *call.args, **call.kwargs))


def _line(trainer: pl.Trainer, architecture: Architecture, low: float, high: float) -> Latency:
    """Measure the largest and the smallest network."""
    kept = [axis.kept for axis in architecture.axes]
    architecture.install()
    try:
        times = []
        for end in (0, -1):
            for axis in architecture.axes:
                wanted = axis.crops[end]
                axis.set_kept(next(k for k in range(axis.count + 1) if axis.crop_of(k) >= wanted))
            times.append(float(trainer.strategy.broadcast(seconds(architecture.network, architecture.call))))
    finally:
        for axis, number in zip(architecture.axes, kept, strict=True):
            axis.set_kept(number)
        architecture.remove()
    slope = max(times[1] - times[0], 1e-9) / max(high - low, 1.0)
    return Latency(times[0] - slope * low, slope)


def _check(measure: Measure, wanted: float, low: float, high: float, full: float) -> None:
    unit = _UNITS[measure]
    if wanted < low * (1 - 1e-9):
        raise MisconfigurationException(
            f"LearnableArchitecture: a budget of {wanted:.4g} {unit}, and the smallest network that these sizes allow "
            f"takes {low:.4g} ({low / full:.3f} of the reference): give a budget of at least that, or learn further "
            "dims."
        )
    if wanted > high * (1 + 1e-6):
        raise MisconfigurationException(
            f"LearnableArchitecture: a budget of {wanted:.4g} {unit}, and the largest network takes {high:.4g}: give a "
            "budget of at most that, or a wider network."
        )
