"""`bpfree compare` continues where it stopped, protects earlier results, and ends with its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comparing import run_in_process, written

import lightning_bpfree
from lightning_bpfree.cli import main
from lightning_bpfree.cli.compare import worker as compare_worker
from lightning_bpfree.cli.compare.kept import KeptRuns
from lightning_bpfree.cli.compare.progress import RunsLeft, duration
from lightning_bpfree.cli.compare.runs import train

Overlay = Callable[..., str]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs rules in this process; returns the list of the seeds that are trained."""
    seeds: list[int] = []

    def counted(blueprint: Any, seed: int, *args: Any, **kwargs: Any) -> Any:
        seeds.append(seed)
        return train(blueprint, seed, *args, **kwargs)

    run_in_process(monkeypatch)
    monkeypatch.setattr(compare_worker, "train", counted)
    return seeds


def command(base: str, *more: str) -> list[str]:
    own = ["--rules", "rules/backprop", "--budget", "epochs", "--epochs", "1", "--out", "out"]
    return ["compare", "-c", base, *own, *more]


def results() -> Any:
    found = written()
    return {key: value for key, value in found.items() if key not in ("date", "command")}


def test_the_same_command_trains_nothing_again(base: str, trained: list[int], capsys: Any) -> None:
    assert main(command(base, "--seeds", "0", "1")) == 0
    before = results()
    assert trained == [0, 1]
    assert main(command(base, "--seeds", "0", "1")) == 0
    assert trained == [0, 1]
    assert results() == before
    assert capsys.readouterr().out.count("kept from before") == 2


def test_an_interrupted_comparison_continues(
    base: str, trained: list[int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def stopped(blueprint: Any, seed: int, *args: Any, **kwargs: Any) -> Any:
        if seed == 2:
            raise KeyboardInterrupt
        trained.append(seed)
        return train(blueprint, seed, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(compare_worker, "train", stopped)
        assert main(command(base, "--seeds", "0", "1", "2")) == 130
    assert "interrupted. " in capsys.readouterr().err
    assert main(command(base, "--seeds", "0", "1", "2")) == 0
    assert trained == [0, 1, 2]
    assert [run["seed"] for run in written()["rules"][0]["runs"]] == [0, 1, 2]


def test_more_seeds_continue_and_fewer_are_refused(base: str, trained: list[int], capsys: Any) -> None:
    assert main(command(base, "--seeds", "3")) == 0
    assert main(command(base, "--seeds", "3", "4")) == 0
    assert trained == [3, 4]
    before = Path("out/comparison.json").read_bytes()
    assert main(command(base, "--seeds", "4")) == 2
    assert "seeds 3 are not in this one" in capsys.readouterr().err
    assert Path("out/comparison.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--metric", "test_loss"], "--metric differs"),
        pytest.param(
            ["--model.init_args.lr=0.2"], "configuration or the grid of backprop differs", marks=pytest.mark.slow
        ),
        pytest.param(["--curve", "val_acc"], "--curve or --reach differs", marks=pytest.mark.slow),
    ],
)
def test_another_comparison_overwrites_only_if_asked(
    more: list[str], said: str, base: str, trained: list[int], capsys: Any
) -> None:
    assert main(command(base, "--seeds", "0")) == 0
    before = Path("out/comparison.json").read_bytes()
    assert main(command(base, "--seeds", "0", *more)) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "--overwrite" in message
    assert Path("out/comparison.json").read_bytes() == before
    assert main(command(base, "--seeds", "0", "--overwrite", *more)) == 0
    assert trained == [0, 0]


def test_overwrite_trains_again(base: str, trained: list[int]) -> None:
    assert main(command(base, "--seeds", "0")) == 0
    assert main(command(base, "--seeds", "0", "--overwrite")) == 0
    assert trained == [0, 0]


def test_a_comparison_without_a_result_is_in_nobodys_way(base: str, trained: list[int]) -> None:
    assert main(command(base, "--seeds", "0", "--model.init_args.lr=-1")) == 1
    assert main(command(base, "--seeds", "0")) == 0


