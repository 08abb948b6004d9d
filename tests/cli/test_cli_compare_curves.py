"""`bpfree compare --curve --reach`, and grids of single rules: when a metric gets where, for equal trials."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from comparing import run_in_process, written
from result_pages import pages_in

from lightning_bpfree.cli import main
from lightning_bpfree.cli.common.configured import Blueprint
from lightning_bpfree.cli.compare import command
from lightning_bpfree.cli.compare import curves as compare_curves
from lightning_bpfree.cli.compare import worker as compare_worker
from lightning_bpfree.cli.compare.results import confidence
from lightning_bpfree.cli.compare.runs import train

Overlay = Callable[..., str]

LR = "model.init_args.lr"
SIZE = "data.init_args.batch_size"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs rules in this process; see :func:`run_in_process`."""
    return run_in_process(monkeypatch)


def short(base: str, *arguments: str) -> list[str]:
    return ["compare", "-c", base, "--out", "out", "--budget", "epochs", *arguments]


# --- curves ---


@pytest.mark.slow
def test_tuning_by_the_curve_takes_its_mean(base: str, overlay: Overlay, in_process: list[Any]) -> None:
    rule = overlay("cheap.yaml", "ZerothOrder", num_directions=1, scheme="forward")
    curve = ["--curve", "val_loss", "--tune-by", "curve", "--tune", f"{LR}=0.001,0.1"]
    assert main(short(base, "--rules", rule, "--seeds", "0", "--trainer.val_check_interval=2", *curve)) == 0
    found = written()
    assert (found["tuning_metric"], found["tuned_by"]) == ("mean val_loss", "curve")
    backprop = found["rules"][0]
    slow, fast = (trial["value"] for trial in backprop["trials"])
    assert fast < slow  # a loss: the smaller mean is chosen
    assert backprop["chosen"] == {LR: "0.1"}


@pytest.mark.parametrize(("points", "mean"), [([[2, 1.0], [4, 0.5]], 0.75), ([[2, None], [4, 0.5]], None), ([], None)])
def test_the_mean_of_a_curve_is_known_if_all_of_it_is(
    points: list[list[Any]], mean: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_worker, "train", lambda *_: {"metrics": {}, "curve": points})
    monkeypatch.setattr(compare_worker.Contest, "_blueprint", lambda *_: SimpleNamespace(dump=str))
    spec = {"tuned_by": "curve", "tuning_metric": "mean val_loss", "tuning_seed": 1, "curve": {"metric": "val_loss"}}
    trial = compare_worker.Contest(spec, lambda *_, **__: None)._trial({})
    assert trial["metrics"] == {"mean val_loss": mean}


def test_tuning_by_a_curve_needs_one(base: str, overlay: Overlay, capsys: pytest.CaptureFixture[str]) -> None:
    rule = overlay("cheap.yaml", "ZerothOrder", num_directions=1)
    assert main(short(base, "--rules", rule, "--tune-by", "curve")) == 2
    assert "--tune-by curve: name the validation metric" in capsys.readouterr().err


