"""Stability of coal pillars: safety factors, the four classes, cases from a CSV file, and simulated ones.

After G. A. Mendrofa, G. F. Hertono, B. D. Handari, "Ensemble Learning Model on Artificial Neural
Network-Backpropagation (ANN-BP) Architecture for Coal Pillar Stability Classification", 2023, arXiv 2303.16524.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_bpfree.core.arguments import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Seed32,
    checked,
    checked_class,
)
from lightning_bpfree.demos.tables import TableDataModule

__all__ = ["CoalPillarDataModule", "SafetyFactor", "pillar_classes", "read_pillars", "simulated_pillars"]

Labeling = Literal["agreement", "adequacy"]
COLUMNS = ("w", "h", "B", "H", "failed")
_LONGEST = {"w": 200.0, "h": 30.0, "B": 50.0, "H": 2000.0}  # meters; beyond, another unit is likelier
# Ranges of the simulated cases, in meters: our choice, for those of the published cases are not known to us.
RANGES = {"w": (4.0, 25.0), "h": (1.5, 6.0), "B": (4.5, 7.5), "H": (20.0, 220.0)}


@checked_class
@dataclass(frozen=True)
class SafetyFactor:
    """The classical safety factor of square pillars: strength over load, both in MPa.

    Strength is ``strength * w ** width_power / h ** height_power`` (Salamon and Munro's formula, 1967), the load that
    of the tributary area, ``gradient * H * ((w + B) / w) ** 2``.

    Args:
        strength: strength of a cube of 1 m, in MPa.
        width_power: exponent of the pillar's width.
        height_power: exponent of the mining height.
        gradient: vertical stress, in MPa per meter of depth.

    Examples:
        >>> factor = SafetyFactor()
        >>> round(float(factor(*torch.tensor([12.0, 3.0, 6.0, 100.0]))), 3)
        1.944
    """

    strength: PositiveFloat = 7.2
    width_power: PositiveFloat = 0.46
    height_power: PositiveFloat = 0.66
    gradient: PositiveFloat = 0.025

    def __call__(self, w: Tensor, h: Tensor, bord: Tensor, depth: Tensor) -> Tensor:
        """The safety factor of pillars `w` wide and `h` high, between bords of width `bord`, in `depth`, in meters."""
        strength = self.strength * w**self.width_power / h**self.height_power
        return strength / (self.gradient * depth * ((w + bord) / w) ** 2)


@checked
def pillar_classes(
    failed: Tensor, safety: Tensor, threshold: PositiveFloat, labeling: Labeling = "agreement"
) -> Tensor:
    """The class of each pillar, int64: 0 intact and 1 intact, 2 failed and 3 failed; even ones with a suitable factor.

    Two readings of "suitable" are offered, since sources differ. ``agreement``: the factor says what happened (failed
    and below the threshold, or intact and not below). ``adequacy``: the factor is not below the threshold. Pillars that
    failed although their factor was adequate, the dangerous ones, are class 3 of the first reading and 2 of the second.

    Args:
        failed: whether each failed, (N,).
        safety: safety factors, (N,).
        threshold: limit of the safety factor, above 0.
        labeling: ``agreement`` or ``adequacy``.

    Example:
        >>> failed, safety = torch.tensor([False, False, True, True]), torch.tensor([2.0, 1.0, 2.0, 1.0])
        >>> pillar_classes(failed, safety, threshold=1.6)
        tensor([0, 1, 3, 2])
        >>> pillar_classes(failed, safety, threshold=1.6, labeling="adequacy")
        tensor([0, 1, 2, 3])
    """
    adequate = safety >= threshold
    suitable = adequate if labeling == "adequacy" else adequate != failed.bool()
    return 2 * failed.long() + (~suitable).long()


@checked
def simulated_pillars(
    num_failed: PositiveInt = 86,
    num_intact: PositiveInt = 337,
    seed: Seed32 = 0,
    *,
    factor: SafetyFactor | None = None,
    spread: NonNegativeFloat = 0.25,
    weak_share: Fraction = 0.4,
    weak_strength: PositiveFraction = 0.5,
) -> dict[str, Tensor]:
    """SIMULATED pillars, in meters, by column: ``w``, ``h``, ``B``, ``H`` and ``failed``; no measurement is among them.

    Sizes are uniform in :data:`RANGES`. A pillar fails where its safety factor, times a log-normal factor for what the
    formula does not know, and times `weak_strength` in weak coal, is below 1. Cases are drawn until both kinds are
    complete. Whether the coal is weak is not in the table: failures with high safety factors come from there.

    Args:
        num_failed: Failed pillars, at least 1; 86 as in the South African database of 2013.
        num_intact: Intact pillars, at least 1; 337 as there.
        seed: Seed of all draws.
        factor: The safety factor; None for the default :class:`SafetyFactor`.
        spread: Deviation of the logarithm of the log-normal factor, at least 0.
        weak_share: Share of pillars in weak coal, in [0, 1].
        weak_strength: Strength of weak coal relative to other coal, in (0, 1].

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> cases = simulated_pillars(5, 10)
        >>> len(cases["w"]), int(cases["failed"].sum())
        (15, 5)
    """
    state, factor = np.random.RandomState(seed), factor or SafetyFactor()
    wanted, rows = {True: num_failed, False: num_intact}, []
    for _ in range(1000 * (num_failed + num_intact)):
        sizes = [float(state.uniform(*RANGES[column])) for column in ("w", "h", "B", "H")]
        unknown = math.exp(spread * state.standard_normal()) * (weak_strength if state.uniform() < weak_share else 1.0)
        failed = float(factor(*torch.tensor(sizes, dtype=torch.float64))) * unknown < 1
        if wanted[failed]:
            wanted[failed] -= 1
            rows.append([*sizes, float(failed)])
        if not any(wanted.values()):
            break
    else:
        raise ValueError("these constants give too few pillars of one kind; choose others.")
    columns = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return dict(zip(COLUMNS, columns, strict=True))


@checked
def read_pillars(path: str | Path) -> dict[str, Tensor]:
    """Pillars of a CSV file, by column.

    The file has a header and one row per pillar: ``w`` pillar width, ``h`` mining height, ``B`` bord width, ``H`` depth
    to floor, all in meters, ``failed`` 0 or 1, and optionally ``ratio``, which is w / h. Other columns are ignored.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A column is missing, or a row does not describe a pillar in meters; the message names the line.
    """
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        header = [name.strip() for name in reader.fieldnames or []]
        missing = [column for column in COLUMNS if column not in header]
        if missing:
            raise ValueError(
                f"{path}: column {', '.join(missing)} is missing; it has {', '.join(header) or 'none'}. Needed are "
                "w, h, B, H (meters) and failed (0 or 1); names are case-sensitive."
            )
        reader.fieldnames = header
        rows = [_checked(row, f"{path}, line {reader.line_num}") for row in reader]
    if not rows:
        raise ValueError(f"{path}: the file has a header but no pillars.")
    columns = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return dict(zip(COLUMNS, columns, strict=True))


def _checked(row: Mapping[str, Any], where: str) -> list[float]:
    values = {column: _number(row, column, where) for column in COLUMNS}
    for column, longest in _LONGEST.items():
        if not values[column] > 0:
            raise ValueError(f"{where}: {column} is {values[column]:g}; give a length above 0, in meters.")
        if values[column] > longest:
            raise ValueError(
                f"{where}: {column} is {values[column]:g} m, more than {longest:g} m; is it in feet or millimeters? "
                "All lengths are in meters."
            )
    if values["failed"] not in (0, 1):
        raise ValueError(f"{where}: failed is {values['failed']:g}; give 1 for failed and 0 for intact.")
    if (row.get("ratio") or "").strip():
        ratio, expected = _number(row, "ratio", where), values["w"] / values["h"]
        if abs(ratio - expected) > 0.02 * expected:
            raise ValueError(f"{where}: ratio is {ratio:g}, but w / h is {expected:.3g}; are both in the same unit?")
    return [values[column] for column in COLUMNS]


def _number(row: Mapping[str, Any], column: str, where: str) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {column} is {row[column]!r}, which is not a number.") from None
    if not math.isfinite(value):
        raise ValueError(f"{where}: {column} is {value}; leave such rows out.")
    return value


class CoalPillarDataModule(TableDataModule):
    """Coal pillars with five features, w, h, B, H and w / h, and the four classes of :func:`pillar_classes`.

    Without a file, the pillars are simulated by :func:`simulated_pillars`, and the data module says so: scores on them
    are not valid for real mines, and must not be compared with published results.

    Safety factor and ratio are functions of the other columns, so that part of the label is a formula of the features.

    Args:
        path: CSV file of pillars, see :func:`read_pillars`; None: simulated ones.
        threshold: Limit of the safety factor, above 0; 1.0, 1.3 and 1.6 are in use.
        labeling: Which reading of a suitable factor, ``agreement`` or ``adequacy``.
        strength: Constant of the safety factor, in MPa.
        width_power: Constant of the safety factor.
        height_power: Constant of the safety factor.
        gradient: Constant of the safety factor, in MPa per meter.
        num_failed: Simulated failed pillars.
        num_intact: Simulated intact pillars.
        data_seed: Seed of the simulation.
        **kwargs: Arguments of :class:`TableDataModule`: batch size and splits.

    Raises:
        ValueError: An argument is out of range; from :meth:`setup`, for a file that holds something else.
        FileNotFoundError: From :meth:`setup`.

    Example:
        >>> data = CoalPillarDataModule(batch_size=16)
        >>> data.setup()
        >>> x, y = next(iter(data.train_dataloader()))
        >>> tuple(x.shape), data.class_names[3]
        ((16, 5), 'failed, factor unsuitable')
    """

    class_names: Sequence[str] = (
        "intact, factor suitable",
        "intact, factor unsuitable",
        "failed, factor suitable",
        "failed, factor unsuitable",
    )
    feature_names: Sequence[str] = ("w", "h", "B", "H", "ratio")

    @checked
    def __init__(
        self,
        path: str | None = None,
        threshold: PositiveFloat = 1.3,
        labeling: Labeling = "agreement",
        *,
        strength: PositiveFloat = 7.2,
        width_power: PositiveFloat = 0.46,
        height_power: PositiveFloat = 0.66,
        gradient: PositiveFloat = 0.025,
        num_failed: PositiveInt = 86,
        num_intact: PositiveInt = 337,
        data_seed: Seed32 = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path, self.threshold, self.labeling = path, threshold, labeling
        self.factor = SafetyFactor(strength, width_power, height_power, gradient)
        self.num_failed, self.num_intact, self.data_seed = num_failed, num_intact, data_seed

    def load(self) -> tuple[Tensor, Tensor]:
        """The pillars, and their classes."""
        if self.path is None:
            rank_zero_info(
                "CoalPillarDataModule: these pillars are SIMULATED from assumed ranges and the safety-factor formula; "
                "give path='cases.csv' for measured ones."
            )
            cases = simulated_pillars(self.num_failed, self.num_intact, self.data_seed, factor=self.factor)
        else:
            cases = read_pillars(self.path)
        w, h, bord, depth = (cases[column] for column in ("w", "h", "B", "H"))
        classes = pillar_classes(cases["failed"], self.factor(w, h, bord, depth), self.threshold, self.labeling)
        return torch.stack([w, h, bord, depth, w / h], 1), classes