def test_a_kept_run_is_that_of_its_configuration_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, asked = KeptRuns(tmp_path / "runs"), []

    def get(*what: Any) -> bool:
        return kept.get(lambda: asked.append(what) or {"value": 1}, *what)[1]  # type: ignore[func-returns-value]

    assert [get("a", 0), get("a", 0), get("b", 0), get("a", 1), get("a", 0)] == [False, True, False, False, True]
    monkeypatch.setattr(lightning_bpfree, "__version__", "0")
    assert not get("a", 0)
    for file in (tmp_path / "runs").iterdir():
        file.write_text("{")  # as a full disk leaves it
    assert not get("a", 0)


def test_an_error_is_not_kept(tmp_path: Path) -> None:
    def fail() -> Any:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        KeptRuns(tmp_path).get(fail, "a")
    assert not list(tmp_path.iterdir())


def test_the_time_that_is_left_is_the_mean_of_each_rules_own_runs() -> None:
    left = RunsLeft({"slow": 3, "fast": 4}, "test_acc", jobs=1)
    assert left.time_left() is None
    left.seconds = {"slow": [10.0, 20.0]}
    assert left.time_left() == pytest.approx(7 * 15)  # nothing is known of the fast one yet
    left.seconds["fast"] = [1.0]
    assert left.time_left() == pytest.approx(3 * 15 + 4 * 1)
    left.jobs = 2
    assert left.time_left() == pytest.approx((3 * 15 + 4 * 1) / 2)
    assert [duration(s) for s in (3, 200, 9000)] == ["3 s", "3 min", "2 h 30 min"]


SLEEPER = """
import os, pathlib, time
from lightning.pytorch.callbacks import Callback
class Sleeper(Callback):
    def on_train_start(self, trainer, pl_module):
        pathlib.Path("worker.pid").write_text(str(os.getpid()))
        time.sleep(120)
"""


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        (signal.SIGTERM, 143, "terminated. 0 of 1 runs are finished and kept in out. The same command continues."),
        (signal.SIGKILL, -9, ""),
    ],
)
def test_the_worker_ends_with_the_command(sent: int, code: int, said: str, base: str, overlay: Overlay) -> None:
    Path("sleeping.py").write_text(SLEEPER)
    sleeper = overlay("sleeper.yaml", "sleeping.Sleeper")
    own = ["--rules", "rules/backprop", "--seeds", "0", "--budget", "epochs", "--out", "out"]
    arguments = ["compare", "-c", base, "-c", sleeper, *own]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    start = [sys.executable, "-c", "import sys; from lightning_bpfree.cli import main; sys.exit(main())", *arguments]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for(lambda: Path("worker.pid").exists() and Path("worker.pid").read_text() != "")
    worker = int(Path("worker.pid").read_text())
    process.send_signal(sent)
    _, error = process.communicate(timeout=240)
    assert process.returncode == code
    assert "Traceback" not in error
    assert said in error
    wait_for(lambda: not alive(worker), seconds=20)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_ends_fit_in_one_line(base: str, overlay: Overlay) -> None:
    Path("sleeping.py").write_text(SLEEPER)
    arguments = ["fit", "-c", base, "-c", overlay("sleeper.yaml", "sleeping.Sleeper")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    # A shell starts its background jobs, and all processes below them, with SIGINT ignored.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "import sys; from lightning_bpfree.cli import main; sys.exit(main())"
    start = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for(lambda: Path("worker.pid").exists() and Path("worker.pid").read_text() != "")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "bpfree fit: interrupted. There is no checkpoint yet." in error


def test_the_store_holds_plain_results(base: str, trained: list[int]) -> None:
    assert main(command(base, "--seeds", "0")) == 0
    found = [json.loads(file.read_text()) for file in Path("out/runs").iterdir()]
    assert sorted("logged" in result for result in found) == [False, True]  # the training, and the profile before it
    assert all("kept" not in run for run in written()["rules"][0]["runs"])
