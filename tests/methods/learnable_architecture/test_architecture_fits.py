"""Whole fits: budgets met, schedulers untouched, exact resumes, rules beside, undone."""

from __future__ import annotations

import contextlib
import copy
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from searched_networks import Module, ResNet, loader, logits, search, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.demos.nets import MLP
from lightning_bpfree.functional import count_macs
from lightning_bpfree.methods.learnable_architecture import budgets as budgets_module
from lightning_bpfree.methods.learnable_architecture import callback as callback_module


def sized(seed: int = 0) -> Module:
    torch.manual_seed(seed)
    return Module(MLP(6, [24, 16], 3, norm="batch"), scheduler=True)


@pytest.mark.parametrize("budget", [0.3, 0.9])
@pytest.mark.parametrize("cost", ["macs", "params"])
def test_the_exported_network_is_within_two_percent_of_the_budget(budget, cost):
    torch.manual_seed(0)
    module = Module(ResNet(12, 16))
    callback = search(budget, ("width", "depth"), cost=cost, network="net", tolerance=0.01)
    trainer(callback, max_epochs=6).fit(module, loader(1, 8, 8))
    exported = callback.export()
    full = callback._budget.reference
    found = exported.macs if cost == "macs" else exported.params
    assert found == pytest.approx(budget * full, rel=0.02)
    assert callback.search.fixed
    x = torch.randn(5, 1, 8, 8)
    module.eval()
    with torch.no_grad():
        assert torch.allclose(module(x), exported.network(x), rtol=1e-5, atol=1e-5)


def test_a_budget_of_seconds_is_translated_and_followed(monkeypatch):
    calls = []

    def seconds(network, call, repeats=5):  # a clock that counts: 1 µs and a nanosecond for each multiply-accumulate
        calls.append(count_macs(network, *call.args, **call.kwargs))
        return 1e-6 + 1e-9 * calls[-1] * (1.0 if len(calls) < 3 else 1.1)  # slower than at the start

    monkeypatch.setattr(callback_module, "seconds", seconds)
    monkeypatch.setattr(budgets_module, "seconds", seconds)
    torch.manual_seed(0)
    callback = search(0.6, ("width",), cost="latency", tolerance=0.02)
    trainer(callback, max_epochs=6).fit(Module(MLP(6, [100, 60], 3)), loader(6))
    full = 6 * 100 + 100 * 60 + 60 * 3
    reference = 1e-6 + 1e-9 * full
    assert callback._budget.seconds == pytest.approx(0.6 * reference)
    assert callback._budget.target == pytest.approx((0.6 * reference - 1e-6) / 1e-9)
    assert callback.search.target < callback._budget.target  # what was measured since is slower
    found = 1e-6 + 1.1e-9 * callback.export().macs
    assert found == pytest.approx(0.6 * reference, rel=0.02)


def test_a_reference_network_counts_as_one():
    torch.manual_seed(0)
    callback = search(0.5, ("width",), reference=MLP(6, [12, 8], 3))
    trainer(callback, max_epochs=1).fit(sized(), loader(6))
    assert callback._budget.reference == 6 * 12 + 12 * 8 + 8 * 3


def test_the_users_optimizer_and_scheduler_are_as_without_the_callback():
    plain, searched = sized(), sized()
    trainers = trainer(max_epochs=2), trainer(search(0.5), max_epochs=2)
    for module, run in zip((plain, searched), trainers, strict=True):
        run.fit(module, loader(6))
    groups = [run.optimizers[0].param_groups for run in trainers]
    assert [len(group["params"]) for group in groups[0]] == [len(group["params"]) for group in groups[1]]
    assert groups[0][0]["lr"] == groups[1][0]["lr"]
    states = [run.lr_scheduler_configs[0].scheduler.state_dict() for run in trainers]
    assert states[0] == states[1]
    assert plain.state_dict().keys() == searched.state_dict().keys()
    plain.load_state_dict(searched.state_dict(), strict=True)


