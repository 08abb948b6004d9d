"""In evaluation the user's steps see the ensemble, once; members are reported beside."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from ensemble_problems import Judged, plain, shuffled, tensors
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import fitted
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import CatMetric

import lightning_bpfree as bpf

SETTINGS = {"num_sanity_val_steps": 0}


def trained(ensemble: bpf.DeepEnsemble, make=Judged, **settings):
    torch.manual_seed(7)
    module = make()
    options = {**SETTINGS, "max_epochs": 2, **settings}
    trainer = fitted(module, shuffled(), ensemble, **options)
    return trainer, module


def fit(ensemble: bpf.DeepEnsemble, make=Judged, epochs: int = 2, **settings):
    """Fit with validation."""
    torch.manual_seed(7)
    module = make()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ensemble],
        log_every_n_steps=1,
        **{**SETTINGS, **settings},
    )
    trainer.fit(module, shuffled(), plain())
    return trainer, module


def expected(ensemble: bpf.DeepEnsemble, rows: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return members' and ensemble's probabilities, from modules that never saw the callback; and labels."""
    x, y = tensors(rows).tensors
    probabilities = []
    for state in ensemble.member_states():
        module = Judged()
        module.load_state_dict({**module.state_dict(), **state})
        module.eval()
        with torch.no_grad():
            probabilities.append(module(x).softmax(-1))
    return torch.stack(probabilities), torch.stack(probabilities).mean(0), y


@pytest.mark.parametrize("route", ["sequential", "stacked"])
def test_the_users_metrics_are_the_ensembles(route):
    ensemble = bpf.DeepEnsemble(4, route=route, seed=3)
    trainer, module = fit(ensemble)
    members, mean, y = expected(ensemble)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    nll = float(F.nll_loss(mean.log(), y))
    assert found["val_loss"] == pytest.approx(nll, rel=1e-5)  # float32
    assert found["val_acc"] == pytest.approx(float((mean.argmax(-1) == y).float().mean()), rel=1e-5)
    assert found["val/cls/NLL"] == pytest.approx(nll, rel=1e-5)
    assert found["val/cls/Acc"] == found["val_acc"]
    brier = ((mean - F.one_hot(y, 3)) ** 2).sum(-1).mean()
    assert found["val/cls/Brier"] == pytest.approx(float(brier), rel=1e-5)
    for m, own in enumerate(members):
        assert found[f"val/member_{m}/NLL"] == pytest.approx(float(F.nll_loss(own.log(), y)), rel=1e-5)
        assert found[f"val/member_{m}/Acc"] == pytest.approx(float((own.argmax(-1) == y).float().mean()), rel=1e-5)
    assert {"val/cal/ECE", "val/ens_Disagreement", "val/ens_Entropy", "val/ens_MI"} <= set(found)
    assert "forward" not in module.__dict__
    assert "forward" not in module.net.__dict__


def test_test_and_predict_see_the_ensemble_after_the_fit():
    ensemble = bpf.DeepEnsemble(3, seed=3)
    trainer, module = fit(ensemble)
    _, mean, y = expected(ensemble)
    (results,) = trainer.test(module, plain(), verbose=False)
    assert results["val_loss"] == pytest.approx(float(F.nll_loss(mean.log(), y)), rel=1e-5)  # float32
    assert results["test/cls/Acc"] == results["val_acc"]
    predictions = torch.cat(trainer.predict(module, plain()))
    assert torch.allclose(predictions, mean, rtol=1e-5, atol=1e-7)


