"""`bpfree federate`: its recipes, its files, an exact resume, and mistakes that are found before the first round."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
from pathlib import Path

import pytest
import torch

from lightning_bpfree.cli import main
from lightning_bpfree.cli.common import recipes
from lightning_bpfree.cli.federate.configured import configured
from lightning_bpfree.cli.federate.engines import ended_by_signal, read_rows

RECIPES = [name for name in recipes.names() if name.startswith("papers/baffle")]
SMALL = """
seed_everything: 0
model:
  class_path: lightning_bpfree.demos.modules.Classifier
  init_args:
    net:
      class_path: lightning_bpfree.demos.modules.MLP
      init_args: {in_features: 64, hidden: [8], num_classes: 10, activation: hardswish}
    optimizer: adam
data:
  class_path: lightning_bpfree.demos.data.DigitsDataModule
  init_args: {batch_size: 16, train_size: 128}
federation:
  method:
    class_path: lightning_bpfree.Baffle
    init_args: {num_directions: 3, batches: 1, chunk_size: 3}
  num_clients: 3
  ema: 0.5
rounds: 4
evaluate_every: 2
trainer:
  accelerator: cpu
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {save_dir: runs, name: base, version: 0}
"""


@pytest.fixture
def small(folder: Path) -> str:
    Path("small.yaml").write_text(SMALL)
    return "small.yaml"


def federate(*arguments: str) -> int:
    return main(["federate", *arguments])


def test_a_run_writes_its_rows_result_and_checkpoint(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert federate("-c", small, "--out", "out") == 0
    rows = read_rows(Path("out/rounds.csv"))
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    assert ["val_acc" in row for row in rows] == [False, True, False, True]
    result = json.loads(Path("out/result.json").read_text())
    assert result["engine"] == "in-process"
    assert result["federation"]["method"]["num_directions"] == 3
    assert set(result["test"]) == {"test_loss", "test_acc"}
    assert torch.load("out/federation.ckpt", weights_only=True)["server"]["round"] == 4
    logged = Path("runs/base/version_0/metrics.csv").read_text()
    for name in ("val_acc", "federation/bytes_up", "federation/forward_passes", "test/test_acc"):
        assert name in logged
    assert "test: test_acc" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"garbage", "is not a checkpoint, or is damaged"),
        (b"PK\x03\x04" + b"0" * 90, "is truncated"),
        (None, "is not a checkpoint of a federation: it has no entry federation"),
    ],
    ids=["empty", "garbage", "truncated", "other"],
)
def test_a_broken_checkpoint_is_named(
    small: str, content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").mkdir()
    if content is None:
        torch.save({"state_dict": {}}, "out/federation.ckpt")
    else:
        Path("out/federation.ckpt").write_bytes(content)
    assert federate("-c", small, "--out", "out", "--resume") == 2
    message = capsys.readouterr().err
    assert f"federation.ckpt {said}" in message
    assert "--resume: " in message


def test_an_earlier_federation_is_replaced_only_on_demand(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["-c", small, "--trainer.logger=false", "--rounds=1", "--out", "out"]
    assert federate(*command) == 0
    kept = {file.name: file.read_bytes() for file in Path("out").iterdir() if file.is_file()}
    assert federate(*command, "--federation.seed=1") == 2
    assert "holds an earlier federation. Pass --resume to continue it, --overwrite" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in Path("out").iterdir() if file.is_file()} == kept
    assert federate(*command, "--federation.seed=1", "--overwrite") == 0
    assert Path("out/federation.ckpt").read_bytes() != kept["federation.ckpt"]


def test_resume_is_exact(small: str) -> None:
    silent = ["-c", small, "--trainer.logger=false"]
    assert federate(*silent, "--out", "straight") == 0
    assert federate(*silent, "--out", "again", "--rounds=2") == 0
    assert federate(*silent, "--out", "again", "--resume") == 0
    one, two = (torch.load(f"{out}/federation.ckpt", weights_only=True)["server"] for out in ("straight", "again"))
    for name, value in one["params"].items():
        assert torch.equal(value, two["params"][name])
        assert torch.equal(one["average"][name], two["average"][name])
    straight, again = (read_rows(Path(f"{out}/rounds.csv")) for out in ("straight", "again"))
    assert [row["grad_norm"] for row in straight] == [row["grad_norm"] for row in again]


BAD = {
    "engine": (
        ["--engine", "flower"],
        "--engine: no such engine: 'flower'. Choose in-process, flower-simulation, flower-processes.",
    ),
    "sigma": (
        ["--federation.method.init_args.sigma=1e-7"],
        "Baffle: sigma=1e-07: lost in the rounding of torch.float32",
    ),
    "K": (["--federation.method.init_args.num_directions=0"], "num_directions=0: give a whole number in [1, 65536]"),
    "clients": (["--federation.num_clients=5000"], "num_clients=5000: there are 128 samples"),
    "min_clients": (["--federation.min_clients=9"], "min_clients=9: there are num_clients=3; give fewer"),
    "resume": (["--resume"], "--resume: there is no checkpoint"),
    "save every": (["--save-every", "0"], "--save-every 0: give a positive number"),
    "nodes": (["--nodes", "0"], "--nodes 0: give a positive number"),
    "norm": (["--model.init_args.net.init_args.norm=batch"], "BatchNorm in net.layers.1"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_line(name: str, small: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD[name]
    assert federate("-c", small, "--out", "out", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "bpfree federate: error: " in said
    assert not Path("out/federation.ckpt").exists()


def test_a_port_in_use(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("flwr")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert federate("-c", small, "--out", "out", "--engine", "flower-processes", "--port", port) == 2
    assert f"port={port}: in use" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_parses_and_says_how_to_run_it(name: str, folder: Path) -> None:
    first, command = recipes.find(name).read_text().splitlines()[:2]
    assert first.startswith("# ")
    words = shlex.split(command)
    assert words[:3] == ["#", "bpfree", "federate"]
    assert words[3::2] == ["-c"] * len(words[3::2])
    assert words[-1] == name
    made = configured(recipes.config_arguments(words[4::2]))
    again = Path("again.yaml")
    again.write_text(made.config)
    assert configured(["-c", "again.yaml"]).config == made.config


def test_the_overlay_for_averaging_takes_local_epochs(folder: Path) -> None:
    """BAFFLE has a `local_steps` too, whose default would be taken over."""
    made = configured(recipes.config_arguments(["papers/baffle", "papers/baffle/fedavg"]))
    assert vars(made.federation.method) == {"upload": "weights", "local_steps": None}


def test_a_polite_end_leaves_contexts() -> None:
    left = []

    def stopped() -> None:
        with ended_by_signal():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            finally:
                left.append(True)

    with pytest.raises(SystemExit):
        stopped()
    assert left == [True]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_without_flower_its_engines_name_the_extra(
    small: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_bpfree.federated.flower.needed.find_spec", lambda package: None)
    for engine in ("flower-simulation", "flower-processes"):
        assert federate("-c", small, "--out", "out", "--engine", engine) == 2
        assert 'pip install "lightning-bpfree[federated]"' in capsys.readouterr().err
