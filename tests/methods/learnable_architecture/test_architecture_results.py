"""The tables and figures of learned architectures are those of their files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs"


def loaded():
    specification = importlib.util.spec_from_file_location("docs_dnarch_figures", DOCS / "dnarch_figures.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_results_are_those_of_the_files():
    assert loaded().main(["--check"]) == 0, "run python docs/dnarch_figures.py"


def test_stale_tables_are_seen(tmp_path, monkeypatch):
    made = loaded()
    monkeypatch.setattr(made, "DOCS", tmp_path)
    monkeypatch.setattr(made, "RESULTS", tmp_path)
    monkeypatch.setattr(made, "FIGURES", {})
    row = {"share": 0.5, "masked_over_plain": 0.6, "exported_over_plain": 0.55}
    row |= {"masked_range": [0.5, 0.7], "exported_range": [0.5, 0.6]}
    (tmp_path / "dnarch_benchmarks.json").write_text(made.json.dumps({"networks": {"net": {"shares": [row]}}}))
    page = tmp_path / "page.md"
    page.write_text("<!-- dnarch:times -->\nold\n<!-- /dnarch -->\n")
    assert made.main(["--check"]) == 1
    assert made.main([]) == 0
    assert "| net, masked | 0.60 (0.50–0.70) |" in page.read_text()
    assert made.main(["--check"]) == 0


def test_the_spread_over_seeds_counts_the_sizes_that_differ():
    assert loaded().spread([[4, 4, 4], [10, 8, 9], [3, 3, 3]]) == (1, 0.2)
    assert loaded().spread([[4, 4], [2, 2]]) == (0, 0.0)
