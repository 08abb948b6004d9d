"""`bpfree tickets`: means, intervals and paired differences are those by hand; tables."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from ticket_problems import Counted, by_hand, results

from lightning_bpfree.cli.common.records import finite
from lightning_bpfree.cli.compare.results import confidence
from lightning_bpfree.cli.tickets import command as tickets
from lightning_bpfree.cli.tickets import results as tickets_results
from lightning_bpfree.cli.tickets.results import barrier_rows, cells, differences, table_rows, written
from lightning_bpfree.methods.lottery_ticket.connectivity import loss_barrier


def test_statistics_by_hand() -> None:
    study = by_hand()
    found = cells(study)
    assert list(found) == [("ES", "snr"), ("ES", "random"), ("bp", "magnitude"), ("bp", "snr_of_ES")]
    assert found["ES", "snr"] == {1.0: [0.9, 0.8, 0.7], 0.25: [0.8, 0.7, 0.9]}
    # 0.8-0.5, 0.7-0.6, 0.9-0.7: mean 0.2, standard deviation 0.1, t = 4.303: 4.303 * 0.1 / sqrt(3) = 0.248
    assert differences(study) == {
        ("ES", "snr minus random"): {1.0: [0.0] * 3, 0.25: pytest.approx([0.3, 0.1, 0.2])},
        ("bp", "snr_of_ES minus magnitude"): {0.25: pytest.approx([0.1, 0.0, -0.1])},
    }
    heads, rows = table_rows(study)
    assert heads == ["rule", "tickets", "100 %", "25 %"]
    assert rows == [
        ["ES", "snr", "0.800 ± 0.248", "0.800 ± 0.248"],
        ["ES", "random", "0.800 ± 0.248", "0.600 ± 0.248"],
        ["bp", "magnitude", "1.000 ± 0.000", "0.600 ± 0.248"],
        ["bp", "snr_of_ES", "-", "0.600 ± 0.000"],
        ["ES", "snr minus random", "+0.000 ± 0.000", "+0.200 ± 0.248"],
        ["bp", "snr_of_ES minus magnitude", "-", "+0.000 ± 0.248"],
    ]
    assert barrier_rows(study) == (
        ["rule", "between", "100 %", "25 %"],
        [["ES", "neighboring levels", "-", "0.110 ± 0.025"], ["ES", "two trainings", "0.010 ± 0.025", "0.110 ± 0.025"]],
    )
    assert barrier_rows(study, "loss")[1][0] == ["ES", "neighboring levels", "-", "0.500 ± 0.000"]


def test_differences_are_paired_by_seed_whatever_the_order() -> None:
    study = by_hand()
    study["runs"] = [run for run in reversed(study["runs"]) if (run["tickets"], run["seed"]) != ("random", 1)]
    assert {level: sorted(values) for level, values in differences(study)["ES", "snr minus random"].items()} == {
        1.0: [0.0, 0.0],
        0.25: pytest.approx([0.2, 0.3]),
    }


def test_written_values() -> None:
    values = [0.9, 0.92, 0.97]
    assert written(values) == f"{statistics.fmean(values):.3f} ± {confidence(values):.3f}"
    assert written([0.5]) == "0.500"
    assert written([-0.5], signed=True) == "-0.500"
    assert written([0.5, None, None]) == "0.500 (2 failed)"
    assert written([None, 0.5, 0.5]) == "0.500 ± 0.000 (1 failed)"
    assert written([None]) == "failed"


def test_what_is_not_finite_is_told_and_left_out(tmp_path: Path) -> None:
    study = by_hand()
    for run in study["runs"]:
        if (run["tickets"], run["level"]) == ("random", 1) and run["seed"] > 0:
            run["value"] = float("nan")
        if run["tickets"] == "snr_of_ES":
            run["value"] = float("inf")
    study = finite(study)
    tickets_results.write(study, tmp_path)
    assert results(tmp_path) == study
    rows = {row[1]: row[2:] for row in table_rows(study)[1]}
    assert rows["random"] == ["0.800 ± 0.248", "0.500 (2 failed)"]
    assert rows["snr_of_ES"] == ["-", "failed"]
    assert rows["snr minus random"] == ["+0.000 ± 0.000", "+0.300 (2 failed)"]
    assert len(tickets_results.plots(study, tmp_path)) == 3


def test_a_line_with_a_point_that_is_not_finite_has_no_barrier() -> None:
    class Broken(Counted):
        def barriers(self, one: Path, other: Path) -> dict[str, Any]:
            losses = iter([0.0, float("nan"), 1.0])
            return {"metric": loss_barrier(lambda _: next(losses), {}, {}, 3)}

    options = argparse.Namespace(kinds=["snr"], seeds=[0], no_connectivity=False)
    entries = [entry for kind, entry in tickets.parts(Broken("ES", 2), [], options) if kind == "barrier"]
    assert [entry["metric"]["values"] for entry in entries] == [[0.0, None, 1.0]] * 3
    assert [entry["metric"]["barrier"] for entry in entries] == [None] * 3
    json.dumps(entries, allow_nan=False)


def test_both_tables_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    study = by_hand()
    tickets_results.show(study)
    shown = capsys.readouterr().out
    assert "test_acc of trained tickets" in shown
    assert "snr minus random" in shown
    assert "barriers of test_acc" in shown
    assert "over 3 seeds" in shown
    tickets_results.show({**study, "barriers": []})
    assert "barriers" not in capsys.readouterr().out
