"""`bpfree tickets`: plots with labels, and pages that show what a study has found."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
from result_pages import make_results, pages_in
from ticket_problems import by_hand

from lightning_bpfree.cli.tickets import results as tickets_results
from lightning_bpfree.cli.tickets.results import figures


def test_plots_have_labeled_axes() -> None:
    found = dict(figures(by_hand()))
    assert list(found) == ["pruning", "transfer", "connectivity"]
    for name, lines in {"pruning": ["snr", "random"], "transfer": ["magnitude", "snr of ES"]}.items():
        (axes,) = found[name].axes
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("weights left, %", "test_acc")
        assert axes.get_title() == f"tickets trained by {'ES' if name == 'pruning' else 'bp'}"
        assert [text.get_text() for text in axes.get_legend().get_texts()] == lines
    left, right = found["connectivity"].axes
    for axes in (left, right):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("weights left, %", "barrier of test_acc")
        assert axes.xaxis_inverted()
        assert [label.get_text() for label in axes.get_xticklabels()] == ["100", "25"]
    assert (left.get_title(), right.get_title()) == (
        "between neighboring levels",
        "between two trainings of the same ticket",
    )
    line = found["pruning"].axes[0].lines[0]
    assert list(line.get_ydata()) == pytest.approx([0.8, 0.8])
    assert list(line.get_xdata()) == pytest.approx([100, 25], rel=0.02)  # a little aside


def test_ticks_are_levels_with_room_between_them(tmp_path: Path) -> None:
    left = [0.8**level for level in range(20)]
    study = by_hand()
    study["runs"] = [
        {**study["runs"][0], "level": level, "weights_left": share, "seed": seed}
        for level, share in enumerate(left)
        for seed in range(3)
    ]
    figure = dict(figures(study))["pruning"]
    figure.savefig(tmp_path / "plot.png")  # places the labels
    labels = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert [label.get_text() for label in labels][:3] == ["100", "64", "41"]
    boxes = [label.get_window_extent() for label in labels]
    assert all(one.x1 + 3 < other.x0 for one, other in itertools.pairwise(boxes))


def test_a_study_of_one_level_has_no_lines_between_levels(tmp_path: Path) -> None:
    study = by_hand()
    for key in ("runs", "barriers"):
        study[key] = [entry for entry in study[key] if entry["level"] == 0]
    tickets_results.plots(study, tmp_path)  # and no warning
    (axes,) = dict(figures(study))["connectivity"].axes
    assert axes.get_title() == "between two trainings of the same ticket"


def test_pages_show_what_a_study_has_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, docs = pages_in(tmp_path, monkeypatch)
    (tmp_path / "README.md").write_text("<!-- results:es_study -->\n<!-- /results -->\n")
    (docs / "results/es_study.json").write_text(json.dumps(by_hand()))
    assert made.main(["--check"]) == 1
    assert made.main([]) == 0
    assert made.main(["--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "**`test_acc` of trained tickets, by weights left**" in text
    assert "| rule | tickets | 100 % | 25 % |" in text
    assert "| ES | snr minus random | +0.000 ± 0.000 | +0.200 ± 0.248 |" in text
    assert "**Barriers of `test_acc`" in text
    assert "**Barriers of `test_loss`" in text
    assert "| ES | neighboring levels | - | 0.500 ± 0.000 |" in text
    assert "3 seeds. Figures: mean" in text
    assert "Tables: mean ± half width" in text
    for name in ("pruning", "transfer", "connectivity"):
        assert f"(docs/img/es_study_{name}.png)" in text
        assert (docs / f"img/es_study_{name}.png").read_bytes().startswith(b"\x89PNG")
    (docs / "results/es_study.json").write_text(json.dumps({**by_hand(), "seeds": [0, 1]}))
    assert made.main(["--check"]) == 1


@pytest.mark.parametrize("change", ["none", "two targets", "no target", "no lines", "a metric without a loss"])
def test_images_are_named_as_they_are_drawn(change: str) -> None:
    study = by_hand()
    if change == "two targets":
        study["runs"] += [{**run, "rule": "another_one"} for run in study["runs"] if run["rule"] == "bp"]
    if change == "no target":
        study["runs"] = [run for run in study["runs"] if run["rule"] == "ES"]
    if change == "no lines":
        study["barriers"] = []
    if change == "a metric without a loss":
        for entry in study["barriers"]:
            del entry["loss"]
    made = make_results()
    path = Path("es_study.json")
    captions = made.images(path, study)
    assert sorted(captions) == sorted(name for name, _ in importlib.import_module("studies").drawings(path, study))
    assert all("weights left" in caption for caption in captions.values())
    tables = made.study_tables(study, made.table)
    assert len(tables) == {"no lines": 1, "a metric without a loss": 2}.get(change, 3)
