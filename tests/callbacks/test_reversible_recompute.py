"""`ReversibleRecompute` under what a Trainer does: the weights it leaves are those of plain autograd."""

from __future__ import annotations

import copy
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree import FunctionChangedWarning, ReversibleBlock, ReversibleRecompute, ReversibleSequential
from lightning_bpfree.nn.reversible_layers import ReversibleLayers

SCHEDULES = ("autograd", "checkpoint", "sequential", "parallel")
WIDTH = 8


class Encoder(pl.LightningModule):
    """Regression of a sum by a pre-norm transformer with dropout."""

    def __init__(self, depth: int = 3, norm_first: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        for parameter in self.encoder.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.head = nn.Linear(WIDTH, 1)
        self.losses: list[float] = []

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))

    def training_step(self, batch, batch_idx):
        loss = (self(batch[0]) - batch[1]).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Stacked(Encoder):
    """The same task, by a stack that is reversible from the start."""

    def __init__(self) -> None:
        super().__init__(depth=1)

        def branch() -> nn.Module:
            return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1))

        self.encoder = ReversibleSequential([ReversibleBlock(branch(), branch()) for _ in range(3)], "autograd")


def loader() -> DataLoader:
    x = torch.randn(32, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum((1, 2), keepdim=True)[:, 0]), batch_size=4)


def fit(module, callbacks, tmp_path, resume=None, **settings):
    """Train one epoch of eight batches, or as `settings` say."""
    trainer = pl.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=callbacks,
        **{
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "log_every_n_steps": 4,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            **settings,
        },
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FunctionChangedWarning)
        trainer.fit(module, loader(), loader(), ckpt_path=resume)
    return trainer


def trained(schedule, tmp_path, stacks="all", change=lambda module: None, double=True, **settings):
    torch.manual_seed(0)
    module = Encoder()
    module = module.double() if double else module
    change(module)
    if double:
        settings.setdefault("precision", "64-true")
    torch.manual_seed(1)
    fit(module, [ReversibleRecompute(stacks, schedule)], tmp_path, **settings)
    return module


def assert_close(left: nn.Module, right: nn.Module, tolerance: float = 1e-9) -> None:
    # Gradients differ by rounding, 1e-16; Adam divides by their size, which makes more of that in near-zero ones.
    for (name, p), q in zip(left.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def freeze_middle(module):
    for p in module.encoder.layers[1].parameters():
        p.requires_grad_(False)


def freeze_bottom(module):
    for p in module.encoder.layers[0].parameters():
        p.requires_grad_(False)


class Checkpointed(nn.Linear):
    """A layer that checkpoints itself: recomputation within recomputation."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def checkpoint_within(module):
    for layer in module.encoder.layers:
        layer.linear1.__class__ = Checkpointed


slow = pytest.mark.slow
SETTINGS = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 3},
    "clipped": {"gradient_clip_val": 0.1},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "frozen middle": {"change": freeze_middle},
    "frozen bottom": {"change": freeze_bottom},
    "nested checkpoint": {"change": checkpoint_within},
}
FAST = ("plain", "accumulated")


@pytest.mark.parametrize(
    "settings",
    [pytest.param(each, id=name, marks=() if name in FAST else slow) for name, each in SETTINGS.items()],
)
def test_weights_after_training_are_those_of_autograd(settings, tmp_path):
    plain = trained("autograd", tmp_path, **settings)
    start = Encoder().double()
    assert any(not torch.equal(p, q) for p, q in zip(plain.parameters(), start.parameters(), strict=True))
    sequential = trained("sequential", tmp_path, **settings)
    assert_close(sequential, plain)
    parallel = trained("parallel", tmp_path, **settings)
    assert all(torch.equal(p, q) for p, q in zip(parallel.parameters(), sequential.parameters(), strict=True))
    assert sequential.losses == parallel.losses


@slow
def test_mixed_precision_computes_what_autograd_does(tmp_path):
    runs = {s: trained(s, tmp_path, double=False, precision="bf16-mixed") for s in ("autograd", "sequential")}
    # The streams are float32 and branches round to bfloat16 alike, so the first loss is the same; later ones see
    # recovered inputs that are float32 rounding away, which bfloat16 mostly rounds off again.
    assert runs["sequential"].losses[0] == runs["autograd"].losses[0]
    assert runs["sequential"].losses == pytest.approx(runs["autograd"].losses, rel=1e-2)


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


@pytest.mark.parametrize(
    "schedule", ["sequential", pytest.param("parallel", marks=slow), pytest.param("checkpoint", marks=slow)]
)
def test_resuming_goes_on_bit_for_bit(schedule, tmp_path):
    def run(epochs, resume=None, save=False):
        torch.manual_seed(0)
        module = Encoder(dropout=0.0)  # random streams are Lightning's matter; the schedule keeps nothing of its own
        callback = ReversibleRecompute("all", schedule)
        trainer = fit(module, [callback], tmp_path, resume, max_epochs=epochs)
        if save:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
        return module

    whole = run(2)
    run(1, save=True)
    resumed = run(2, tmp_path / "half.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


@slow
def test_a_checkpoint_of_another_function_is_warned_of(tmp_path):
    trainer = fit(Encoder(), [ReversibleRecompute("all")], tmp_path)
    trainer.save_checkpoint(tmp_path / "mean.ckpt")
    with pytest.warns(UserWarning, match=r"fusion=None \(now 'max'\).*weights make another function"):
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


def test_samples_are_counted(tmp_path, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr("lightning_bpfree.callbacks.reversible_recompute.time.perf_counter", lambda: next(ticks))
    trainer = fit(Encoder(), [ReversibleRecompute("all")], tmp_path, logger=CSVLogger(tmp_path))
    assert float(trainer.logged_metrics["bpfree/samples_per_second"]) == 4 * 4  # four batches of four in one tick


@pytest.mark.parametrize(
    "rule", [bpf.Backprop(), bpf.ForwardGradient(2), bpf.ZerothOrder(2)], ids=lambda r: type(r).__name__
)
def test_rules_train_through_a_reversible_stack(rule, tmp_path):
    alignment = bpf.GradientAlignment(every_n_steps=4)
    module = Encoder()
    start = copy.deepcopy(module.state_dict())
    fit(module, [rule, alignment, ReversibleRecompute("all")], tmp_path)
    assert any(not torch.equal(start[name], value) for name, value in module.state_dict().items())
    if isinstance(rule, bpf.Backprop):
        assert alignment.mean_cosine == pytest.approx(1.0, abs=1e-6)  # float32


@slow
def test_lora_adapters_train_through_a_reversible_stack(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(schedule):
        torch.manual_seed(0)
        module = Encoder().double()
        config = peft.LoraConfig(r=2, target_modules=["linear1", "linear2"], lora_dropout=0.1, init_lora_weights=False)
        module.encoder = peft.get_peft_model(module.encoder, config)
        torch.manual_seed(1)
        frozen = {n: p.clone() for n, p in module.named_parameters() if not p.requires_grad}
        fit(module, [ReversibleRecompute("all", schedule)], tmp_path, precision="64-true")
        values = dict(module.named_parameters())
        assert len(frozen) > 20
        assert all(torch.equal(values[name], value) for name, value in frozen.items())
        return module

    assert_close(adapted("sequential"), adapted("autograd"))


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
