"""What a network trained by Forward-Forward returns, and the module's own steps."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from forward_forward_problems import by_hand, gradients, next_label, problem
from lightning.pytorch.callbacks import ModelCheckpoint
from problems import Problem, fitted, loader

import lightning_bpfree as bpf
from lightning_bpfree.demos.nets import MLP
from lightning_bpfree.methods.forward_forward.goodness import goodness, rescaled
from lightning_bpfree.methods.forward_forward.negatives import overlaid


def scores_by_hand(module, x):
    columns = []
    for label in range(3):
        z, total = overlaid(x, torch.full((len(x),), label), 3), 0
        for start in range(0, 6, 2):
            z = module.net.layers[start : start + 2](rescaled(z))
            total = total + goodness(z)
        columns.append(total)
    return torch.stack(columns, 1)


def test_the_network_returns_the_goodness_of_every_label_during_and_after_fit():
    module, seen = problem(lr=0.01), []

    class Looks(pl.Callback):
        def on_validation_epoch_end(self, trainer, module):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
            seen.append((module.net(x), scores_by_hand(module, x)))

    module.validation_step = lambda batch, batch_idx: None
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=2, enable_checkpointing=False, callbacks=[bpf.ForwardForward(), Looks()], **options)
    trainer.fit(module, loader(), loader())
    x = torch.randn(4, 6)
    seen.append((module.net(x), scores_by_hand(module, x)))
    for found, expected in seen:
        # One batch of all labels, or one label after the other: another order of float32 sums.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_first_blocks_may_be_left_out_of_the_score():
    module = problem()
    rule = bpf.ForwardForward(first_block=1)
    rule.install(module)
    x = torch.randn(4, 6)
    whole = scores_by_hand(module, x)
    first = torch.stack(
        [goodness(module.net.layers[:2](rescaled(overlaid(x, torch.full((4,), label), 3)))) for label in range(3)],
        1,
    )
    torch.testing.assert_close(module.net(x), whole - first, rtol=1e-5, atol=1e-5)


def test_large_batches_are_scored_in_parts(monkeypatch):
    module = problem()
    rule = bpf.ForwardForward()
    rule.install(module)
    x = torch.randn(10, 6)
    whole = module.net(x)
    monkeypatch.setattr("lightning_bpfree.methods.forward_forward.network.ROWS_AT_ONCE", 10)
    torch.testing.assert_close(module.net(x), whole, rtol=1e-5, atol=1e-5)


def test_in_training_the_scores_are_of_the_two_labels_that_were_tried():
    seen = []

    class Looks(Problem):
        def training_step(self, batch, index):
            seen.append((self.net(batch[0]), batch[1]))
            return F.cross_entropy(*seen[-1])

    torch.manual_seed(0)
    module = Looks(MLP(6, [8, 8], 3), lr=0.0)
    rule = bpf.ForwardForward(negatives=next_label)
    fitted(module, loader(rows=16), rule)
    scores, y = seen[0]
    every = module.net(next(iter(loader(rows=16)))[0])
    rows = torch.arange(16)
    torch.testing.assert_close(scores[rows, y], every[rows, y], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores[rows, (y + 1) % 3], every[rows, (y + 1) % 3], rtol=1e-5, atol=1e-5)
    assert not scores[rows, (y + 2) % 3].any()


def test_the_readout_learns_from_the_modules_loss_alone():
    module = problem()
    found = gradients(bpf.ForwardForward(prediction="readout", negatives=next_label), module)
    x, y = next(iter(loader(rows=16)))
    z = overlaid(x, None, 3)
    for start in range(0, 6, 2):
        z = module.net.layers[start : start + 2](rescaled(z)).detach()
    head = module.net.layers[6]
    expected = torch.autograd.grad(F.cross_entropy(head(rescaled(z)), y), list(head.parameters()))
    torch.testing.assert_close(found["net.layers.6.weight"], expected[0], rtol=1e-5, atol=1e-7)
    for name, gradient in by_hand(module, [1, 1, 1]).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)  # the blocks do not notice


def test_a_last_layer_that_is_not_used_is_left_alone():
    module = problem(lr=0.1, optimizer="adamw")
    before = module.net.layers[6].weight.clone()
    fitted(module, loader(), bpf.ForwardForward())
    assert torch.equal(module.net.layers[6].weight, before)


@pytest.mark.parametrize("label", ["overlay", "embedding"])
def test_a_checkpoint_predicts_again_by_install(label, tmp_path):
    torch.manual_seed(0)
    module, rule = problem(lr=0.05), bpf.ForwardForward(label=label)
    saves = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
    fitted(module, loader(), rule, saves, enable_checkpointing=True, max_epochs=2, default_root_dir=str(tmp_path))
    x = torch.randn(4, 6)
    expected = module.net(x)

    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    plain = problem()
    plain.load_state_dict(saved["state_dict"], strict=True)
    assert not torch.equal(plain.net(x), expected)  # the raw network does not know
    again = bpf.ForwardForward(label=label)
    again.load_state_dict(saved["callbacks"][again.state_key])
    again.install(plain)
    assert torch.equal(plain.net(x), expected)
    again.uninstall()
    assert "forward" not in plain.net.__dict__


def test_testing_alone_predicts_as_the_fit_did(tmp_path):
    class Tests(Problem):
        def test_step(self, batch, index):
            self.log("test_score", self.net(batch[0]).sum())

    def trainer(*callbacks):
        options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return pl.Trainer(max_epochs=1, default_root_dir=str(tmp_path), callbacks=list(callbacks), **options)

    torch.manual_seed(0)
    module = Tests(MLP(6, [8, 8], 3), lr=0.05)
    first = trainer(bpf.ForwardForward(label="embedding"))
    first.fit(module, loader())
    (here,) = first.test(module, loader(), verbose=False)
    first.save_checkpoint(tmp_path / "it.ckpt")
    fresh = Tests(MLP(6, [8, 8], 3))
    (there,) = trainer(bpf.ForwardForward(label="embedding")).test(
        fresh, loader(), ckpt_path=str(tmp_path / "it.ckpt"), verbose=False
    )
    assert here == there


def test_a_fitted_module_can_be_copied_and_pickled():
    module = problem(lr=0.05)
    fitted(module, loader(), bpf.ForwardForward(label="embedding"))
    module.trainer = None
    x = torch.randn(4, 6)
    for other in (copy.deepcopy(module.net), pickle.loads(pickle.dumps(module.net))):
        assert torch.equal(other(x), module.net(x))
        with torch.no_grad():
            other.layers[0].weight.zero_()  # a copy is its own network
        assert not torch.equal(other(x), module.net(x))