@pytest.mark.slow
def test_a_curve_has_every_validation_and_everything_is_written(
    base: str, overlay: Overlay, in_process: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rule = overlay("cheap.yaml", "ZerothOrder", num_directions=1, scheme="forward")  # 2 forwards a step, backprop 3
    curve = ["--curve", "val_loss", "--reach", "100", "-1", "--tune", f"{LR}=0.1"]
    arguments = ["--rules", rule, "--seeds", "0", "1", "--out", "out", "--trainer.val_check_interval=2", *curve]
    assert main(["compare", "-c", base, *arguments]) == 0
    found = written()
    assert found["curve"] == {"metric": "val_loss", "larger_is_better": False, "reach": [100, -1]}
    backprop, cheap = found["rules"]
    # 128 samples in batches of 32, 2 epochs, validated after every second batch; 8 x 3 forwards buy 12 steps of 2
    batches = {
        run["budget"]: [batches for batches, _ in run["curve"]]
        for run in cheap["runs"]
        if run["curve"][-1][1] == pytest.approx(run["metrics"]["val_loss"])  # of the last weights
    }
    assert batches == {"epochs": [2, 4, 6, 8], "forwards": [2, 4, 6, 8, 10, 12]}
    assert all("curve" not in trial for trial in cheap["trials"])
    assert backprop["runs"][0]["curve"] == backprop["runs"][1]["curve"]  # the same run, by both budgets
    for rows in found["summary"].values():
        for row in rows:
            assert row["curves"] == 2
            assert row["reach"] == [
                {"value": 100, "reached": 2, "seeds": 2, "batches": 2, "ci95": 0},
                {"value": -1, "reached": 0, "seeds": 2, "batches": None, "ci95": None},
            ]
    assert Path("out/comparison.png").read_bytes().startswith(b"\x89PNG")
    assert Path("out/comparison_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "curve" not in Path("out/comparison.csv").read_text()
    out = capsys.readouterr().out
    assert out.count("batches until val_loss <=") == 4
    assert out.count("2 ± 0 (2 of 2)") == 4
    assert out.count("not reached (0 of 2)") == 4
    assert "comparison_curves.png" in out


def test_noting_a_curve_changes_no_training(base: str, overlay: Overlay) -> None:
    blueprint = Blueprint(["-c", base, "-c", overlay("zo.yaml", "ZerothOrder", num_directions=2)])
    plain = train(blueprint, 0, ("validate", "test"))
    noted = train(blueprint, 0, ("validate", "test"), "val_acc")
    assert [batches for batches, _ in noted["curve"]] == [4, 8]
    assert noted["metrics"] == plain["metrics"]
    assert "curve" not in plain


@pytest.mark.slow
def test_validations_wider_apart_than_a_short_training_come_at_its_end(
    base: str, overlay: Overlay, in_process: list[Any]
) -> None:
    rule = overlay("dear.yaml", "ForwardGradient", num_directions=2, chunk_size=1)  # 6 forwards a step, backprop 3
    arguments = ["--rules", rule, "--seeds", "0", "--epochs", "1", "--out", "out", "--curve", "val_acc"]
    assert main(["compare", "-c", base, *arguments, "--trainer.val_check_interval=4"]) == 0
    runs = written()["rules"][1]["runs"]
    batches = {run["budget"]: [batches for batches, _ in run["curve"]] for run in runs}
    assert batches == {"epochs": [4], "forwards": [2]}


@pytest.mark.parametrize("metric", ["val_f1", "train_loss"])
def test_a_metric_that_validation_does_not_log_stops_before_the_first_trial(
    metric: str, base: str, in_process: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--rules", "rules/backprop", "--curve", metric, "--tune", f"{LR}=0.01,0.1", "--epochs", "1"]
    assert main(short(base, *arguments)) == 2
    message = capsys.readouterr().err
    assert f"--curve {metric}: the module does not log this metric in validation." in message
    assert "It logs: val_acc, val_loss." in message
    assert not Path("out/comparison.json").exists()


def noted(metric: str, rules: dict[str, list[Any]], reach: list[float], larger: bool) -> dict[str, Any]:
    """A comparison of three seeds; a rule has a curve for each, or None for one that has failed."""
    costs = {"budget": "epochs", "forward_evals": 3, "seconds": 1, "mean_cosine": None}
    results = []
    for label, curves in rules.items():
        runs = [{**costs, "seed": seed, "error": "RuntimeError: NaN"} for seed in range(3)]
        for run, curve in zip(runs, curves, strict=True):
            if curve is not None:
                run |= {"metrics": {"test_acc": 0.9}, "curve": curve, "error": None}
        results.append({"label": label, "rule": "Backprop", "runs": runs, "error": None})
    return {
        **{"command": ["bpfree", "compare"], "date": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.13.0"}},
        **{"machine": {"threads": 1}, "metric": "test_acc", "larger_is_better": True, "seeds": [0, 1, 2]},
        **{"budgets": ["epochs"], "tuning_metric": "val_acc", "tuning_seed": 1000, "rules": results},
        "curve": {"metric": metric, "larger_is_better": larger, "reach": reach},
    }


RISING = {
    "backprop": [[[1000, 0.5], [2000, 0.9]], [[1000, 0.8], [2000, 0.7]], [[1000, 0.1], [2000, 0.8]]],
    "partly": [[[1000, None], [2000, 0.8]], [[1000, 0.1], [2000, 0.1]], None],
    "early": [[[1000, 0.5]], [[1000, 0.6], [2000, 0.7]], [[1000, 0.7], [2000, 0.7]]],
    "unseen": [[], [], []],
    "failing": [None, None, None],
}


@pytest.mark.parametrize("sign", [1, -1])
def test_reaching_a_value_from_below_or_from_above(sign: int) -> None:
    rules = {
        label: [curve and [[batches, value and sign * value] for batches, value in curve] for curve in curves]
        for label, curves in RISING.items()
    }
    metric, reach = ("val_acc" if sign > 0 else "val_loss"), [sign * 0.8, sign * 0.5]
    found = noted(metric, rules, reach, larger=sign > 0)
    summary = compare_curves.summary(found)
    first = summary["epochs"][0]["reach"][0]
    assert first == {"value": sign * 0.8, "reached": 3, "seeds": 3, "batches": pytest.approx(5000 / 3)} | {
        "ci95": confidence([2000, 1000, 2000])
    }
    heads, rows = compare_curves.reach_table({**found, "summary": summary}, "epochs")
    mark = ">=" if sign > 0 else "<="
    assert heads == ["rule", *(f"batches until {metric} {mark} {value:g}" for value in reach)]
    assert rows == [
        ["backprop", "1,667 ± 1,434 (3 of 3)", "1,333 ± 1,434 (3 of 3)"],
        ["partly", "2,000 (1 of 3)", "2,000 (1 of 3)"],
        ["early", "not reached (0 of 3)", "1,000 ± 0 (3 of 3)"],
        ["unseen", "never validated", "never validated"],
        ["failing", "failed", "failed"],
    ]


def test_the_figure_has_the_mean_of_each_rule_where_all_seeds_have_a_value() -> None:
    drawing = compare_curves.figure(noted("val_acc", RISING, [0.8], larger=True))
    (axes,) = drawing.axes
    backprop, partly, early, unseen, failing, level = axes.lines
    assert backprop.get_xydata().ravel() == pytest.approx([1000, 1.4 / 3, 2000, 0.8])
    assert partly.get_xydata().ravel() == pytest.approx([2000, 0.45])
    assert early.get_xydata().ravel() == pytest.approx([1000, 0.6])
    assert [len(line.get_xydata()) for line in (unseen, failing)] == [0, 0]
    assert level.get_linestyle() == ":"
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts[:3] == ["backprop", "partly (2 of 3 seeds)", "early"]
    low, high = axes.collections[0].get_paths()[0].get_extents().get_points()[:, 1]
    assert (low, high) == pytest.approx((0.1, 0.9))  # of three seeds, the interval of the mean is their range
    thin = [segment.tolist() for segment in axes.collections[1].get_segments()]
    assert [[value for _, value in segment] for segment in thin] == [[0.5, 0.9], [0.8, 0.7], [0.1, 0.8]]
    many = noted("val_acc", {f"rule{number}": RISING["backprop"] for number in range(16)}, [], larger=True)
    lines = compare_curves.figure(many).axes[0].lines
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 16


# --- grids of single rules ---


@pytest.mark.slow
def test_a_rule_with_a_grid_of_its_own_has_no_other(base: str, overlay: Overlay, in_process: list[Any]) -> None:
    tuned = [f"--tune=zo:{LR}=0.2", f"--tune={LR}=0.1,1e-6", f"--tune=zo:{SIZE}=16,32"]
    few = ["--seeds", "0", "--epochs", "1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    assert main(short(base, "--rules", overlay("zo.yaml", "ZerothOrder"), *tuned, *few)) == 0
    found = written()
    assert found["grid"] == {LR: ["0.1", "1e-6"]}
    assert found["grids"] == {"backprop": found["grid"], "zo": {LR: ["0.2"], SIZE: ["16", "32"]}}
    assert found["trials"] == {"backprop": 2, "zo": 2}
    tried = [[trial["values"] for trial in rule["trials"]] for rule in found["rules"]]
    assert tried == [[{LR: "0.1"}, {LR: "1e-6"}], [{LR: "0.2", SIZE: "16"}, {LR: "0.2", SIZE: "32"}]]
    assert all(rule["chosen"] in values for rule, values in zip(found["rules"], tried, strict=True))


def test_grids_of_single_rules_are_searched_at_the_first_value_alone(
    base: str, overlay: Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def events(plan: dict[str, Any], contender: Any, budgets: Any, folder: Path) -> Iterator[Any]:
        told.append((contender.label, plan["grid"], plan["values"]))
        if plan["grid"]:
            yield {"kind": "chosen", "values": {key: values[0] for key, values in plan["grid"].items()}}

    monkeypatch.setattr(command, "rule_events", events)
    varied = ["--vary", f"{SIZE}=16,32", "--tune", f"zo:{LR}=0.1,0.2"]
    main(short(base, "--rules", overlay("zo.yaml", "ZerothOrder"), *varied))
    first, second = ({SIZE: size} for size in ("16", "32"))
    assert told == [
        ("backprop", {}, first),
        ("zo", {LR: ["0.1", "0.2"]}, first),
        ("backprop", {}, second),
        ("zo", {}, {**second, LR: "0.1"}),
    ]
    assert written()["trials"] == {"backprop": 0, "zo": 2}


def test_runs_are_counted_by_rule() -> None:
    plan = {"trials": {"backprop": 3, "zo": 6}, "seeds": [0, 1], "budgets": ["epochs", "forwards"]}
    part = command.Part(plan, {}, Path(), "")
    assert [part.runs(label) for label in plan["trials"]] == [7, 10]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--reach", "0.5"], "such as --curve val_acc"),
        (["--curve", "val_acc", "--reach", "nan"], "finite"),
        (["--curve", "val_acc", "--vary", f"{SIZE}=16,32"], f"--{SIZE}=VALUE"),
        (["--tune", f"zo:{LR}=0.1"], "no rule has the label 'zo'; labels are backprop."),
        (["--tune", f"backprop:{LR}"], f"--tune backprop:{LR}: give KEY=V1,V2"),
        (["--tune", "backprop:model.init_args.nonsense=1:2"], "nonsense"),
        (["--tune", f"backprop:{SIZE}=16", "--vary", f"{SIZE}=16,32"], "tuned as well"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    base: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(short(base, "--rules", "rules/backprop", *arguments)) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


# --- pages ---


def test_pages_show_what_curves_reach_and_how_rules_were_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages, docs = pages_in(tmp_path, monkeypatch)
    (tmp_path / "README.md").write_text("<!-- results:reward_comparison -->\n<!-- /results -->\n")
    found = noted("val_acc", {label: RISING[label] for label in ("backprop", "partly", "early")}, [0.8], larger=True)
    plain, own = {LR: ["0.1", "0.2"]}, {LR: ["0.1"], SIZE: ["16", "32"]}
    found |= {"grids": {"backprop": plain, "partly": own, "early": plain}}

    def page(trials: dict[str, int]) -> str:
        found["trials"] = trials
        made = {**found, "summary": compare_curves.summary(found)}
        (docs / "results/reward_comparison.json").write_text(json.dumps(made))
        assert pages.main(["--check"]) == 1
        assert pages.main([]) == 0
        assert pages.main(["--check"]) == 0
        return (tmp_path / "README.md").read_text()

    text = page({"backprop": 2, "partly": 2, "early": 2})
    assert "| rule | batches until val_acc >= 0.8 |" in text
    assert "| `backprop` | 1,667 ± 1,434 (3 of 3) |" in text
    assert "| `early` | not reached (0 of 3) |" in text
    assert "(docs/img/reward_comparison_curves.png)" in text
    assert f"2 trials each:\n\n- `backprop`, `early`: `{LR}` in 0.1, 0.2\n- `partly`: `{LR}` in 0.1; `{SIZE}`" in text
    drawn = [(docs / f"img/reward_comparison{end}.png").read_bytes() for end in ("", "_curves")]
    assert all(figure.startswith(b"\x89PNG") for figure in drawn)
    assert drawn[0] != drawn[1]
    text = page({"backprop": 2, "partly": 4, "early": 2})
    assert "Not the same number of trials for all:\n\n- `backprop`, `early` (2 trials): " in text