class SizesSeen(pl.Callback):
    """Notes the sizes after each batch."""

    def __init__(self, of: bpf.LearnableArchitecture) -> None:
        self.of, self.seen = of, []

    def on_train_batch_end(self, *_) -> None:
        self.seen.append([float(p.detach()) for p in self.of.search.parameters])


def test_sizes_move_by_their_own_rate_whatever_the_users_is():
    moved = {}
    for lr, users in ((0.01, 0.05), (0.001, 0.05), (0.01, 1e-9)):
        torch.manual_seed(0)
        callback = search(0.5, lr=lr, fix_at=1.0)
        notes = SizesSeen(callback)
        module = Module(MLP(6, [24, 16], 3), lr=users)
        trainer(callback, notes, max_epochs=1).fit(module, loader(6, shuffle=False))
        start = callback.architecture.axes[0].high
        moved[lr, users] = start - notes.seen[0][0]  # the first step: no momentum yet, the same weights
    assert moved[0.01, 0.05] == pytest.approx(10 * moved[0.001, 0.05], rel=1e-3)
    assert moved[0.01, 0.05] == pytest.approx(moved[0.01, 1e-9], rel=1e-6)
    assert moved[0.01, 0.05] > 0


def test_micro_batches_make_one_step_of_the_sizes():
    found = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        module = Module(MLP(6, [24, 16], 3))
        callback = search(0.5, fix_at=1.0)
        data = loader(6, batch_size=batch_size, shuffle=False)
        trainer(callback, max_epochs=1, accumulate_grad_batches=accumulate).fit(module, data)
        found.append((callback.search.steps, dict(callback.search.state_dict()["sizes"])))
    assert found[0][0] == found[1][0] == 4
    for name, size in found[0][1].items():  # the mean over micro-batches in another order, float32
        assert size == pytest.approx(found[1][1][name], rel=1e-4)


class Stop(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(trainer.default_root_dir + "/stop.ckpt")
            trainer.should_stop = True


@pytest.mark.parametrize("stop", [4, 12])  # ends of epochs, while the sizes change and when they are fixed
@pytest.mark.parametrize("kind", ["mlp", "ccnn"])
def test_a_resumed_fit_is_exact_while_sizes_change(stop, kind, tmp_path):
    shape = (6,) if kind == "mlp" else (1, 8, 8)
    budget, dims = (0.4, ("width",)) if kind == "mlp" else (0.5, None)

    def make() -> Module:
        torch.manual_seed(0)
        if kind == "mlp":
            return Module(nn.Sequential(MLP(6, [24, 16], 16), nn.Dropout(0.2), nn.Linear(16, 3)))
        return Module(bpf.CCNN((1, 8, 8), 3, width=4, blocks=1))

    def own() -> bpf.LearnableArchitecture:
        return search(budget, dims, lr=0.2, fix_at=0.6, weight=30.0)

    whole, straight = make(), own()
    torch.manual_seed(1)
    data = partial(loader, *shape)
    trainer(straight, max_epochs=4).fit(whole, data())
    assert len({h["cost"] for h in straight.search.history}) > 1  # sizes did change
    first = make()
    torch.manual_seed(1)
    with (
        pytest.warns(UserWarning, match="ended before the sizes were fixed") if stop < 10 else contextlib.nullcontext()
    ):
        trainer(own(), Stop(stop), max_epochs=4, default_root_dir=tmp_path, min_epochs=0).fit(first, data())
    second, resumed = make(), own()
    torch.manual_seed(7)
    trainer(resumed, max_epochs=4).fit(second, data(), ckpt_path=tmp_path / "stop.ckpt", weights_only=True)
    assert straight.search.state_dict()["sizes"] == resumed.search.state_dict()["sizes"]
    assert straight.sizes == resumed.sizes
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


RULES = {
    "Backprop": lambda: bpf.Backprop(),
    "ForwardGradient": lambda: bpf.ForwardGradient(2),
    "ZerothOrder": lambda: bpf.ZerothOrder(2),
}


@pytest.mark.parametrize("rule", RULES)
def test_training_rules_train_weights_and_sizes(rule):
    module = sized()
    before = copy.deepcopy(module.state_dict())
    callback = search(0.5, fix_at=1.0)
    trainer(RULES[rule](), callback, max_epochs=1).fit(module, loader(6))
    assert all(not torch.equal(before[n], v) for n, v in module.state_dict().items() if n.endswith("weight"))
    assert callback.cost_over_budget == pytest.approx(1, rel=0.02)


def test_backprop_as_a_rule_is_plain_lightning_bit_for_bit():
    ends = []
    for rules in ([], [bpf.Backprop()]):
        module = sized()
        callback = search(0.5)
        torch.manual_seed(1)
        trainer(*rules, callback, max_epochs=2).fit(module, loader(6))
        ends.append((module.state_dict(), callback.search.state_dict()["sizes"]))
    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(ends[0][0][n], v) for n, v in ends[1][0].items())


