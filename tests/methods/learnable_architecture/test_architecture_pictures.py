"""The picture of the architecture: what it shows, and that it arrives in files and at loggers."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from searched_networks import Module, loader, trainer

import lightning_bpfree as bpf
from lightning_bpfree.demos.nets import MLP
from lightning_bpfree.methods.learnable_architecture.pictures import MOST_ROWS, architecture_picture

pytest.importorskip("matplotlib")


def drawn(folder, logger, **settings) -> bpf.LearnableArchitecture:
    torch.manual_seed(0)
    callback = bpf.LearnableArchitecture(0.5, ["width"], dirpath=folder / "architecture", tolerance=0.05)
    run = trainer(callback, logger=logger, log_every_n_steps=1, max_epochs=1, default_root_dir=folder, **settings)
    run.fit(Module(MLP(6, [24, 16], 3)), loader(6))
    return callback


def test_the_picture_shows_each_size_the_cost_and_where_sizes_are_fixed():
    history = [
        {"step": step, "cost": cost, "shares": {"width/a": share, "depth/b": 1.0}}
        for step, cost, share in ((0, 2.0, 1.0), (5, 1.2, 0.6), (10, 1.0, 0.5))
    ]
    figure = architecture_picture(history, fixed_at=7)
    cost, sizes = figure.axes[:2]
    assert list(cost.lines[0].get_xdata()) == [0, 5, 10]
    assert list(cost.lines[0].get_ydata()) == [2.0, 1.2, 1.0]
    assert [label.get_text() for label in sizes.get_yticklabels()] == ["width/a  0.50", "depth/b  1.00"]
    assert sizes.collections[0].get_array().tolist() == [[1.0, 0.6, 0.5], [1.0, 1.0, 1.0]]
    assert [line.get_xdata()[0] for line in sizes.lines] == [7]


def test_the_picture_of_many_sizes_says_that_it_leaves_some_out():
    shares = {f"width/{index}": 1.0 for index in range(MOST_ROWS + 1)}
    figure = architecture_picture([{"step": 0, "cost": 1.0, "shares": shares}])
    assert f"first {MOST_ROWS} sizes" in figure.axes[1].get_xlabel()
    assert len(figure.axes[1].get_yticklabels()) == MOST_ROWS


def test_the_picture_goes_to_tensorboard_and_a_file(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="board")
    drawn(tmp_path, logger)
    logger.experiment.flush()
    assert (tmp_path / "architecture/architecture.png").read_bytes().startswith(b"\x89PNG")
    board = event_accumulator.EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    board.Reload()
    assert board.Tags()["images"] == ["architecture"]


def test_the_picture_goes_to_the_method_for_images_of_weights_and_biases(tmp_path):
    """Without a run: that the image arrives at the logger's own method, by its name."""
    sent = []

    class WandbLogger(CSVLogger):
        def log_image(self, key, images, step=None):
            sent.append((key, images[0].shape[2], str(images[0].dtype), step))

    drawn(tmp_path, WandbLogger(tmp_path))
    assert sent == [("architecture", 3, "uint8", 4)]


@pytest.mark.slow  # wandb starts a process of its own
@pytest.mark.filterwarnings("ignore")  # of wandb
def test_the_picture_is_in_the_files_of_an_offline_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    for key, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    logger = WandbLogger(project="architectures", offline=True, save_dir=tmp_path)
    try:
        callback = drawn(tmp_path, logger)
        summary = dict(logger.experiment.summary)
    finally:
        wandb.finish()
    assert summary["bpfree/architecture/cost_over_budget"] == pytest.approx(callback.cost_over_budget, rel=1e-4)
    (written,) = tmp_path.rglob("files/media/images/architecture_*.png")
    assert written.read_bytes().startswith(b"\x89PNG")
