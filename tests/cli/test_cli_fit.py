"""`bpfree fit`: overlays, the report, and errors that come before any training."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

import lightning_bpfree as bpf
from lightning_bpfree.cli import main
from lightning_bpfree.cli.common.configured import Blueprint
from lightning_bpfree.cli.report import curves, read_metrics

Overlay = Callable[..., str]
PNG = b"\x89PNG"


def plain(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.as_dict().items() if key != "config"}


@pytest.fixture
def no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: Any, **__: Any) -> None:
        pytest.fail("the Trainer was started")

    monkeypatch.setattr(Trainer, "fit", fit)


# --- configurations ---


def test_an_overlay_adds_exactly_the_rule(base: str, overlay: Overlay) -> None:
    first = overlay("first.yaml", "lightning.pytorch.callbacks.LearningRateMonitor")
    before = plain(Blueprint(["-c", base, "-c", first]).config)
    after = plain(Blueprint(["-c", base, "-c", first, "-c", overlay("zo.yaml", "ZerothOrder", sigma=0.01)]).config)
    *kept, rule = after["trainer"].pop("callbacks")
    assert kept == before["trainer"].pop("callbacks")
    assert after == before
    assert rule["class_path"].startswith("lightning_bpfree.")
    assert rule["init_args"]["sigma"] == 0.01


def test_rule_options_reach_the_rule_from_the_command_line(base: str) -> None:
    arguments = ["--trainer.callbacks+=ForwardGradient", "--trainer.callbacks.num_directions=7"]
    built = Blueprint(["-c", base, *arguments]).build()
    assert [rule.settings()["num_directions"] for rule in built.rules] == [7]


def test_the_strategy_resolves_by_its_name(base: str) -> None:
    built = Blueprint(["-c", base, "--trainer.strategy=bpfree_scalar_sync"]).build()
    assert isinstance(built.trainer.strategy, bpf.ScalarSyncStrategy)


def test_the_blueprint_builds_afresh_and_silently(
    base: str, overlay: Overlay, capfd: pytest.CaptureFixture[str]
) -> None:
    blueprint = Blueprint(["-c", base, "-c", overlay("fg.yaml", "ForwardGradient")])
    first, second = blueprint.build(), blueprint.build()
    assert first.module is not second.module
    assert all((p == q).all() for p, q in zip(first.module.parameters(), second.module.parameters(), strict=True))
    assert first.trainer.log_dir is None
    callbacks = first.trainer.callbacks  # type: ignore[attr-defined]  # set outside __init__
    assert [type(cb).__name__ for cb in callbacks] == ["ForwardGradient"]
    assert not list(Path().glob("runs*"))


# --- fit and its report ---


def test_report_shows_the_result_and_writes_its_files(
    base: str, overlay: Overlay, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = overlay("fg.yaml", "ForwardGradient", num_directions=4, chunk_size=1)
    probe = overlay("probe.yaml", "GradientAlignment")
    assert main(["fit", "-c", base, "-c", rule, "-c", probe, "--report", "true"]) == 0
    shown = capsys.readouterr().out
    for expected in ("ForwardGradient", "test_acc", "mean cosine to backprop", "forward evaluations", "seconds of fit"):
        assert expected in shown
    # 2 epochs of 4 batches, 4 dual forwards of cost 3 each, and the recorded evaluation is one of them
    assert "96" in shown.split("forward evaluations")[1].splitlines()[0]
    folder = Path("runs/base/version_0")
    assert str(folder / "metrics.csv") in shown
    assert (folder / "training.png").read_bytes().startswith(PNG)
    rows = read_metrics(folder / "metrics.csv")
    assert sum("bpfree/cosine_to_backprop" in row for row in rows) == 8
    assert set(curves(rows, "acc")) == {"train_acc", "val_acc"}
    assert curves(rows, "acc")["val_acc"][0] == [0, 1]


def test_no_report_unless_asked_for(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", base, "--trainer.max_epochs=1"]) == 0
    assert "bpfree report" not in capsys.readouterr().out
    assert not Path("runs/base/version_0/training.png").exists()


def test_a_report_brings_its_own_csv_logger_and_needs_no_rule(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("quiet.yaml").write_text("report: true\ntrainer: {logger: false, enable_checkpointing: false, max_epochs: 1}")
    assert main(["fit", "-c", base, "-c", "quiet.yaml"]) == 0
    assert "none (plain Lightning)" in capsys.readouterr().out
    assert Path("lightning_logs/version_0/training.png").exists()


def test_fast_dev_run_reports_without_files(base: str, overlay: Overlay, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-c", overlay("zo.yaml", "ZerothOrder"), "--report=true", "--trainer.fast_dev_run=true"]
    assert main(["fit", "-c", base, *arguments]) == 0
    assert "ZerothOrder" in capsys.readouterr().out
    assert not Path("runs").exists()


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists:UserWarning")  # what is tested here
def test_a_second_run_in_the_same_folder_is_no_error(base: str) -> None:
    arguments = ["fit", "-c", base, "--trainer.max_epochs=1", "--trainer.logger.init_args.version=0"]
    assert main(arguments) == 0
    assert main(arguments) == 0


def test_a_module_beside_the_user_is_found(base: str) -> None:
    Path("beside_the_user.py").write_text(
        "from torch import nn\nclass Mine(nn.Linear):\n    def forward(self, x): return super().forward(x.flatten(1))\n"
    )
    net = "{class_path: beside_the_user.Mine, init_args: {in_features: 64, out_features: 10}}"
    assert main(["fit", "-c", base, f"--model.init_args.net={net}", "--trainer.fast_dev_run=true"]) == 0


def test_validate_and_test_take_the_same_files(base: str, overlay: Overlay) -> None:
    for command in ("validate", "test"):
        assert main([command, "-c", base, "-c", overlay("fg.yaml", "ForwardGradient")]) == 0


# --- errors ---


def test_two_rules_are_refused_by_name(base: str, overlay: Overlay, capsys: pytest.CaptureFixture[str]) -> None:
    overlays = ["-c", overlay("a.yaml", "ForwardGradient"), "-c", overlay("b.yaml", "ZerothOrder")]
    assert main(["fit", "-c", base, *overlays]) == 2
    message = capsys.readouterr().err
    assert "Two training rules" in message
    assert "ForwardGradient, ZerothOrder" in message


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.init_args.lr=-1", "Classifier: lr=-1.0: give a positive number."),
        (
            "--trainer.callbacks+={class_path: ForwardGradient, init_args: {num_directions: 0}}",
            "ForwardGradient: num_directions=0: give a",
        ),
        ("--data.init_args.batch_size=0", "DigitsDataModule: batch_size=0: give"),
        ("--trainer.max_steps=-7", "`max_steps` must be"),
    ],
)
def test_arguments_out_of_range_are_one_line(
    base: str, option: str, message: str, no_fit: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", base, option]) == 2
    assert f"bpfree fit: error: {message}" in capsys.readouterr().err


def test_errors_of_the_users_own_modules_keep_their_traceback(base: str, no_fit: None) -> None:
    Path("mine_alone.py").write_text(
        "from torch import nn\nclass Mine(nn.Linear):\n    def __init__(self): raise ValueError('a mistake of mine')\n"
    )
    with pytest.raises(ValueError, match="a mistake of mine"):
        main(["fit", "-c", base, "--model.init_args.net={class_path: mine_alone.Mine}"])


def test_a_folder_that_cannot_be_written_to_is_named_before_training(
    base: str, no_fit: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("")
    assert main(["fit", "-c", base, "--trainer.logger.init_args.save_dir=file"]) == 2
    message = capsys.readouterr().err
    assert str(Path("file/base/version_0").absolute()) in message
    assert "--trainer.logger.init_args.save_dir" in message


def test_permission_denied_is_the_same_error(
    base: str, no_fit: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    assert main(["fit", "-c", base, "--trainer.logger=false", "--trainer.default_root_dir=there"]) == 2
    message = capsys.readouterr().err
    assert "Permission denied" in message
    assert "--trainer.default_root_dir=DIR" in message


def test_a_misspelt_option_is_one_line_not_a_page(
    base: str, overlay: Overlay, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("typo.yaml").write_text("trainer: {callbacks+: [{class_path: ZerothOrder, init_args: {sgima: 1}}]}")
    assert main(["fit", "-c", base, "-c", "typo.yaml"]) == 2
    message = capsys.readouterr().err
    assert "sgima" in message
    assert "usage:" not in message


def test_an_unknown_configuration_names_the_nearest_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "quikstart"]) == 2
    assert "Did you mean quickstart" in capsys.readouterr().err


def test_a_missing_optional_package_is_named_with_its_extra(
    base: str, no_fit: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_bpfree.cli.common.preconditions.find_spec", lambda name: None)
    assert main(["fit", "-c", base]) == 2
    message = capsys.readouterr().err
    assert "jsonargparse" in message
    assert 'pip install "lightning-bpfree[recipes]"' in message


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "bpfree fit -c quickstart" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert bpf.__version__ in capsys.readouterr().out
    assert main(["chek"]) == 2
    assert "Did you mean check" in capsys.readouterr().err


def test_curves_know_the_usual_names() -> None:
    rows = [
        {"epoch": 0, "step": 1, "train_acc_step": 0.1},
        {"epoch": 0, "step": 3, "train_acc_epoch": 0.2, "val/accuracy": 0.3, "val_loss": 2.0, "test_acc": 0.5},
    ]
    assert curves(rows, "acc") == {"train_acc_epoch": ([0], [0.2]), "val/accuracy": ([0], [0.3])}
    assert curves(rows, "loss") == {"val_loss": ([0], [2.0])}


@pytest.mark.slow
def test_the_quickstart_learns(folder: Path) -> None:
    command = [sys.executable, "-c", "import sys; from lightning_bpfree.cli import main; sys.exit(main())"]
    done = subprocess.run([*command, "fit", "-c", "quickstart"], capture_output=True, text=True, check=True)
    report = done.stdout.partition("bpfree report")[2]  # above it, the model summary has a test_acc too
    accuracy = next(line for line in report.splitlines() if "test_acc" in line)
    assert float(accuracy.split("│")[2]) > 0.9
    assert (folder / "runs/quickstart/version_0/training.png").exists()
