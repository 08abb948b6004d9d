"""The rule stands in for the training step in training alone: not in tuners, validation steps, callbacks."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from once_problems import RULES, Once, Seen, pairs, table
from problems import fitted
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf

SILENT = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Tuned(Once):
    def __init__(self):
        super().__init__()
        self.lr, self.batch_size = 0.1, 2
        self.net.double()

    def train_dataloader(self):
        return DataLoader(TensorDataset(*table()), batch_size=self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Watched(bpf.ForwardGradient):
    """Counts its estimates."""

    def __init__(self, **settings):
        super().__init__(2, **settings)
        self.estimates = 0

    def estimate(self, step):
        self.estimates += 1
        return super().estimate(step)


def tuner(folder, *callbacks, **settings):
    trainer = pl.Trainer(callbacks=list(callbacks), max_epochs=2, default_root_dir=folder, **SILENT | settings)
    return trainer, Tuner(trainer)


def quietly(function, *args, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tuner's own
        return function(*args, **settings)


def assert_clean(module):
    """A plain fit afterwards is a plain fit."""
    assert not {"training_step", "log", "log_dict"} & module.__dict__.keys()
    torch.manual_seed(0)
    other = Tuned()
    other.load_state_dict(module.state_dict())
    other.lr, other.batch_size = module.lr, module.batch_size
    for each in (module, other):
        quietly(fitted, each, pairs())
    assert torch.equal(module.net.weight, other.net.weight)


@pytest.mark.parametrize("rule", RULES)
def test_lr_find(rule, tmp_path):
    torch.manual_seed(0)
    module, made = Tuned(), RULES[rule]()
    before = module.net.weight.detach().clone()
    trainer, tune = tuner(tmp_path, made)
    found = quietly(tune.lr_find, module, num_training=8, early_stop_threshold=None)
    assert len(found.results["loss"]) >= 8
    assert torch.equal(module.net.weight, before)
    assert trainer.callbacks[0] is made or made in trainer.callbacks
    quietly(trainer.fit, module)  # with the rule
    assert made.record.batches > 0
    assert_clean(module)


@pytest.mark.slow  # two seconds each
@pytest.mark.parametrize("mode", ["power", "binsearch"])
@pytest.mark.parametrize("rule", ["backprop", "forward_gradient", "evolution_strategy"])
def test_scale_batch_size(rule, mode, tmp_path):
    module, made = Tuned(), RULES[rule]()
    trainer, tune = tuner(tmp_path, made)
    assert quietly(tune.scale_batch_size, module, mode=mode, steps_per_trial=1, max_trials=2) >= 2
    quietly(trainer.fit, module)
    assert_clean(module)


@pytest.mark.slow  # two seconds each
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("rule", ["backprop", "forward_gradient", "zeroth_order"])
def test_finders_among_the_callbacks(rule, first, tmp_path):
    for finder in (
        LearningRateFinder(num_training_steps=8, early_stop_threshold=None),
        BatchSizeFinder(steps_per_trial=1, max_trials=2),
    ):
        module, made = Tuned(), RULES[rule]()
        trainer, _ = tuner(tmp_path, *([finder, made] if first else [made, finder]))
        quietly(trainer.fit, module)
        assert made.record.batches > 0
        assert_clean(module)


def test_the_search_uses_the_rules_estimates(tmp_path):
    module, made = Tuned(), Watched()
    _, tune = tuner(tmp_path, made)
    quietly(tune.lr_find, module, num_training=8, early_stop_threshold=None)
    assert made.estimates >= 8


@pytest.mark.parametrize("rule", RULES)
def test_a_validation_step_that_calls_the_training_step_trains_nothing(rule):
    class Shares(Tuned):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

    def weights(limit):
        torch.manual_seed(0)
        module = Shares()
        module.lr = 0.5
        x, y = table()
        far = DataLoader(TensorDataset(100 * x, y), batch_size=4)
        trainer = pl.Trainer(
            max_epochs=2, limit_val_batches=limit, enable_checkpointing=False, callbacks=[RULES[rule]()], **SILENT
        )
        quietly(trainer.fit, module, pairs(), far)
        return module.net.weight.detach()

    assert torch.equal(weights(0), weights(4))


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end", "on_before_optimizer_step"])
@pytest.mark.parametrize("rule", RULES)
def test_callbacks_that_call_the_training_step_train_nothing(rule, hook):
    class Calls(pl.Callback):
        """Evaluates the step for itself, as probes of sharpness do."""

        def __init__(self):
            self.losses = []
            setattr(self, hook, self.call)

        def call(self, trainer, module, *_):
            with torch.no_grad():
                self.losses.append(float(module.training_step(next(iter(pairs())), 0)))

    def run(*callbacks):
        torch.manual_seed(0)
        module, made = Tuned(), RULES[rule]()
        fitted(module, pairs(), made, *callbacks)
        return module.net.weight.detach(), made.record.batches, made.record.forward_evals

    calls = Calls()
    (one, *counts), (other, *expected) = run(calls), run()
    assert torch.equal(one, other)
    assert counts == expected
    assert len(calls.losses) == 4


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_comes_too_late_is_refused(rule):
    class Late(pl.Callback):
        def on_fit_start(self, trainer, module):
            trainer.callbacks.append(RULES[rule]())

    module = Tuned()
    before = module.net.weight.detach().clone()
    with pytest.raises(MisconfigurationException, match=r"Trainer\(callbacks=\[\.\.\.\]\)"):
        fitted(module, pairs(), Late())
    assert torch.equal(module.net.weight, before)
    assert_clean(module)


@pytest.mark.parametrize("rule", RULES)
def test_a_fit_that_ends_with_an_error_leaves_a_plain_module(rule):
    class Breaks(pl.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("stop here")

    module = Tuned()
    with pytest.raises(RuntimeError, match="stop here"):
        fitted(module, pairs(), RULES[rule](), Breaks())
    assert_clean(module)


class ByHalves(Once):
    """Its step calls itself for each half of a batch."""

    def training_step(self, batch, batch_idx, whole=True):
        x, y = batch
        if not whole:
            return self.loss(x, y)
        return sum(self.training_step((x[half], y[half]), batch_idx, False) for half in (slice(0, 2), slice(2, 4))) / 2


@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_calls_itself_calls_the_modules_own(rule):
    def losses(*callbacks):
        torch.manual_seed(0)
        seen = Seen()
        fitted(ByHalves(), pairs(), *callbacks, seen, precision="64-true")
        return seen.losses

    assert losses(RULES[rule]()) == pytest.approx(losses(), rel=1e-10)  # float64
