"""`bpfree compare --vary`: the comparison once more for every value, tuned at the first, and drops from it."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comparing import run_in_process, written
from result_pages import pages_in

from lightning_bpfree.cli import main
from lightning_bpfree.cli.common.configured import Blueprint
from lightning_bpfree.cli.compare import command
from lightning_bpfree.cli.compare import worker as compare_worker
from lightning_bpfree.cli.compare.conditions import cells, figure
from lightning_bpfree.cli.compare.results import confidence
from lightning_bpfree.demos.corruption import CORRUPTIONS, Corruption
from lightning_bpfree.demos.data import DigitsDataModule

pytestmark = pytest.mark.slow  # each compares under several conditions

Overlay = Callable[..., str]

KEY = "data.init_args.corruption"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs rules in this process; see :func:`run_in_process`."""
    return run_in_process(monkeypatch)


def short(base: str, *arguments: str) -> list[str]:
    return ["compare", "-c", base, "--out", "out", "--epochs", "1", "--budget", "epochs", *arguments]


def test_the_comparison_is_repeated_and_everything_is_written(
    base: str, overlay: Overlay, in_process: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rule = overlay("zo.yaml", "ZerothOrder", num_directions=2)
    varied = [f"--vary={KEY}=none,random_labels,paper"]
    assert main(short(base, "--rules", rule, "--seeds", "0", "1", *varied)) == 0
    found = written()
    assert found["vary"] == {"key": KEY, "values": ["none", "random_labels", "paper"]}
    assert "rules" not in found
    assert [part["value"] for part in found["conditions"]] == found["vary"]["values"]
    steps = [[[run["steps"] for run in rule["runs"]] for rule in part["rules"]] for part in found["conditions"]]
    assert steps == [[[4, 4]] * 2, [[4, 4]] * 2, [[6, 6]] * 2]  # 128 samples in batches of 32; the paper's 171

    assert [(cell["condition"], cell["label"]) for cell in found["summary"]["epochs"]] == [
        (value, label) for value in found["vary"]["values"] for label in ("backprop", "zo")
    ]
    accuracies = [
        [run["metrics"]["test_acc"] for run in part["rules"][0]["runs"]] for part in found["conditions"]
    ]  # of backprop
    drops = [clean - noisy for clean, noisy in zip(accuracies[0], accuracies[1], strict=True)]
    first, _, second, *_ = found["summary"]["epochs"]
    assert second["mean"] == pytest.approx(statistics.mean(accuracies[1]))
    assert second["drop"] == pytest.approx(statistics.mean(drops))
    assert second["drop_ci95"] == pytest.approx(confidence(drops))
    assert (first["drop"], second["gap"]) == (0, 0)

    with Path("out/comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0])[:5] == ["condition", "budget", "rule", "seed", "test_acc"]
    assert [(line["condition"], line["rule"], line["seed"]) for line in lines][3:6] == [
        ("none", "zo", "1"),
        ("random_labels", "backprop", "0"),
        ("random_labels", "backprop", "1"),
    ]
    assert len(lines) == 12
    assert Path("out/comparison.png").read_bytes().startswith(b"\x89PNG")
    assert Path("out/rules/3-paper/zo.yaml").exists()
    out = " ".join(capsys.readouterr().out.split())
    assert f"bpfree compare by {KEY}: the same epochs for every rule" in out
    assert "random_labels ┃" in out


@pytest.mark.slow
def test_each_rule_is_tuned_once_at_the_first_value(base: str, overlay: Overlay, in_process: list[Any]) -> None:
    rule = overlay("zo.yaml", "ZerothOrder", num_directions=8)
    tuned = ["--tune", "model.init_args.lr=1e-6,0.1", "--vary", f"{KEY}=none,random_labels"]
    assert main(short(base, "--rules", rule, "--seeds", "0", *tuned)) == 0
    first, second = written()["conditions"]
    for once, again in zip(first["rules"], second["rules"], strict=True):
        assert [len(result["trials"]) for result in (once, again)] == [2, 0]
        assert once["chosen"] == again["chosen"]
    assert first["rules"][0]["chosen"] == {"model.init_args.lr": "0.1"}
    assert in_process[0]["values"] == {KEY: "none"}
    assert in_process[2]["values"] == {KEY: "random_labels", "model.init_args.lr": "0.1"}


@pytest.mark.slow
def test_a_rule_that_was_not_tuned_is_not_trained_later(base: str, overlay: Overlay, in_process: list[Any]) -> None:
    bad = overlay("bad.yaml", "ZerothOrder", sigma="1e-12")
    tuned = ["--tune", "model.init_args.lr=0.01,0.1", "--vary", f"{KEY}=none,gaussian"]
    assert main(short(base, "--rules", bad, "--seeds", "0", *tuned)) == 0
    first, second = (part["rules"][1] for part in written()["conditions"])
    assert "sigma" in first["error"]
    assert second["error"] == f"not tuned: {first['error']}"
    assert (first["runs"], second["runs"], len(in_process)) == ([], [], 3)


@pytest.mark.slow
def test_budgets_of_forward_passes_are_those_of_the_condition(
    base: str, overlay: Overlay, in_process: list[Any]
) -> None:
    rule = overlay("dear.yaml", "ForwardGradient", num_directions=2, chunk_size=1)
    arguments = ["--rules", rule, "--seeds", "0", "--budget", "forwards", "--out", "out", "--vary", f"{KEY}=none,paper"]
    assert main(["compare", "-c", base, *arguments]) == 0
    # 2 epochs: 8 or 12 steps of 3 forwards; the dear rule has 6
    steps = [[rule["runs"][0]["steps"] for rule in part["rules"]] for part in written()["conditions"]]
    assert steps == [[8, 4], [12, 6]]


def made(events: dict[tuple[str, str], Any]) -> Callable[..., Iterator[Any]]:
    """Stands in for the processes: the accuracy by seed of each condition and rule, or what to raise."""

    def rule_events(plan: dict[str, Any], contender: Any, budgets: Any, folder: Path) -> Iterator[Any]:
        found = events[plan["values"][KEY], contender.label]
        if isinstance(found, BaseException):
            raise found
        for seed, accuracy in found.items():
            run = {"budget": "epochs", "seed": seed, "metrics": {"test_acc": accuracy}, "forward_evals": 3}
            yield {"kind": "run", **run, "seconds": 1, "mean_cosine": None, "reused": False, "error": None}

    return rule_events


def test_what_is_known_is_written_after_every_rule(
    base: str, overlay: Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {("none", "backprop"): {0: 0.9}, ("none", "zo"): {0: 0.8}, ("paper", "backprop"): {0: 0.7}}
    events = made({**known, ("paper", "zo"): KeyboardInterrupt()})
    monkeypatch.setattr(command, "rule_events", events)
    arguments = ["--rules", overlay("zo.yaml", "ZerothOrder"), "--vary", f"{KEY}=none,paper,gaussian"]
    assert main(short(base, *arguments)) == 130
    found = written()
    assert [cell["mean"] for cell in found["summary"]["epochs"]] == [0.9, 0.8, 0.7]
    assert found["summary"]["epochs"][2]["drop"] == pytest.approx(0.2)
    figure(found)  # which can be drawn of what there is


def test_drops_are_of_seeds_with_both_results_and_of_a_loss_the_other_way() -> None:
    def part(value: str, results: dict[int, float]) -> dict[str, Any]:
        common = {"budget": "epochs", "forward_evals": 3, "seconds": 1, "mean_cosine": None, "error": None}
        runs = [{"seed": seed, "metrics": {"m": result}, **common} for seed, result in results.items()]
        return {"value": value, "rules": [{"label": "backprop", "rule": "Backprop", "runs": runs, "error": None}]}

    found = {"metric": "m", "conditions": [part("a", {0: 0.5, 1: 0.7, 2: 0.9}), part("b", {0: 0.4, 2: 0.7, 3: 0.1})]}
    for larger, sign in ((True, 1), (False, -1)):
        cell = cells({**found, "larger_is_better": larger}, "epochs")[1]
        assert cell["mean"] == pytest.approx(0.4)
        assert cell["drop"] == pytest.approx(sign * 0.15)
        assert cell["drop_ci95"] == pytest.approx(confidence([0.1, 0.2]))
    nothing = {**found, "conditions": [part("a", {0: 0.5}), part("b", {1: 0.5})], "larger_is_better": True}
    assert (cells(nothing, "epochs")[1]["drop"], cells(nothing, "epochs")[1]["drop_ci95"]) == (None, None)


def varied_results(values: list[str]) -> dict[str, Any]:
    """What comparison.json might hold; one rule has failed everywhere."""
    rules = [("backprop", 0.9, None), ("broken", None, "no slope [/here]\nat all"), ("zo", 0.8, None)]
    spread = {"forward_evals": 3, "seconds": 1.5, "peak_memory_mib": None, "mean_cosine": None, "gap": None}
    summary = [
        {"condition": value, "label": label, "mean": mean, "ci95": mean and 0.01, **spread}
        | {"drop": mean and 0.1 * place, "drop_ci95": mean and 0.02, "error": error}
        for place, value in enumerate(values)
        for label, mean, error in rules
    ]
    entries = [{"label": label, "runs": [], "error": error, "chosen": {"lr": "0.1"}} for label, _, error in rules]
    return {
        **{"command": ["bpfree", "compare"], "date": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.13.0"}},
        **{"machine": {"threads": 1}, "metric": "test_acc", "larger_is_better": True, "seeds": [0, 1, 2]},
        **{"budgets": ["epochs"], "tuning_metric": "val_acc", "tuning_seed": 1000, "grid": {"lr": ["0.1", "1"]}},
        **{"vary": {"key": KEY, "values": values}, "conditions": [{"value": v, "rules": entries} for v in values]},
        "summary": {"epochs": summary},
    }


@pytest.mark.parametrize(
    ("values", "scale", "ticks"),
    [
        (["none", "paper"], "linear", ["none", "paper"]),
        (["0", "0.2", "0.1"], "linear", None),
        (["0.001", "0.1"], "log", None),
        (["0.1", "nan"], "linear", ["0.1", "nan"]),
    ],
)
def test_the_figure_has_a_line_for_each_rule(values: list[str], scale: str, ticks: list[str] | None) -> None:
    drawing = figure(varied_results(values))
    (axes,) = drawing.axes
    assert axes.get_xscale() == scale
    assert [text.get_text() for text in drawing.legends[0].get_texts()] == ["backprop", "broken (failed)", "zo"]
    if ticks is None:
        assert list(axes.lines[0].get_xdata()) == sorted(map(float, values))
    else:
        assert [label.get_text() for label in axes.get_xticklabels()] == ticks
    low, high = axes.get_ylim()
    assert low < 0.79
    assert high > 0.91


def test_pages_show_what_a_varied_comparison_has_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages, docs = pages_in(tmp_path, monkeypatch)
    (tmp_path / "README.md").write_text("<!-- results:noise_comparison -->\n<!-- /results -->\n")
    found = varied_results(["none", "paper"])
    (docs / "results/noise_comparison.json").write_text(json.dumps(found))
    assert pages.main(["--check"]) == 1
    assert pages.main([]) == 0
    assert pages.main(["--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| rule | `none` | `paper` |" in text
    assert "| `zo` | 0.8000 ± 0.0100 | 0.8000 ± 0.0100 |" in text
    assert "| rule | `paper` |" in text
    assert "| `zo` | +0.1000 ± 0.0200 |" in text
    assert "| `broken` | failed | failed |" in text
    assert "`broken`, `paper`: no slope [/here]\n" in text
    assert "Tuned by val_acc on seed 1000, at `none` alone: `backprop`: `lr=0.1`" in text
    assert "(docs/img/noise_comparison.png)" in text
    assert (docs / "img/noise_comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("varied", "said"),
    [
        (["data.init_args.corruption"], "KEY=V1,V2"),
        (["=none,paper"], "KEY=V1,V2"),
        ([f"{KEY}=none"], "two or more values"),
        ([f"{KEY}=none,none"], "each once"),
        ([f"{KEY}=none,noise"], "noise"),
        (["data.init_args.nonsense=1,2"], "nonsense"),
        ([f"{KEY}=none,paper", "data.init_args.batch_size=1,2"], "vary one key"),
        (["model.init_args.lr=0.1,0.2"], "tuned as well"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    base: str, varied: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--vary={entry}" for entry in varied]
    assert main(short(base, "--rules", "rules/backprop", "--tune", "model.init_args.lr=0.01,0.1", *arguments)) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "corruption"),
    [
        (["=none"], Corruption()),
        (["=null"], Corruption()),
        (["=paper"], CORRUPTIONS["paper"]),
        ([".random_labels=0.2", ".seed=3"], Corruption(random_labels=0.2, seed=3)),
    ],
)
def test_a_corruption_is_one_key_by_name_or_keys_with_numbers(
    base: str, options: list[str], corruption: Corruption
) -> None:
    once = Blueprint(["-c", base, *(f"--{KEY}{option}" for option in options)])
    Path("dumped.yaml").write_text(once.dump())
    for blueprint in (once, Blueprint(["-c", "dumped.yaml"])):
        data = blueprint.build(seed=0).data
        assert isinstance(data, DigitsDataModule)
        assert data.corruption == corruption


@pytest.mark.parametrize(
    ("metric", "losses", "chosen"),
    [
        ("test_acc", {"1": 0.3, "2": 0.2, "3": 0.2, "4": 0.0}, "2"),  # 4 has less loss and is less accurate
        ("test_acc", {"1": None, "2": None, "3": 0.5, "4": 0.0}, "3"),
        ("test_acc", {}, "1"),  # the module logs no loss: the first
        ("test_f1", {"1": 0.3, "2": 0.2, "3": 0.2, "4": 0.0}, "1"),  # nothing that is named like it
    ],
)
def test_tuning_breaks_ties_by_the_loss(
    metric: str, losses: dict[str, Any], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned_by = metric.replace("test", "val")
    spec = {"grid": {"lr": ["1", "2", "3", "4"]}, "tuning_metric": tuned_by, "larger_is_better": True}
    contest = compare_worker.Contest(spec, lambda kind, **fields: None)

    def trial(values: dict[str, str]) -> dict[str, Any]:
        loss = {"val_loss": losses[values["lr"]]} if losses else {}
        return {"metrics": {tuned_by: 0.8 if values["lr"] == "4" else 0.9, **loss}}

    monkeypatch.setattr(contest, "_trial", trial)
    assert contest._tuned() == {"lr": chosen}
