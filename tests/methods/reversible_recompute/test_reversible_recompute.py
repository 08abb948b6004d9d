"""`ReversibleRecompute` as a callback: what it converts, keeps, undoes, logs and refuses."""

from __future__ import annotations

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from reversible_modules import WIDTH, Encoder, Stacked, fit, loader

from lightning_bpfree import FunctionChangedWarning, ReversibleRecompute
from lightning_bpfree.methods.reversible_recompute.layer_stack import ReversibleLayers


def test_the_converted_model_is_warned_of_reported_kept_and_undone(tmp_path):
    module = Encoder().eval()
    x = torch.randn(2, 4, WIDTH)
    before, names, layers = module(x), list(module.state_dict()), module.encoder.layers
    callback = ReversibleRecompute(["encoder.layers"])
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, limit_val_batches=0,
                         limit_train_batches=0,
                         enable_progress_bar=False, enable_model_summary=False, callbacks=[callback])  # fmt: skip
    with pytest.warns(FunctionChangedWarning, match=r"CHANGES THE FUNCTION.*\nencoder.layers: 3 x torch.nn.Trans"):
        trainer.fit(module, loader(), loader())
    assert isinstance(module.encoder.layers, ReversibleLayers)
    assert list(module.state_dict()) == names
    assert [layers[i] is module.encoder.layers[i] for i in range(3)] == [True] * 3
    assert not torch.allclose(module.eval()(x), before)
    callback.undo()
    assert module.encoder.layers is layers
    assert torch.equal(module(x), before)


def test_a_second_fit_and_other_callbacks_use_what_is_there(tmp_path):
    module = Encoder()
    callback = ReversibleRecompute("encoder.layers")
    fit(module, [callback], tmp_path)
    stack = module.encoder.layers
    fit(module, [callback], tmp_path)
    assert module.encoder.layers is stack
    other = ReversibleRecompute("encoder.layers", "parallel")
    fit(module, [other], tmp_path)
    assert module.encoder.layers is stack
    assert stack.schedule == "parallel"
    other.undo()
    assert stack.schedule == "sequential"  # as the other callback found it
    assert module.encoder.layers is stack  # which converted nothing
    new = Encoder()
    fit(new, [callback], tmp_path)
    assert isinstance(new.encoder.layers, ReversibleLayers)


def test_stacks_that_are_reversible_get_the_schedule_and_keep_their_settings(tmp_path):
    module = Stacked()
    module.encoder.recomputation.store_last = 1
    callback = ReversibleRecompute(schedule="sequential")
    fit(module, [callback], tmp_path)
    assert callback.conversion is None
    assert module.encoder.schedule == "sequential"
    assert module.encoder.recomputation.store_last == 1
    callback.undo()
    assert module.encoder.schedule == "autograd"


def test_evaluation_converts_too(tmp_path):
    torch.manual_seed(0)
    module = Encoder()
    fit(module, [ReversibleRecompute("all")], tmp_path)
    twin = Encoder()
    twin.load_state_dict(module.state_dict())
    results = []
    for each in (module, twin):
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                             enable_checkpointing=False, callbacks=[ReversibleRecompute("all")])  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FunctionChangedWarning)
            results.append(trainer.validate(each, loader(), verbose=False)[0]["val_loss"])
    assert results[0] == results[1]


@pytest.mark.slow
def test_a_checkpoint_of_another_function_is_warned_of(tmp_path):
    trainer = fit(Encoder(), [ReversibleRecompute("all")], tmp_path)
    trainer.save_checkpoint(tmp_path / "mean.ckpt")
    with pytest.warns(UserWarning, match=r"fusion=None \(now 'max'\).*weights compute a different function"):
        fit(Encoder(), [ReversibleRecompute("all", fusion="max")], tmp_path, tmp_path / "mean.ckpt", max_epochs=2)


def test_cost_is_logged(tmp_path):
    torch.manual_seed(0)
    logger = CSVLogger(tmp_path)
    trainer = fit(Encoder(), [ReversibleRecompute("all", max_error=1e-3)], tmp_path, logger=logger)
    logged = trainer.logged_metrics
    assert logged["bpfree/samples_per_second"] > 0
    assert 0 < logged["bpfree/reconstruction_error"] < 1e-5  # float32
    assert math.isnan(logged.get("bpfree/peak_memory", math.nan)) or logged["bpfree/peak_memory"] > 1
    assert "schedule: sequential" in (tmp_path / "lightning_logs/version_0/hparams.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loggers_get_every_measurement(accumulate, tmp_path):
    # Eight batches an epoch and an odd interval: steps are counted over epochs, and batches are not.
    settings = {"max_epochs": 3, "accumulate_grad_batches": accumulate, "log_every_n_steps": 3}
    fit(Encoder(), [ReversibleRecompute("all")], tmp_path, logger=CSVLogger(tmp_path), **settings)
    lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("bpfree/samples_per_second")
    assert sum(bool(line.split(",")[column]) for line in lines[1:]) == 24 // accumulate // 3


def test_samples_are_counted(tmp_path, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr("lightning_bpfree.training.measurement.throughput.time.perf_counter", lambda: next(ticks))
    trainer = fit(Encoder(), [ReversibleRecompute("all")], tmp_path, logger=CSVLogger(tmp_path))
    assert float(trainer.logged_metrics["bpfree/samples_per_second"]) == 4 * 4  # four batches of four in one tick


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "fast"}, "schedule='fast'"),
        ({"buffer_every": 0}, "buffer_every=0"),
        ({"max_error": 0.0}, "max_error=0.0"),
        ({"check_every": 0}, "check_every=0"),
        ({"store_last": -1}, "store_last=-1"),
        ({"rewire": "post"}, "rewire='post'"),
        ({"scale": -1.0}, r"scale=-1\.0"),
        ({"fusion": "concat"}, "concat_linear"),
        ({"fusion": "sum"}, "fusion='sum'"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReversibleRecompute("all", **arguments)


def test_what_cannot_be_made_reversible_is_refused_in_setup(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"finds no reversible stack.*'encoder.layers'"):
        fit(Encoder(), [ReversibleRecompute()], tmp_path)
    with pytest.raises(ValueError, match=r"'encoder.layer'.*lists of layers: encoder.layers"):
        fit(Encoder(), [ReversibleRecompute(["encoder.layer"])], tmp_path)
    with pytest.raises(ValueError, match=r"post-norm.*rewire='pre_norm'"):
        fit(Encoder(norm_first=False), [ReversibleRecompute("all")], tmp_path)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         callbacks=[ReversibleRecompute("all")], max_epochs=1)  # fmt: skip
    callback = trainer.callbacks[0]
    trainer.strategy.__class__ = type("FSDPStrategy", (pl.strategies.Strategy,), {})
    with pytest.raises(MisconfigurationException, match="FSDPStrategy"):
        callback.setup(trainer, Encoder(), "fit")