def test_evaluation_leaves_no_trace_in_training():
    with_, without = bpf.DeepEnsemble(3, seed=3), bpf.DeepEnsemble(3, seed=3)
    fit(with_)
    fit(without, limit_val_batches=0)
    for a, b in zip(with_.member_states(), without.member_states(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("combine", ["mean", "vote", "stack"])
def test_export_computes_what_evaluation_computes(combine):
    ensemble = bpf.DeepEnsemble(3, seed=3, activations=["relu", "elu", "gelu"], combine=combine)
    trainer, module = fit(ensemble)
    exported = ensemble.export()
    x, _ = tensors(32).tensors
    with torch.no_grad():
        out = exported(x)
    predictions = torch.cat(trainer.predict(module, plain()))
    assert torch.allclose(out.softmax(-1), predictions, rtol=1e-5, atol=1e-6)  # float32
    assert [type(member.net[2]).__name__ for member in exported.members] == ["ReLU", "ELU", "GELU"]
    assert exported.uncertainty(x).shape == (32,)
    for member, state in zip(exported.members, ensemble.member_states(), strict=True):
        assert torch.equal(member.net[0].weight, state["net.0.weight"])
    again = ensemble.export()
    again.load_state_dict(exported.state_dict())


def test_stacking_weights_come_from_validation_and_serve_in_test():
    ensemble = bpf.DeepEnsemble(3, seed=3, combine="stack")
    trainer, module = fit(ensemble)
    weights = ensemble.combination.weights
    members, mean, y = expected(ensemble)
    # What the weights are fitted to is judged without them, also in the second epoch.
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(float(F.nll_loss(mean.log(), y)), rel=1e-5)
    from lightning_bpfree.functional import stacking_weights

    assert torch.allclose(torch.tensor(weights), stacking_weights(members, y), atol=1e-4)  # float32 iterations
    assert "val/stack/NLL" in trainer.callback_metrics
    (results,) = trainer.test(module, plain(), verbose=False)
    mixed = (torch.tensor(weights).view(-1, 1, 1) * members).sum(0)
    assert results["val_loss"] == pytest.approx(float(F.nll_loss(mixed.log(), y)), rel=1e-4)


def test_training_logs_the_mean_over_members():
    ensemble = bpf.DeepEnsemble(3, seed=3, route="sequential", initialize="same")
    one = bpf.DeepEnsemble(3, seed=3, route="stacked", initialize="same")
    # One epoch, for the first batch is the one on which the routes are tried.
    found = [fit(e, epochs=1, limit_val_batches=0)[0].callback_metrics for e in (ensemble, one)]
    for name in ("train_acc", "train_loss", "batch_acc"):
        assert float(found[0][name]) == pytest.approx(float(found[1][name]), rel=1e-4), name

    # Members that start alike and see the same batch without dropout log the same: the mean is one member's.
    def make():
        return Judged(dropout=0.0)

    first = fit(bpf.DeepEnsemble(3, seed=3, initialize="same"), make, limit_val_batches=0)[0].callback_metrics
    alone = fit(bpf.DeepEnsemble(1, seed=3), make, limit_val_batches=0)[0].callback_metrics
    for name in ("train_acc", "train_loss", "batch_acc"):
        assert float(first[name]) == pytest.approx(float(alone[name]), rel=1e-5), name


class Counted(Judged):
    """Keeps every label that it has seen, in a metric whose state is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = CatMetric()

    def training_step(self, batch, batch_idx):
        self.seen.update(batch[1].float())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("route", ["stacked", "sequential"])
def test_metrics_count_each_member_once(route):
    _, module = fit(bpf.DeepEnsemble(2, route=route, seed=3), Counted, epochs=1, limit_val_batches=0)
    assert module.seen.compute().numel() == 2 * 48  # also where the first batch was tried side by side


class Parts(Judged):
    """Calls its parts one after the other in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.encoder(x))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.head(self.encoder(batch[0])), batch[1]))


class Inner(Judged):
    """Calls its network rather than itself."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


class Nothing(Judged):
    """Asks no network."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (batch[0] @ self.net[0].weight.T).mean())


def test_the_network_is_found_or_named():
    ensemble = bpf.DeepEnsemble(2, seed=3)
    trainer, _ = fit(ensemble, Inner)
    _, mean, y = expected(ensemble)
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(float(F.nll_loss(mean.log(), y)), rel=1e-5)
    assert [type(member) for member in ensemble.export().members] == [nn.Sequential] * 2
    with pytest.raises(MisconfigurationException, match="'encoder' and 'head' one after the other"):
        fit(bpf.DeepEnsemble(2), Parts)
    fit(bpf.DeepEnsemble(2, network="head"), Parts)
    with pytest.raises(MisconfigurationException, match="calls no part that has parameters"):
        fit(bpf.DeepEnsemble(2), Nothing)
    with pytest.raises(MisconfigurationException, match=r"network='nett'.*Its outermost parts are: net"):
        fit(bpf.DeepEnsemble(2, network="nett"))


class Ragged(Judged):
    """Predicts as many classes as a buffer says, which members do not share."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("classes", torch.tensor(3))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch[0]).logsumexp(1).mean())

    def forward(self, x):
        return super().forward(x)[:, : int(self.classes)]


def test_members_whose_outputs_differ_in_shape_are_refused():
    def two_classes(module):
        module.classes.fill_(2)

    ensemble = bpf.DeepEnsemble(2, initialize=two_classes, route="sequential")
    with pytest.raises(ValueError, match=r"outputs differ in shape \(\(16, 3\), \(16, 2\)\)"):
        fit(ensemble, Ragged, limit_train_batches=0, num_sanity_val_steps=1)


class Values(Judged):
    """Predicts a value."""

    def __init__(self) -> None:
        super().__init__()
        self.net[4] = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]).squeeze(1), batch[0][:, 0])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self(batch[0]).squeeze(1), batch[0][:, 0]))


def test_regression():
    ensemble = bpf.DeepEnsemble(3, task="regression", targets=lambda batch: batch[0][:, 0])
    found = fit(ensemble, Values)[0].callback_metrics
    assert float(found["val/reg/MSE"]) == pytest.approx(float(found["val_loss"]), rel=1e-5)  # float32
    members = torch.stack([found[f"val/member_{m}/MSE"] for m in range(3)])
    # The ambiguity decomposition (Krogh and Vedelsby, 1995): error of the mean = mean error less variance of members.
    assert float(members.mean() - found["val/ens_Variance"]) == pytest.approx(float(found["val/reg/MSE"]), rel=1e-4)


def test_a_mapping_as_batch_and_ignored_labels():
    class Mapped(Judged):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["x"]), batch["labels"])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self(batch["x"]), batch["labels"]))

    x, y = tensors(32).tensors
    y = y.clone()
    y[:5] = -100
    data = DataLoader([{"x": a, "labels": b} for a, b in zip(x, y, strict=True)], 32)
    torch.manual_seed(7)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[bpf.DeepEnsemble(2)],
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    trainer.fit(Mapped(), data, data)
    found = trainer.callback_metrics
    assert float(found["val/cls/NLL"]) == pytest.approx(float(found["val_loss"]), rel=1e-5)
