"""`bpfree compare`: backprop is always there, budgets are equal, and a failing rule takes nothing with it."""

from __future__ import annotations

import csv
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import run_in_process, written

from lightning_bpfree.cli import main
from lightning_bpfree.cli.common.configured import Blueprint
from lightning_bpfree.cli.compare import command
from lightning_bpfree.cli.compare import worker as compare_worker
from lightning_bpfree.cli.compare.results import confidence, rows, t95
from lightning_bpfree.cli.compare.runs import PROFILED_STEPS, profile, train
from lightning_bpfree.training.measurement.peak_memory import MIB, PeakMemory

Overlay = Callable[..., str]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs rules in this process; see :func:`run_in_process`."""
    return run_in_process(monkeypatch)


def results(out: str = "out") -> Any:
    found = written(out)
    return found, {rule["label"]: rule for rule in found["rules"]}


@pytest.mark.slow
def test_backprop_is_added_and_everything_is_written(
    base: str, overlay: Overlay, in_process: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    zo = overlay("zo.yaml", "ZerothOrder", num_directions=2)
    probed = overlay("probe.yaml", "GradientAlignment")
    old = overlay("old.yaml", "ForwardGradient")
    arguments = [
        "-c",
        base,
        "-c",
        old,
        "-c",
        probed,
        "--rules",
        zo,
        "--seeds",
        "0",
        "1",
        "--out",
        "out",
        "--epochs",
        "1",
    ]
    assert main(["compare", *arguments]) == 0
    found, rules = results()
    assert list(rules) == ["backprop", "zo"]
    assert found["command"] == ["bpfree", "compare", *arguments]
    assert set(found["versions"]) == {"python", "torch", "lightning", "lightning_bpfree"}
    assert rules["zo"]["rule"] == "ZerothOrder"
    assert rules["zo"]["settings"]["num_directions"] == 2
    assert [run["mean_cosine"] == pytest.approx(1) for run in rules["backprop"]["runs"]] == [True] * 4
    assert all(0 < abs(run["mean_cosine"]) < 0.9 for run in rules["zo"]["runs"])
    assert rules["backprop"]["peak_memory_mib"] is None or rules["backprop"]["peak_memory_mib"] >= 0
    accuracies = [run["metrics"]["test_acc"] for run in rules["zo"]["runs"] if run["budget"] == "epochs"]
    assert len(accuracies) == 2
    first, second = found["summary"]["epochs"]
    assert second["mean"] == pytest.approx(statistics.mean(accuracies))
    assert second["gap"] == pytest.approx(second["mean"] - first["mean"])
    assert (first["gap"], first["error"]) == (0, None)
    with Path("out/comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["budget"], line["rule"], line["seed"]) for line in lines][:2] == [
        ("epochs", "backprop", "0"),
        ("forwards", "backprop", "0"),
    ]
    assert len(lines) == 8
    assert Path("out/comparison.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "the same epochs for every rule" in out
    assert "the same forward passes" in out
    assert "±" in out


@pytest.mark.slow
def test_equal_forwards_buy_the_right_number_of_steps(base: str, overlay: Overlay, in_process: list[Any]) -> None:
    overlays = [
        overlay("cheap.yaml", "ZerothOrder", num_directions=1, scheme="forward"),  # 2 forwards a step
        overlay("same.yaml", "ZerothOrder", num_directions=1),  # 3, as many as backprop
        overlay("dear.yaml", "ForwardGradient", num_directions=2, chunk_size=1),  # 6
    ]
    assert main(["compare", "-c", base, "--rules", *overlays, "--seeds", "0", "--out", "out"]) == 0
    _, rules = results()
    steps = {
        label: {run["budget"]: (run["steps"], run["forward_evals"], run["reused"]) for run in rule["runs"]}
        for label, rule in rules.items()
    }
    # 128 samples in batches of 32, 2 epochs: 8 steps, hence 24 forwards
    assert steps["backprop"] == {"epochs": (8, 24, False), "forwards": (8, 24, True)}
    assert steps["same"] == {"epochs": (8, 24, False), "forwards": (8, 24, True)}
    assert steps["cheap"] == {"epochs": (8, 16, False), "forwards": (12, 24, False)}
    assert steps["dear"] == {"epochs": (8, 48, False), "forwards": (4, 24, False)}


def test_what_is_longer_than_the_profiled_steps_is_profiled(base: str, overlay: Overlay) -> None:
    warmup = ["--model.init_args.lr_schedule=cosine", f"--model.init_args.warmup_steps={PROFILED_STEPS + 2}"]
    layers = "--model.init_args.net.init_args.hidden=[8,8]"
    greedy = overlay("greedy.yaml", "ForwardForward", schedule="greedy")  # shares the epochs among two blocks
    profiled = profile(Blueprint(["-c", base, "-c", greedy, layers, *warmup, "--trainer.min_epochs=2"]), seed=0)
    assert profiled["rule"] == "ForwardForward"
    assert profiled["forward_evals_per_batch"] > 0


@pytest.mark.slow
def test_accumulated_batches_count_as_batches(base: str, overlay: Overlay, in_process: list[Any]) -> None:
    rule = overlay("cheap.yaml", "ZerothOrder", num_directions=1, scheme="forward")
    accumulate = ["--trainer.accumulate_grad_batches=2"]
    assert main(["compare", "-c", base, "--rules", rule, "--seeds", "0", "--out", "out", *accumulate]) == 0
    _, rules = results()
    assert [(run["steps"], run["batches"], run["forward_evals"]) for run in rules["cheap"]["runs"]] == [
        (4, 8, 16),
        (6, 12, 24),
    ]


@pytest.mark.slow
def test_forwards_alone_are_measured_by_a_few_steps(base: str, overlay: Overlay, in_process: list[Any]) -> None:
    rule = overlay("dear.yaml", "ForwardGradient", num_directions=2, chunk_size=1)
    assert main(["compare", "-c", base, "--rules", rule, "--seeds", "0", "--budget", "forwards", "--out", "out"]) == 0
    _, rules = results()
    assert [[(run["budget"], run["steps"]) for run in rule["runs"]] for rule in rules.values()] == [
        [("forwards", 8)],
        [("forwards", 4)],
    ]


@pytest.mark.slow
def test_tuning_gives_every_rule_the_same_trials_and_takes_the_best(
    base: str, overlay: Overlay, in_process: list[Any]
) -> None:
    rule = overlay("zo.yaml", "ZerothOrder", num_directions=8)
    grid = ["--tune", "model.init_args.lr=1e-6,0.1", "--tune", "data.init_args.batch_size=16,32"]
    budget = ["--budget", "epochs", "--epochs", "1", "--seeds", "0"]
    assert main(["compare", "-c", base, "--rules", rule, "--out", "out", *budget, *grid]) == 0
    found, rules = results()
    assert found["grid"] == {"model.init_args.lr": ["1e-6", "0.1"], "data.init_args.batch_size": ["16", "32"]}
    assert found["tuning_seed"] not in found["seeds"]
    for result in rules.values():
        tried = [tuple(trial["values"].values()) for trial in result["trials"]]
        assert tried == list(itertools.product(["1e-6", "0.1"], ["16", "32"]))
        best = max(result["trials"], key=lambda trial: trial["value"])
        assert result["chosen"] == best["values"]
        assert {trial["metric"] for trial in result["trials"]} == {"val_acc"}
    assert rules["backprop"]["chosen"]["model.init_args.lr"] == "0.1"


@pytest.mark.slow
def test_a_loss_is_minimised(base: str, overlay: Overlay, in_process: list[Any]) -> None:
    arguments = ["--metric", "test_loss", "--tune", "model.init_args.lr=1e-6,0.1", "--seeds", "0", "--budget", "epochs"]
    assert main(["compare", "-c", base, "--rules", "rules/backprop", "--out", "out", *arguments]) == 0
    _, rules = results()
    assert list(rules) == ["backprop"]
    assert rules["backprop"]["chosen"] == {"model.init_args.lr": "0.1"}


@pytest.mark.slow
def test_a_failing_rule_loses_nothing_of_the_others(
    base: str, overlay: Overlay, in_process: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    refused = overlay("refused.yaml", "ForwardGradient", params="'*.nothing'")
    good = overlay("good.yaml", "ZerothOrder")
    bad = overlay("bad.yaml", "ZerothOrder", sigma="1e-12")
    arguments = ["--seeds", "0", "--budget", "epochs", "--out", "out"]
    assert main(["compare", "-c", base, "--rules", bad, refused, good, *arguments]) == 0
    found, rules = results()
    assert "sigma" in rules["bad"]["error"]
    assert "nothing" in rules["refused"]["error"]
    assert [len(rule["runs"]) for rule in rules.values()] == [1, 0, 0, 1]
    assert found["summary"]["epochs"][1]["mean"] is None
    out = capsys.readouterr().out
    assert out.count("failed") == 2
    assert "sigma" in out


@pytest.mark.slow
def test_a_failing_seed_is_told_beside_the_others(
    base: str,
    overlay: Overlay,
    in_process: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def sometimes(blueprint: Any, seed: int, *args: Any, **kwargs: Any) -> Any:
        if seed == 1:
            raise RuntimeError("NaN in [/layer]")
        return train(blueprint, seed, *args, **kwargs)

    monkeypatch.setattr(compare_worker, "train", sometimes)
    arguments = ["--seeds", "0", "1", "--epochs", "1", "--out", "out"]
    assert main(["compare", "-c", base, "--rules", overlay("zo.yaml", "ZerothOrder"), *arguments]) == 0
    found, _ = results()
    for row in (row for budget in found["summary"].values() for row in budget):
        assert row["mean"] is not None
        assert row["ci95"] is None
        assert row["error"] == "seed 1: RuntimeError: NaN in [/layer]"
    assert "[/layer]" in capsys.readouterr().out  # brackets are markup to the library that prints


def test_what_is_known_is_on_disk_after_every_rule(
    base: str, overlay: Overlay, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def events(plan: dict[str, Any], contender: Any, budgets: Any, out: Path) -> Iterator[Any]:
        if contender.label == "zo":
            raise KeyboardInterrupt
        run = {"budget": "epochs", "seed": 0, "metrics": {"test_acc": 0.5}, "forward_evals": 3, "seconds": 1}
        yield {"kind": "run", **run, "mean_cosine": None, "reused": False, "error": None}

    monkeypatch.setattr(command, "rule_events", events)
    assert main(["compare", "-c", base, "--rules", overlay("zo.yaml", "ZerothOrder"), "--out", "out"]) == 130
    assert "The same command continues" in capsys.readouterr().err
    _, rules = results()
    assert rules["backprop"]["runs"][0]["metrics"] == {"test_acc": 0.5}


def test_no_result_at_all_is_a_failure(base: str, overlay: Overlay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "rule_events", lambda *_: iter([{"kind": "refused", "message": "no"}]))
    assert main(["compare", "-c", base, "--rules", overlay("zo.yaml", "ZerothOrder"), "--out", "out"]) == 1


def test_an_unknown_metric_names_the_known_ones(
    base: str, in_process: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--metric", "test_f1", "--out", "out", "--seeds", "0", "--epochs", "1"]
    assert main(["compare", "-c", base, "--rules", "rules/backprop", *arguments]) == 2
    message = capsys.readouterr().err
    assert "test_f1" in message
    assert "test_acc" in message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rules", "rules/zeroth_ordre"], "rules/zeroth_order"),
        (["--rules", "none*.yaml"], "no file matches"),
        (["--rules", "loggers/csv"], "adds none"),
        (["--rules", "rules/backprop", "--tune", "model.init_args.lr"], "KEY=V1,V2"),
        (["--rules", "rules/backprop", "--tune", "model.init_args.nonsense=1"], "nonsense"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    base: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "-c", base, "--out", "out", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_pattern_takes_its_files_and_labels_differ(base: str, overlay: Overlay, in_process: list[Any]) -> None:
    Path("more").mkdir()
    overlay("one.yaml", "Backprop")
    overlay("more/one.yaml", "Backprop", params="'net.*'")
    arguments = ["--seeds", "0", "--epochs", "1", "--budget", "epochs", "--out", "out"]
    assert main(["compare", "-c", base, "--rules", "o*.yaml", "more/*.yaml", *arguments]) == 0
    assert list(results()[1]) == ["one", "one-2"]


def test_a_folder_that_cannot_be_written_to_stops_before_any_training(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "rule_events", lambda *_: pytest.fail("training began"))
    Path("file").write_text("")
    assert main(["compare", "-c", base, "--rules", "rules/backprop", "--out", "file/out"]) == 2
    message = capsys.readouterr().err
    assert str(Path("file/out").absolute()) in message
    assert "--out" in message


def test_confidence_intervals() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 5, 15, 16, 30, 100):
        assert t95(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-3)
    values = [0.9, 0.92, 0.97]
    low, high = stats.t.interval(0.95, 2, loc=statistics.mean(values), scale=stats.sem(values))
    assert confidence(values) == pytest.approx((high - low) / 2, rel=1e-3)
    assert confidence([0.9]) is None


def test_without_backprops_result_there_is_no_gap() -> None:
    run = {"budget": "epochs", "seed": 0, "metrics": {"m": 1.0}, "forward_evals": 3, "seconds": 1, "mean_cosine": None}
    rules = [
        {"label": "backprop", "rule": "Backprop", "runs": [], "error": "refused"},
        {"label": "zo", "rule": "ZerothOrder", "runs": [{**run, "error": None}], "error": None},
    ]
    found = rows({"rules": rules, "metric": "m"}, "epochs")
    assert [(row.mean, row.gap) for row in found] == [(None, None), (1.0, None)]


def test_the_peak_of_memory_is_seen_though_it_is_gone() -> None:
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    torch.ones(64 * MIB // 4)
    assert memory.peak() == pytest.approx(64, abs=8)


@pytest.mark.slow
def test_each_rule_has_a_process_of_its_own(base: str, overlay: Overlay) -> None:
    crash = "import os, lightning_bpfree\nclass Crash(lightning_bpfree.Backprop):\n"
    Path("crashing.py").write_text(crash + "    def estimate(self, step):\n        os._exit(7)\n")
    overlays = [overlay("crash.yaml", "crashing.Crash"), overlay("zo.yaml", "ZerothOrder")]
    sys.path.insert(0, str(Path.cwd()))
    assert main(["compare", "-c", base, "--rules", *overlays, "--seeds", "0", "--epochs", "1", "--out", "out"]) == 0
    _, rules = results()
    assert "ended with code 7" in rules["crash"]["error"]
    assert len(rules["zo"]["runs"]) == 2
    assert Path("out/rules/crash.log").exists()
