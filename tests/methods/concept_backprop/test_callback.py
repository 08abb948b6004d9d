"""The callback in a Trainer: what is logged, drawn, remembered and resumed."""

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from problems import Problem, Tied, loader

import lightning_bpfree as bpf
from lightning_bpfree.methods.concept_backprop.pictures import change_picture, detection_picture

CONCEPTS = {"first": lambda x, y: x[:, 0] > 0, "zero": lambda x, y: y == 0}
QUICK = bpf.ChangeSettings(steps=5)


class Validated(Problem):
    def validation_step(self, batch, index):
        pass


def look(**settings):
    options = {"forward": "net", "change": QUICK, "num_inputs": 4, "pictures": False}
    return bpf.ConceptBackprop(CONCEPTS, ["net.inner", "net.act"], **{**options, **settings})


def fit(callback, folder, max_epochs=2, logger=False, ckpt_path=None, **settings):
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=1,
        callbacks=[callback],
        **settings,
    )
    # no dropout: Lightning resumes without the state of the random streams
    trainer.fit(Validated(Tied(dropout=0.0)), loader(), loader(seed=1), ckpt_path=ckpt_path)
    return trainer


def test_scores_are_logged_where_all_metrics_are(tmp_path):
    trainer = fit(look(), tmp_path, logger=CSVLogger(tmp_path, name="csv"))
    names = {
        f"bpfree/concept/{c}/{layer}/{n}"
        for c in CONCEPTS
        for layer in ("net.inner", "net.act")
        for n in ("score", "control", "effect", "effect_ratio")
    }
    assert names <= trainer.callback_metrics.keys()
    header = (tmp_path / "csv/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert names <= set(header)
    assert "bpfree/concept/first/reached" in header
    assert "bpfree/concept/first/entangled_with/zero" in header


def test_the_history_is_that_of_the_epochs_and_plain(tmp_path):
    callback = look(every_n_epochs=2)
    fit(callback, tmp_path, max_epochs=5)
    assert [record["epoch"] for record in callback.history] == [0, 2, 4, 5]
    assert json.loads(json.dumps(callback.state_dict())) == callback.state_dict()
    at_end = look(every_n_epochs=None)
    fit(at_end, tmp_path, max_epochs=1)
    assert [record["epoch"] for record in at_end.history] == [1]


@pytest.mark.slow  # four seconds
def test_a_resumed_fit_has_the_history_of_an_unbroken_one(tmp_path):
    whole, first, second = look(), look(), look()
    fit(whole, tmp_path, max_epochs=4)
    fit(first, tmp_path, max_epochs=2).save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    fit(second, tmp_path, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert second.history == whole.history
    again = look()
    fit(again, tmp_path, max_epochs=2)
    fit(again, tmp_path, max_epochs=2)
    assert [record["epoch"] for record in again.history] == [0, 1, 2]  # a new fit starts a new history


def test_pictures_go_to_files_and_tensorboard(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="board")
    fit(look(pictures=True), tmp_path, logger=logger)
    logger.experiment.flush()
    written = sorted(path.name for path in (tmp_path / "concepts").iterdir())
    assert written == [f"concepts_{n}.png" for n in ("changed_first", "changed_zero", "epochs", "layers")]
    board = event_accumulator.EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    board.Reload()
    assert set(board.Tags()["images"]) == {
        f"concepts/{n}" for n in ("changed_first", "changed_zero", "epochs", "layers")
    }


def test_pictures_go_to_the_method_for_images_of_weights_and_biases(tmp_path):
    """Without a run: that images arrive at the logger's own method, by its name."""
    sent = []

    class WandbLogger(CSVLogger):
        def log_image(self, key, images, step=None):
            sent.append((key, images[0].shape[2], step))

    fit(look(pictures=True), tmp_path, logger=WandbLogger(tmp_path))
    assert {key for key, _, _ in sent} == {
        f"concepts/{n}" for n in ("changed_first", "changed_zero", "epochs", "layers")
    }
    assert {channels for _, channels, _ in sent} == {3}


@pytest.mark.slow  # wandb starts a process of its own
@pytest.mark.filterwarnings("ignore")  # of wandb
def test_pictures_are_in_the_files_of_an_offline_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    for key, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    logger = WandbLogger(project="concepts", offline=True, save_dir=tmp_path)
    try:
        fit(look(pictures=True), tmp_path, logger=logger)
        summary = dict(logger.experiment.summary)
    finally:
        wandb.finish()
    assert "bpfree/concept/first/net.act/score" in summary
    written = list(tmp_path.rglob("files/media/images/concepts/*.png"))
    stems = {path.name.rsplit("_", 2)[0] for path in written}
    assert stems == {"changed_first", "changed_zero", "epochs", "layers"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_dry_runs_and_barebones_leave_no_files(tmp_path):
    fit(look(pictures=True), tmp_path, fast_dev_run=True)
    assert not (tmp_path / "concepts").exists()


@pytest.mark.filterwarnings("ignore:.*barebones")
def test_a_trainer_without_loggers(tmp_path):
    callback = look()
    trainer = pl.Trainer(
        barebones=True, max_epochs=1, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path
    )
    trainer.fit(Validated(), loader(), loader(seed=1))
    assert callback.report.changes


def test_precision_is_that_of_the_trainer(tmp_path):
    for precision in ("64-true", "bf16-mixed"):
        callback = look()
        fit(callback, tmp_path, precision=precision)
        assert callback.report.detections["first", "net.inner"].score > 0.5


def test_pictures_have_what_they_are_to_show():
    report = look().analyze(Problem(), list(loader()))
    layers = detection_picture(report.detections)
    assert [line.get_label() for line in layers.axes[0].get_lines()][::2][:2] == ["first", "zero"]
    bars = change_picture(report.changes["first"], names=list("abcdef"))
    assert {label.get_text() for label in bars.axes[0].get_yticklabels()} == set("abcdef")
    with pytest.raises(ValueError, match="names: 2 for 6 features"):
        change_picture(report.changes["first"], names=["a", "b"])
    images = report.changes["first"]._replace(
        inputs=torch.rand(4, 1, 3, 3), reference=torch.rand(4, 1, 3, 3), changed=torch.rand(4, 1, 3, 3)
    )
    assert len(change_picture(images).axes) == 12
    tokens = torch.randint(32, 120, (4, 9))
    texts = change_picture(report.changes["first"]._replace(inputs=tokens, reference=tokens, changed=tokens))
    assert len(texts.axes[0].texts) == 4 * 2 * (9 + 1)
