"""Reports go where the logger writes, and loggers get the figure, the metrics and the settings of data and Trainer."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from shipped import shipped_rules

import lightning_bpfree as bpf
from lightning_bpfree.cli import main, metrics
from lightning_bpfree.cli.common.configured import Blueprint
from lightning_bpfree.cli.report import read_metrics
from lightning_bpfree.cli.run_files import run_folder

Overlay = Callable[..., str]


def fit(base: str, overlay: Overlay, logger: str, *more: str) -> int:
    rule = overlay("zo.yaml", "ZerothOrder", num_directions=1)
    Path("logger.yaml").write_text(f"report: true\ntrainer: {{max_epochs: 1, logger: {logger}}}\n")
    return main(["fit", "-c", base, "-c", rule, "-c", "logger.yaml", *more])


def events(folder: Path) -> Any:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = loading.EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    found.Reload()
    return found


def test_tensorboard_has_the_files_the_figure_and_the_settings(base: str, overlay: Overlay) -> None:
    pytest.importorskip("tensorboard")
    logger = "{class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: tb, name: mine}}"
    assert fit(base, overlay, logger) == 0
    folder = Path("tb/mine/version_0")
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.csv", "training.png", "checkpoints", "hparams.yaml"} <= names
    assert not Path("lightning_logs").exists()
    assert any("bpfree/loss" in row for row in read_metrics(folder / "metrics.csv"))
    found = events(folder)
    assert found.Tags()["images"] == ["training"]
    assert {"bpfree/loss", "val_acc", "test_acc"} <= set(found.Tags()["scalars"])
    settings = yaml.safe_load((folder / "hparams.yaml").read_text())["config"]
    assert settings["trainer"]["max_epochs"] == 1
    assert settings["data"]["init_args"]["train_size"] == 128
    assert settings["model"]["init_args"]["lr"] == 0.1
    assert "profiler" not in settings["trainer"], "what is None is left out"
    sessions = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"config/trainer/max_epochs" in sessions  # of the entry that TensorBoard shows
    assert b"config/data/init_args/batch_size" in sessions
    assert b"bpfree/num_directions" in sessions


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb_home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the package
def test_every_wandb_run_has_its_own_folder_with_all_files(
    base: str, overlay: Overlay, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    images: list[Any] = []
    log = wandb.sdk.wandb_run.Run.log

    def noted(self: Any, data: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        images.extend(key for key, value in data.items() if isinstance(value, list | wandb.Image))
        return log(self, data, *args, **kwargs)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", noted)
    configs: list[dict[str, Any]] = []
    finish = wandb.finish

    def finished(*args: Any, **kwargs: Any) -> None:
        configs.append(dict(wandb.run.config))
        finish(*args, **kwargs)

    monkeypatch.setattr(wandb, "finish", finished)
    logger = "{class_path: WandbLogger, init_args: {save_dir: wb, project: mine, offline: true}}"
    for rate in ("0.1", "0.2"):
        assert fit(base, overlay, logger, f"--model.init_args.lr={rate}") == 0
    runs = sorted(Path("wb/mine").iterdir(), key=lambda path: path.stat().st_mtime)
    assert len(runs) == 2, "the second run joined the first"
    for folder, rate in zip(runs, (0.1, 0.2), strict=True):
        names = {path.name for path in folder.iterdir()}
        assert {"config.yaml", "metrics.csv", "training.png", "checkpoints"} <= names
        assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["lr"] == rate
    assert not Path("lightning_logs").exists()
    assert not Path("wb/config.yaml").exists()
    assert images == ["training", "training"]
    assert [config["config"]["model"]["init_args"]["lr"] for config in configs] == [0.1, 0.2]
    assert configs[0]["config"]["data"]["init_args"]["train_size"] == 128
    assert configs[0]["config"]["trainer"]["max_epochs"] == 1
    assert configs[0]["bpfree"]["rule"] == "ZerothOrder"
    assert wandb.run is None


def test_the_folder_of_a_run_is_that_of_its_checkpoints(tmp_path: Path, base: str) -> None:
    for version in (3, "mine"):
        checkpoint = ModelCheckpoint()
        logger = CSVLogger(tmp_path, "net", version)
        built = Blueprint(["-c", base]).build()
        settings = {"enable_progress_bar": False, "log_every_n_steps": 1}
        trainer = Trainer(logger=logger, max_epochs=1, callbacks=[checkpoint], **settings)  # type: ignore[arg-type]
        trainer.fit(built.module, datamodule=built.data)
        assert Path(checkpoint.best_model_path).parent.parent == Path(run_folder(trainer))


def test_a_csv_logger_of_the_users_own_is_the_only_one(base: str) -> None:
    assert main(["fit", "-c", base, "--report=true", "--trainer.max_epochs=1"]) == 0
    assert [str(path) for path in Path().rglob("metrics.csv")] == ["runs/base/version_0/metrics.csv"]
    assert Path("runs/base/version_0/config.yaml").exists()


# --- bpfree metrics ---


def as_pattern(name: str) -> str:
    return re.sub(r"<\w+>", "*", name)


@pytest.mark.parametrize("rule", shipped_rules(), ids=lambda rule: rule.__name__)
def test_a_rule_logs_what_it_says_and_nothing_else(rule: type[bpf.TrainingRule], base: str) -> None:
    layers = "--model.init_args.net.init_args.hidden=[8,8]"
    built = Blueprint(["-c", base, layers, "--trainer.max_epochs=1"]).build(lambda _: [rule()])
    built.trainer.fit(built.module, datamodule=built.data)
    logged = {name for name in built.trainer.callback_metrics if name.startswith("bpfree/")}
    patterns = [as_pattern(name) for name in rule.logged]
    assert [name for name in logged if not any(fnmatch(name, pattern) for pattern in patterns)] == []
    elsewhere = {"bpfree/bytes_sent"}  # of ranks
    unused = {p for p in patterns if not any(fnmatch(name, p) for name in logged)} - elsewhere
    assert all("team_reinforce/" in pattern for pattern in unused), unused  # of evaluations with labels


def test_metrics_lists_one_rule_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "evolution_strategy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "EvolutionStrategy"
    assert len(lines) == 1 + len(bpf.EvolutionStrategy.logged)
    assert any("bpfree/evolution_strategy/fitness_best  smallest loss" in line for line in lines)
    assert main(["metrics"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{text}" for name in metrics.tables())
    companions = {"GradientAlignment", "LotteryTicket", "ReversibleRecompute", "ConceptBackprop", "DeepEnsemble"}
    assert companions | {rule.__name__ for rule in shipped_rules()} <= metrics.tables().keys()
