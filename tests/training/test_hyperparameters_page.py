"""The page of hyperparameters shows the user's own beside those of rules and companions."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from once_problems import Once, fitted, pairs

import lightning_bpfree as bpf


class WithHyperparameters(Once):
    def __init__(self, width: int = 7, name: str = "mine") -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize("companion", [False, True], ids=["rule", "rule and tickets"])
def test_tensorboard_keeps_the_users_own_hyperparameters(companion, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    torch.manual_seed(0)
    logger = TensorBoardLogger(tmp_path, version="")
    extra = [bpf.LotteryTicket("magnitude", levels=1, dirpath=tmp_path / "tickets")] if companion else []
    fitted(WithHyperparameters(), pairs(), bpf.ZerothOrder(3), *extra, logger=logger, precision="64-true")
    events = event_accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    # One session of a run: tensorboard shows the first entry.
    content = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    shown = HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown["width"].number_value == 7
    assert shown["name"].string_value == "mine"
    assert shown["bpfree/rule"].string_value == "ZerothOrder"
    assert shown["bpfree/num_directions"].number_value == 3
