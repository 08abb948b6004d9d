"""What an ensemble cannot do is said before the first batch, with the cure; after an exception nothing stays behind."""

from __future__ import annotations

import contextlib

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ensemble_problems import Small, alone, largest_difference, plain, shuffled, train
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel
from problems import fitted
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_bpfree as bpf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"members": 0}, "members=0: give a whole number of at least 1"),
        ({"members": 2.5}, "members=2.5"),
        ({"members": True}, "members=True"),
        ({"members": 2, "weights": [0.5, 0.4]}, "sum to 0.9, not to 1"),
        ({"members": 3, "weights": [0.5, 0.5]}, "2 numbers for 3 members"),
        ({"activations": ["relu", "gellu"]}, "Did you mean .*gelu"),
        ({"activations": "relu"}, "activations='relu': give a list of"),
        ({"members": 4, "activations": ["relu", "elu", "gelu"]}, "a multiple of their number"),
        ({"combine": "median"}, "combine='median': choose 'mean', 'vote' or 'stack'"),
        ({"combine": "stack", "members": 2, "weights": [0.5, 0.5]}, "fits the weights itself"),
        ({"combine": "vote", "task": "regression"}, "use combine='mean'"),
        ({"lr_factors": [1.0, -1.0], "members": 2}, r"lr_factors=\[1.0, -1.0\]: give a list of"),
        ({"lr_factors": [1.0], "members": 2}, "give 2 numbers above 0"),
        ({"initialize": "fresh"}, "initialize='fresh'"),
        ({"seed": [1, 1], "members": 2}, "2 different seeds"),
        ({"route": "vmap"}, "route='vmap'"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        bpf.DeepEnsemble(**arguments)


class Functional(Small):
    """Has no activation modules."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, x):
        return F.relu(self.net(x))


class Unreachable(Small):
    """Has parameters that nothing initializes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Identity()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, x):
        return x @ self.weight


class Lazy(Small):
    """Has a layer that waits for its first input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LazyLinear(3)


class Lbfgs(Small):
    """Needs a closure."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Elsewhere(Small):
    """Trains a tensor that is no parameter."""

    def configure_optimizers(self):
        self.free = torch.zeros(3, requires_grad=True)
        return torch.optim.SGD([*self.parameters(), self.free], 0.1)


@pytest.mark.parametrize(
    ("make", "ensemble", "more", "message"),
    [
        (ManualOptimBoringModel, {}, [], "automatic_optimization=False"),
        (Functional, {"activations": ["relu", "elu"]}, [], "contains no activation modules"),
        (Unreachable, {}, [], "has a method reset_parameters"),
        (Lazy, {}, [], "net.weight, net.bias have no shape yet"),
        (Lbfgs, {}, [], "LBFGS asks for the loss again"),
        (Elsewhere, {}, [], "no parameters of the module"),
        (Small, {}, [lambda: StochasticWeightAveraging(1e-2)], "StochasticWeightAveraging"),
        (Small, {}, [lambda: bpf.LotteryTicket("magnitude")], "LotteryTicket"),
        (Small, {}, [lambda: bpf.DirectFeedbackAlignment(learning_rates=[1.0, 0.5])], "of the first member alone"),
        (Small, {}, [bpf.ZerothOrder, bpf.GradientAlignment], "GradientAlignment"),
        (Small, {"route": "stacked"}, [bpf.ZerothOrder], "evaluates each member by itself"),
    ],
)
def test_modules_and_companions(make, ensemble, more, message):
    module = make()
    options = {"members": 2, **({} if "activations" not in ensemble else {"members": None}), **ensemble}
    callbacks = [bpf.DeepEnsemble(**options), *(build() for build in more)]
    with pytest.raises(MisconfigurationException, match=message):
        fitted(module, plain(), *callbacks)
    assert "training_step" not in module.__dict__


class Endless(IterableDataset):
    def __iter__(self):
        yield from [torch.randn(6)]


class Moved(Small):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


