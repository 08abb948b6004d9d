"""The tables and figures of the study are those of its files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[3] / "docs"


def loaded():
    specification = importlib.util.spec_from_file_location("docs_diffusion_figures", DOCS / "diffusion_figures.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_results_are_those_of_the_files():
    assert loaded().main(["--check"]) == 0, "run python docs/diffusion_figures.py"


def test_stale_tables_are_seen(tmp_path, monkeypatch):
    made = loaded()
    for name in ("DOCS", "RESULTS", "IMAGES"):
        monkeypatch.setattr(made, name, tmp_path if name == "DOCS" else tmp_path / name.lower())
    (tmp_path / "results").mkdir()
    row = {"task": "noise", "gradient": "adjoint", "cosine": 0.5, "error": 1.0, "time": 1.3, "peak_mib": 9.0}
    found = {"rules": [row], "runs": [{"seed": 0}], "summary": [], "versions": {}, "device": "cpu"}
    found |= {"command": "run", "date": "2026-01-02"}
    (tmp_path / "results" / "adjoint_dpm.json").write_text(made.json.dumps(found))
    page = tmp_path / "page.md"
    page.write_text("<!-- adjoint_dpm:gradients -->\nold\n<!-- /adjoint_dpm -->\n")
    monkeypatch.setattr(made, "FIGURES", {})
    assert made.main(["--check"]) == 1
    assert made.main([]) == 0
    assert "| initial noise | `adjoint` | 0.5000 | 1 | 1.30 | 9 |" in page.read_text()
    assert made.main(["--check"]) == 0


def test_gradients_are_compared_by_seed():
    rows = [
        {"task": "weights", "gradient": gradient, "seed": seed, "seconds": 2.0, "after": {"test_reward": reward}}
        for gradient, rewards in {
            "exact_adjoint": (1.0, 2.0, 3.0),
            "adjoint": (0.0, 1.0, 2.0),
            "truncated": (0.5,),
            "evolution_strategy": (9.0, 9.0, 9.0),
        }.items()
        for seed, reward in enumerate(rewards)
    ]
    about = {"versions": {}, "device": "cpu", "command": "run", "date": "2026-01-02"}
    table = loaded().paired({"runs": rows, **about})
    assert "| LoRA weights | `adjoint` | 3 | **+1.0000** ± 0.0000 | 1.00 |" in table
    assert "| LoRA weights | `truncated` | 1 | +0.5000 | 1.00 |" in table
    assert "evolution_strategy" not in table  # it raises another reward


def test_no_two_gradients_share_a_color():
    found = loaded()
    colors = [found.COLORS[gradient] for gradient in found.GRADIENTS]
    assert len(set(colors)) == len(colors)
