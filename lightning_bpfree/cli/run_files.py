"""The folder of a run: its configuration, its report, and their logging."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_bpfree.cli.common.configured import WHOLE, dumped
from lightning_bpfree.training.logging_of_rules import log_settings, note_settings


def run_folder(trainer: pl.Trainer) -> str:
    """Return the folder of a run: that of its first logger on disk, where Lightning also saves the checkpoints.

    It is ``save_dir/project/run id`` for Weights & Biases, and the ``log_dir`` of TensorBoard and CSV loggers. Without
    loggers it is the Trainer's ``default_root_dir``.
    """
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger | TensorBoardLogger):
            return str(logger.log_dir)
        if logger.save_dir is not None:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            return os.path.join(str(logger.save_dir), str(logger.name), version)  # noqa: PTH118  # may be s3://...
    return trainer.default_root_dir


class RunFiles(SaveConfigCallback):
    """Writes config.yaml to the folder of the run, logs the whole configuration, and prepares the report.

    Args:
        *args: see ``SaveConfigCallback``.
        report: whether to write metrics.csv next to config.yaml.
        **kwargs: see ``SaveConfigCallback``.
    """

    def __init__(self, *args: Any, report: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})
        self.report = report

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the configuration, after loggers have created their runs."""
        note_settings(trainer, {"config": _without_none(dumped(self.parser, self.config))})
        if self.report and not any(isinstance(logger, CSVLogger) for logger in trainer.loggers):
            trainer.loggers = [*trainer.loggers, _csv_logger(trainer)]
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write config.yaml; called on rank 0."""
        folder = run_folder(trainer)
        if "://" not in folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
        path = os.path.join(folder, self.config_filename)  # noqa: PTH118  # may be s3://...
        self.parser.save(self.config, path, overwrite=self.overwrite, multifile=self.multifile, **WHOLE)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the configuration as hyperparameters; rules and companions have added their settings."""
        log_settings(trainer, pl_module, {})


def _csv_logger(trainer: pl.Trainer) -> CSVLogger:
    """Return a logger that writes metrics.csv to the folder of the run."""
    place = CSVLogger(trainer.default_root_dir) if not trainer.loggers else None
    logger = place or CSVLogger(run_folder(trainer), name="", version="")
    with warnings.catch_warnings():  # of files in this folder: they are those of the run itself
        warnings.simplefilter("ignore")
        _ = logger.experiment
    return logger


def _without_none(found: Any) -> Any:
    """Return a configuration without the entries that are None, of which a Trainer has many."""
    if isinstance(found, dict):
        return {key: _without_none(value) for key, value in found.items() if value is not None}
    return [_without_none(value) for value in found] if isinstance(found, list) else found


def upload_figure(loggers: list[Logger], name: str, path: Path) -> None:
    """Show a figure in Weights & Biases and TensorBoard.

    Args:
        loggers: loggers of the run; other kinds are skipped.
        name: name of the figure.
        path: path of the PNG file.
    """
    from matplotlib.image import imread

    for logger in loggers:
        if hasattr(logger, "log_image"):  # Weights & Biases
            logger.log_image(key=name, images=[str(path)])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, imread(path)[..., :3], dataformats="HWC")
            logger.experiment.flush()
