"""No mistake on the command line ends in a traceback: one line says what is wrong, where, and what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from base_files import DIGITS, MODEL
from comparing import run_in_process
from faults import CASES, READ_CONFIG, Case, write_checkpoints, write_files
from lightning.pytorch import Trainer
from ticket_problems import write_parts

from lightning_bpfree.cli import main
from lightning_bpfree.cli.common.configured import Blueprint
from lightning_bpfree.cli.common.signals import Terminated

# A result of a version that wrote no identity.
OTHER = {"command": ["bpfree", "compare"], "rules": [{"label": "backprop", "runs": [{"error": None}]}]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the cases name."""
    folder = tmp_path_factory.mktemp("faults")
    write_files(folder)
    for name, text in (("damaged", "{"), ("other", json.dumps(OTHER))):
        (folder / name).mkdir()
        (folder / name / "comparison.json").write_text(text)
    (folder / "earlier").mkdir()
    (folder / "earlier/tickets.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_parts()
        Path("base.yaml").rename("study.yaml")
        Path("base.yaml").write_text(MODEL + DIGITS)
        built = Blueprint(["-c", "base.yaml"]).build(max_epochs=1)
        built.trainer.fit(built.module, datamodule=built.data)
        built.trainer.save_checkpoint("good.ckpt")
    write_checkpoints(folder, folder / "good.ckpt")
    return folder


def line_of(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Run a command, and return the line of its error."""
    assert main(arguments) == code
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err + shown.out
    lines = [line for line in shown.err.splitlines() if re.match(r"bpfree \S+: ", line)]
    assert len(lines) == 1, shown.err
    after = shown.err.partition(lines[0])[2].strip()
    assert not after, "the error is the last line"
    return lines[0]


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else []) for case in CASES]
)
def test_a_mistake_is_one_line_with_the_cure(
    case: Case, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    run_in_process(monkeypatch)
    line = line_of(case.arguments, capsys)
    for said in case.said:
        assert said in line


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 240
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("command", READ_CONFIG)
@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_interruption_is_one_line(
    command: str,
    error: type[BaseException],
    code: int,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise error

    monkeypatch.chdir(place)
    run_in_process(monkeypatch)
    for method in ("fit", "validate", "test", "predict"):
        monkeypatch.setattr(Trainer, method, interrupt)
    more = {"compare": ["--rules", "rules/zeroth_order", "--out", "interrupted"], "tickets": ["--out", "tickets_out"]}
    config = "study.yaml" if command == "tickets" else "base.yaml"
    line = line_of([command, "-c", config, *more.get(command, [])], capsys, code)
    assert ("interrupted" if code == 130 else "terminated") in line


@pytest.mark.parametrize("command", READ_CONFIG)
def test_a_missing_package_is_named_with_its_extra(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("lightning_bpfree.cli.common.preconditions.find_spec", lambda _: None)
    more = {"compare": ["--rules", "rules/zeroth_order", "--out", "out"], "tickets": ["--out", "out"]}
    line = line_of([command, "-c", "base.yaml", *more.get(command, [])], capsys)
    assert 'pip install "lightning-bpfree[recipes]"' in line


@pytest.mark.parametrize("command", READ_CONFIG)
def test_an_unreadable_file_is_named(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(self: Path, *_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.chdir(place)
    monkeypatch.setattr(Path, "read_text", denied)  # permission bits mean nothing to root
    more = {"compare": ["--rules", "rules/zeroth_order", "--out", "out"], "tickets": ["--out", "out"]}
    line = line_of([command, "-c", "base.yaml", *more.get(command, [])], capsys)
    assert "cannot read base.yaml: Permission denied" in line


def test_a_checkpoint_of_another_network_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    other = "--model.init_args.net.init_args.hidden=[9,9]"
    line = line_of(["fit", "-c", "base.yaml", "--ckpt_path=good.ckpt", other], capsys)
    assert "the checkpoint does not fit the model: 2 parameters are missing" in line


def test_errors_of_the_users_own_step_keep_their_traceback(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    Path("own_step.py").write_text(
        "from lightning_bpfree.demos.modules import Classifier\nclass Mine(Classifier):\n"
        "    def training_step(self, batch, batch_idx):\n        raise ZeroDivisionError('a mistake of mine')\n"
    )
    net = "{class_path: lightning_bpfree.demos.modules.MLP, init_args: {in_features: 64, num_classes: 10}}"
    with pytest.raises(ZeroDivisionError, match="a mistake of mine"):
        main(["fit", "-c", "base.yaml", "--model={class_path: own_step.Mine, init_args: {net: " + net + "}}"])
    assert "error:" not in capsys.readouterr().err


def test_the_traceback_is_there_for_those_who_ask(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("BPFREE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="MLP was built for"):
        main(["fit", "-c", "base.yaml", "--model.init_args.net.init_args.in_features=3"])