def test_undo_gives_the_full_network_back():
    module = sized()
    callback = search(0.3)
    trainer(callback, max_epochs=1).fit(module, loader(6))
    x = torch.randn(4, 6)
    module.eval()
    cropped = module(x)
    callback.undo()
    plain = sized().eval()
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(x), plain(x))
    assert not torch.equal(module(x), cropped)
    assert "configure_optimizers" not in module.__dict__
    assert not hasattr(module, "learnable_architecture")


def test_nothing_stays_patched_after_an_exception():
    class Broken(Module):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("mine")

    module = Broken(MLP(6, [8], 3))
    with pytest.raises(RuntimeError, match="mine"):
        trainer(search(0.5)).fit(module, loader(6))
    assert "configure_optimizers" not in module.__dict__


def test_evaluation_is_of_the_cropped_network(tmp_path):
    class Evaluated(Module):
        def validation_step(self, batch, batch_idx):
            self.log("out", self(batch[0]).sum())

    torch.manual_seed(0)
    module = Evaluated(MLP(6, [24, 16], 3))
    callback = search(0.3)
    run = trainer(callback, max_epochs=1)
    run.fit(module, loader(6), loader(6, shuffle=False))
    batch = next(iter(loader(6, rows=32, batch_size=32, shuffle=False)))[0]
    run.validate(module, loader(6, rows=32, batch_size=32, shuffle=False), verbose=False)
    with torch.no_grad():
        exported = callback.export().network(batch).sum()
    assert float(run.callback_metrics["out"]) == pytest.approx(float(exported), rel=1e-4)


def test_sizes_and_cost_are_logged_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    callback = bpf.LearnableArchitecture(0.5, ["width"], dirpath=tmp_path, tolerance=0.05)
    logger = pl.loggers.CSVLogger(tmp_path)
    run = trainer(callback, logger=logger, log_every_n_steps=1, max_epochs=2)
    run.fit(sized(), loader(6))
    logged = run.logged_metrics
    assert logged["bpfree/architecture/cost_over_budget"] == pytest.approx(callback.cost_over_budget, rel=1e-4)
    assert logged["bpfree/architecture/width/net.layers.0"] == callback.sizes["width/net.layers.0"]
    assert (tmp_path / "architecture.png").stat().st_size > 1000


class Adam(Module):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


@pytest.mark.slow
def test_width_shrinks_to_what_suffices():
    """A sum of absolute values of two numbers takes four hidden units; a network of 32 keeps its accuracy with few."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(512, 2, generator=generator) * 2 - 1
    y = (x.abs().sum(1) > 1).long()
    data = DataLoader(TensorDataset(x, y), 64, shuffle=True)
    pl.seed_everything(0, verbose=False)
    module = Adam(MLP(2, [32], 2), lr=0.02)
    callback = search(0.25, network="net")
    trainer(callback, max_epochs=60).fit(module, data)
    exported = callback.export()
    assert exported.macs == pytest.approx(0.25 * 32 * 4, rel=0.02)
    with torch.no_grad():
        accuracy = float((logits(exported.network(x)).argmax(1) == y).float().mean())
    assert callback.sizes == {"width/layers.0": 8}
    assert accuracy > 0.95