def test_bootstrap_needs_a_data_set_of_known_size_and_plain_transfer():
    with pytest.raises(MisconfigurationException, match="not DataLoader over Endless"):
        fitted(Small(), DataLoader(Endless()), bpf.DeepEnsemble(2, bootstrap=True))
    with pytest.raises(MisconfigurationException, match="on_after_batch_transfer of Moved"):
        fitted(Moved(), plain(), bpf.DeepEnsemble(2, bootstrap=True))


class Branching(Small):
    """Looks at a value."""

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return loss if loss > 0 else 2 * loss


class NumpyNoise(Small):
    """Draws from NumPy's stream."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]) * float(np.random.rand()), batch[1])


class Exponential(Small):
    """Draws what has no rule within vmap."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]) + torch.empty(3).exponential_(), batch[1])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Branching, "data-dependent"),
        (NumpyNoise, "NumPy's random stream"),
        (Exponential, "draws random numbers of a kind"),
    ],
)
def test_what_cannot_be_stacked_is_trained_in_turn_and_said_in_one_line(make, reason):
    ensemble = bpf.DeepEnsemble(2)
    fitted(make(), shuffled(), ensemble)
    assert "in turn (" in ensemble.route
    assert reason in ensemble.route
    assert "\n" not in ensemble.route
    with pytest.raises(MisconfigurationException, match=r"route='stacked'.*Leave route='auto'"):
        fitted(make(), shuffled(), bpf.DeepEnsemble(2, route="stacked"))


def test_convolutions_are_trained_in_turn_on_a_cpu():
    class Convolution(Small):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 6), nn.Flatten())

    ensemble = bpf.DeepEnsemble(2)
    fitted(Convolution(), shuffled(), ensemble)
    assert "convolutions and recurrent layers are slower in stacks" in ensemble.route


class Broken(Small):
    """Fails in its third step."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            raise RuntimeError("broken")


@pytest.mark.parametrize("route", ["stacked", "sequential"])
def test_nothing_stays_behind_after_an_exception_or_a_fit(route):
    for make in (Small, Broken):
        module = make()
        before = {id(part): set(part.__dict__) for part in module.modules()}
        ensemble = bpf.DeepEnsemble(activations=["relu", "elu"], route=route)
        broken = pytest.raises(RuntimeError, match="broken") if make is Broken else contextlib.nullcontext()
        with broken:
            fitted(module, shuffled(), ensemble)
        left = {
            (type(part).__name__, key)
            for part in module.modules()
            for key in set(part.__dict__) - before[id(part)]
            if not key.startswith("_")
        }
        assert not left
        for parameter in module.parameters():
            assert parameter.untyped_storage().nbytes() == parameter.nbytes, "memory of its own"
        first = ensemble.member_states()[0]
        assert all(torch.equal(first[name], value) for name, value in module.state_dict().items() if name in first)


def test_a_training_rule_below_is_undone_in_either_order():
    for order in (1, -1):
        module = Small()
        fitted(module, shuffled(), *[bpf.DeepEnsemble(2), bpf.ZerothOrder()][::order])
        assert "training_step" not in module.__dict__


class Skipping(Small):
    """Leaves out batches."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("route", ["stacked", "sequential"])
def test_a_step_that_skips_batches(route):
    ensemble = bpf.DeepEnsemble(2, route=route, seed=3)
    _, _, before, after = train(Skipping, ensemble, max_epochs=2)
    for member, (start, end) in enumerate(zip(before, after, strict=True)):
        other = alone(Skipping, start, ensemble.seeds[member], max_epochs=2)
        assert largest_difference(end, other) < 1e-5  # float32


def test_exports_need_members():
    with pytest.raises(RuntimeError, match="no members yet"):
        bpf.DeepEnsemble(2).export()


def test_pytorch_lightnings_trainer(recwarn):
    other = pytest.importorskip("pytorch_lightning")
    assert issubclass(bpf.DeepEnsemble, pl.Callback)
    trainer = other.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[bpf.DeepEnsemble(2)], log_every_n_steps=1,
    )  # fmt: skip

    class Theirs(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3)

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer.fit(Theirs(), shuffled())
    assert "train_loss" in trainer.callback_metrics
