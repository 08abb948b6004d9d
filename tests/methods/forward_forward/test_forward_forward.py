"""What is true of Forward-Forward, and of no other rule."""

from __future__ import annotations

import copy
import pickle
import types
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from problems import Problem, fitted, loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.demos.data import DigitsDataModule
from lightning_bpfree.demos.nets import MLP, SmallCNN, SmallTransformer
from lightning_bpfree.methods.forward_forward.goodness import contrast, goodness, rescaled
from lightning_bpfree.methods.forward_forward.negatives import overlaid
from lightning_bpfree.training.checks import check_fit


def next_label(inputs, labels):
    """Negative labels that everyone can compute."""
    return (labels + 1) % 3


def problem(depth: int = 3, width: int = 8, lr: float = 0.0, **settings) -> Problem:
    torch.manual_seed(0)
    return Problem(MLP(6, [width] * depth, 3), lr=lr, **settings)


def gradients(rule, module=None, data=None, **settings):
    module = problem() if module is None else module
    fitted(module, loader(rows=16) if data is None else data, rule, **settings)
    return module.gradients[0]


def losses_by_hand(module, blocks, temperature=1.0, rows=16):
    """Every block's loss and its layers, written as a loop."""
    x, y = next(iter(loader(rows=rows)))
    z = torch.cat([overlaid(x, y, 3), overlaid(x, next_label(x, y), 3)])
    start = 0
    for size in blocks:
        part = module.net.layers[start : start + 2 * size]
        z = part(rescaled(z.detach()))
        yield contrast(goodness(z), threshold=z.shape[1], temperature=temperature), part
        start += 2 * size


def by_hand(module, blocks, temperature=1.0):
    found = {}
    for loss, part in losses_by_hand(module, blocks, temperature):
        grads = torch.autograd.grad(loss, list(part.parameters()))
        found |= {f"net.layers.{name}": g for (name, _), g in zip(part.named_parameters(), grads, strict=True)}
    return found


# --- the gradient -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [[1, 1, 1], [3], [2, 1]])
def test_every_block_gets_the_gradient_of_its_own_loss(blocks):
    """One layer a block: Forward-Forward. Several: backprop on the goodness loss within the block, and no further."""
    module = problem()
    expected = by_hand(module, blocks, temperature=3.0)
    found = gradients(bpf.ForwardForward(blocks, negatives=next_label, temperature=3.0), module)
    assert found.keys() == expected.keys()  # the last layer gets none
    for name, gradient in expected.items():
        # Equal operations on equal numbers, but sums of squares that are taken in another way: float32 rounding.
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_integrated_blocks_of_one_layer_are_forward_forward_bit_for_bit():
    one = gradients(bpf.ForwardForward(1, seed=3))
    other = gradients(
        bpf.ForwardForward([["layers.0", "layers.1"], ["layers.2", "layers.3"], ["layers.4", "layers.5"]], seed=3)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_gradient_crosses_a_block():
    """Whatever later blocks hold, the earlier ones' gradients are the same to the bit."""
    plain = gradients(bpf.ForwardForward(seed=1))
    wild = problem()
    with torch.no_grad():
        wild.net.layers[2].weight.mul_(-50)
    changed = gradients(bpf.ForwardForward(seed=1), wild)
    for name in ("net.layers.0.weight", "net.layers.0.bias"):
        assert torch.equal(plain[name], changed[name])
    assert not torch.equal(plain["net.layers.2.weight"], changed["net.layers.2.weight"])


def test_the_next_block_cannot_read_the_goodness():
    plain = gradients(bpf.ForwardForward(seed=1))
    louder = problem()
    with torch.no_grad():  # twice the activity of the first block, and its direction
        louder.net.layers[0].weight.mul_(2)
        louder.net.layers[0].bias.mul_(2)
    changed = gradients(bpf.ForwardForward(seed=1), louder)
    for name in plain:
        if not name.startswith("net.layers.0"):
            assert torch.equal(plain[name], changed[name])  # a factor of two is exact in floating point


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_small_step_lowers_the_loss_of_its_block_by_the_squared_gradient(block):
    lr, module = 1e-4, problem(lr=1e-4)
    before = [float(loss.detach()) for loss, _ in losses_by_hand(module, [1, 1, 1])]
    alone = [1.0 if index == block else 0.0 for index in range(3)]  # or the block's input would move too
    found = gradients(bpf.ForwardForward(negatives=next_label, learning_rates=alone), module)
    after = [float(loss.detach()) for loss, _ in losses_by_hand(module, [1, 1, 1])]
    squared = sum(float(g.square().sum()) for name, g in found.items() if name.startswith(f"net.layers.{2 * block}."))
    # First order in lr: the curvature of the goodness is the rest, some per cent at this step.
    assert before[block] - after[block] == pytest.approx(lr * squared, rel=0.1)
    assert before[:block] == after[:block]


def test_swapping_positives_and_negatives_turns_the_step_around_at_the_threshold():
    """Where p = 1/2 for all, the gradient of one sample pair is the difference of two: swapping flips its sign."""

    class Swapped(Problem):
        def training_step(self, batch, index):
            x, y = batch
            return super().training_step([x, (y + 1) % 3], index)

    wide = {"temperature": 1e6}  # p is 1/2 to six digits, whatever the goodness
    one = gradients(bpf.ForwardForward(negatives=lambda x, y: (y + 1) % 3, **wide))
    other = gradients(bpf.ForwardForward(negatives=lambda x, y: (y + 2) % 3, labels=lambda b: (b[1] + 1) % 3, **wide))
    assert all(torch.isfinite(g).all() for g in one.values())
    back = gradients(bpf.ForwardForward(negatives=lambda x, y: (y - 1) % 3, labels=lambda b: (b[1] + 1) % 3, **wide))
    for name, gradient in one.items():
        torch.testing.assert_close(back[name], -gradient, rtol=1e-3, atol=1e-11)
        assert not torch.equal(other[name], -gradient) or not gradient.any()


def test_peer_normalisation_pulls_on_silent_units_too():
    module = problem(depth=1)
    with torch.no_grad():
        module.net.layers[0].bias[0] = -100.0  # silent on everything
    without = gradients(bpf.ForwardForward(seed=1), copy.deepcopy(module))
    with_peers = gradients(bpf.ForwardForward(seed=1, peer_normalization=0.03), copy.deepcopy(module))
    assert not without["net.layers.0.bias"][0]
    assert float(with_peers["net.layers.0.bias"][0]) < 0  # descent raises it


# --- predictions and the module's own steps -----------------------------------------------------------------------


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


# --- other networks, other schedules ------------------------------------------------------------------------------


def images(rows=16, batch_size=16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(rows) % 3), batch_size=batch_size)


NETS = {
    "cnn": (lambda: SmallCNN((1, 8, 8), [4, 8], 3, norm="group"), ["features.*"]),
    "cnn with BatchNorm": (lambda: SmallCNN((1, 8, 8), [4, 8], 3, norm="batch"), [["features.*"]]),
    "transformer": (
        lambda: SmallTransformer((1, 8, 8), 3, dim=8, heads=2),
        [["embed", "position", "encoder.layers.0"], "encoder.layers.1"],
    ),
}


@pytest.mark.parametrize("label", ["overlay", "embedding"])
@pytest.mark.parametrize("kind", NETS)
def test_images_train_convolutions_and_transformers(kind, label):
    make, blocks = NETS[kind]
    torch.manual_seed(0)
    module = Problem(make(), lr=0.1)
    before = {name: p.clone() for name, p in module.net.named_parameters()}
    rule = bpf.ForwardForward(blocks, label=label)
    fitted(module, images(), rule)
    inside = {id(parameter) for block in rule.parts.blocks for parameter in block.parameters}
    moved = {n for n, p in module.net.named_parameters() if not torch.equal(p, before[n])}
    silent = {n for n in moved ^ set(before) if id(dict(module.net.named_parameters())[n]) in inside}
    assert not {n for n in silent if not n.endswith("in_proj_bias")}  # a key's bias never matters in attention
    assert not {n for n in moved if id(dict(module.net.named_parameters())[n]) not in inside}
    assert module.net(torch.randn(2, 1, 8, 8)).shape == (2, 3)


def test_hybrid_images_train_without_labels():
    torch.manual_seed(0)
    module = Problem(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)), lr=0.1)
    rule = bpf.ForwardForward(label="none", negatives="hybrid", prediction="readout")
    found = gradients(rule, module, images())
    assert set(found) == {"net.1.weight", "net.1.bias", "net.3.weight", "net.3.bias"}
    assert all(bool(g.any()) for g in found.values())


def test_negatives_and_labels_may_be_functions():
    def shifted(inputs, labels):
        return inputs.roll(1, 0)

    def doubled(inputs, labels):
        return inputs if labels is None else inputs + labels[:, None]

    found = gradients(bpf.ForwardForward(negatives=shifted, label=doubled))
    assert bool(found["net.layers.0.weight"].any())


def test_greedy_blocks_learn_one_after_the_other():
    module, moved = problem(lr=0.01), []

    class Looks(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            self.before = {n: p.clone() for n, p in module.net.named_parameters()}

        def on_train_epoch_end(self, trainer, module):
            changed = {n for n, p in module.net.named_parameters() if not torch.equal(p, self.before[n])}
            moved.append({int(name.split(".")[1]) for name in changed})

    fitted(module, loader(), bpf.ForwardForward(schedule="greedy"), Looks(), max_epochs=6)
    # Momentum of a block that has had its turn must not move it on.
    assert moved == [{0}, {0}, {2}, {2}, {4}, {4}]


def test_greedy_and_simultaneous_agree_on_the_first_block():
    greedy = gradients(bpf.ForwardForward(schedule="greedy", seed=1), max_epochs=3)
    together = gradients(bpf.ForwardForward(seed=1))
    assert set(greedy) == {"net.layers.0.weight", "net.layers.0.bias"}
    assert all(torch.equal(greedy[name], together[name]) for name in greedy)


def test_factors_on_the_learning_rate_are_learning_rates():
    """Equal to parameter groups with their own rates, for momentum and weight decay alike."""
    factored = problem(lr=0.1, optimizer="adamw")
    fitted(factored, loader(), bpf.ForwardForward(learning_rates=[0.5, 1, 0], seed=1))

    class Groups(Problem):
        def configure_optimizers(self):
            layers = self.net.layers
            groups = [{"params": layers[0].parameters(), "lr": 0.05}, {"params": layers[2].parameters(), "lr": 0.1}]
            return torch.optim.AdamW(groups, weight_decay=0.1)

    torch.manual_seed(0)
    grouped = Groups(MLP(6, [8] * 3, 3))
    fitted(grouped, loader(), bpf.ForwardForward(seed=1))
    for name, parameter in grouped.named_parameters():
        torch.testing.assert_close(dict(factored.named_parameters())[name], parameter, rtol=1e-5, atol=1e-6)


def test_hard_negatives_by_goodness_are_likelier_than_others():
    """A wrong label that the model likes best is drawn nearly always at a low temperature."""
    drawn = []
    module = problem()
    rule = bpf.ForwardForward(negatives="hard", temperature=1e-3)

    class Looks(Problem):
        def training_step(self, batch, index):
            scores = self.net(batch[0])
            drawn.append(scores.scatter(1, batch[1][:, None], 0).argmax(1))
            return F.cross_entropy(scores, batch[1])

    torch.manual_seed(0)
    module = Looks(MLP(6, [8] * 3, 3), lr=0.0)
    fitted(module, loader(rows=16), rule)
    x, y = next(iter(loader(rows=16)))
    likeliest = module.net(x).scatter(1, y[:, None], -1).argmax(1)
    assert torch.equal(drawn[0], likeliest)


def test_forward_arguments_beside_the_input_are_folded_with_it():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3)

        def forward(self, x, scale, *, shift=0.0):
            return self.head(self.one(x * scale + shift))

    torch.manual_seed(0)
    net = Scaled()
    rule = bpf.ForwardForward([["one"]], network="")
    rule.install(net)
    x, scale = torch.randn(4, 6), torch.rand(4, 1)
    together = net(x, scale, shift=torch.ones(6))
    alone = torch.cat([net(x[i : i + 1], scale[i : i + 1], shift=torch.ones(6)) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_metrics_of_the_blocks_are_logged():
    module = problem(lr=0.1)
    trainer = fitted(module, loader(), bpf.ForwardForward())
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("bpfree/forward_forward/")}
    assert {
        f"bpfree/forward_forward/blocks/{i}/{what}" for i in range(3) for what in ("loss", "positive", "negative")
    } == set(logged)


def test_alignment_says_that_there_is_nothing_to_compare_with():
    module = problem()
    alignment = bpf.GradientAlignment(every_n_steps=1)
    fitted(module, loader(), bpf.ForwardForward(), alignment)
    assert alignment.measured == 0


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "least"), [(1, 0.93), ([2, 2], 0.95)])
def test_digits_are_learned_in_seconds(blocks, least):
    """A sanity check: measured are 0.96 and 0.97, three seeds, spread 0.01; 40 instead of 60 epochs here."""
    from lightning_bpfree.demos.modules import Classifier

    pl.seed_everything(0, verbose=False)
    module = Classifier(MLP(64, [100] * 4, 10), lr=0.003, optimizer="adam", lr_schedule="cosine")
    data = DigitsDataModule(batch_size=64)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    rule = bpf.ForwardForward(blocks, temperature=10.0)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=40, enable_checkpointing=False, callbacks=[rule], limit_val_batches=0, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data)
    (found,) = trainer.test(module, data, verbose=False)
    assert found["test_acc"] >= least


# --- one rule, several fits and modules ----------------------------------------------------------------------------


def test_a_fitted_module_can_be_fitted_again_by_another_rule_object_and_freed_from_a_copy():
    module = problem(lr=0.01)
    fitted(module, loader(), bpf.ForwardForward())
    fitted(module, loader(), bpf.ForwardForward())
    twin = copy.deepcopy(module.net)
    x = torch.randn(2, 6)
    bpf.ForwardForward(network="").uninstall(twin)
    assert torch.equal(twin(x), module.net.layers(x))
    assert not torch.equal(module.net(x), module.net.layers(x))


def test_another_rule_does_not_train_through_goodness_unnoticed():
    module, rule = problem(lr=0.01), bpf.ForwardForward()
    fitted(module, loader(), rule)
    with pytest.raises(MisconfigurationException, match=r"uninstall\(module\) first"):
        fitted(module, loader(), bpf.Backprop())
    rule.uninstall()
    fitted(module, loader(), bpf.Backprop())


def test_validating_before_the_fit_does_no_harm():
    class Tests(Problem):
        def test_step(self, batch, batch_idx):
            self.net(batch[0])

    torch.manual_seed(0)
    module, rule = Tests(MLP(6, [8, 8], 3), lr=0.1), bpf.ForwardForward(label="embedding", seed=5)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(callbacks=[rule], **options).test(module, loader(), verbose=False)
    before = rule.rule_state()["own"]["label_embedding"]["module"]["patterns"]
    fitted(module, loader(), rule)
    after = rule.rule_state()["own"]["label_embedding"]["module"]["patterns"]
    assert not torch.equal(before, after)


def test_a_second_module_starts_afresh_and_leaves_the_first_as_it_is():
    rule, one, two = bpf.ForwardForward(label="embedding"), problem(lr=0.1), Problem(MLP(6, [5, 5], 3), lr=0.1)
    fitted(one, loader(), rule)
    x = torch.randn(3, 6)
    expected = one.net(x)
    fitted(two, loader(), rule)
    assert torch.equal(one.net(x), expected)


def test_predictions_follow_the_rule_of_the_last_epoch():
    class Tests(Problem):
        def test_step(self, batch, batch_idx):
            self.seen = self.net(batch[0]), self.net.layers(batch[0])

    for window, by_goodness in (({"start_epoch": 5}, False), ({"stop_epoch": 1}, True), ({}, True)):
        torch.manual_seed(0)
        module = Tests(MLP(6, [8, 8], 3), lr=0.1)
        fitted(module, loader(), bpf.ForwardForward(**window)).test(module, loader(), verbose=False)
        assert torch.equal(*module.seen) != by_goodness


def test_factors_on_the_learning_rate_end_with_the_rules_epochs():
    plain, factored = problem(lr=0.1), problem(lr=0.1)
    fitted(plain, loader())
    fitted(factored, loader(), bpf.ForwardForward(start_epoch=1, learning_rates=[0, 1, 1]))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), factored.parameters(), strict=True))


def test_what_only_one_micro_batch_needs_learns_from_it():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.turn = nn.ModuleList([nn.Linear(6, 8), nn.Linear(6, 8)]), 0

        def forward(self, x):
            self.turn += 1
            return self.experts[self.turn % 2](x).relu()

    torch.manual_seed(0)
    module = Problem(nn.Sequential(Experts(), nn.Linear(8, 3)), lr=0.1)
    before = [p.clone() for p in module.net[0].parameters()]
    fitted(module, loader(rows=32), bpf.ForwardForward(["0"]), accumulate_grad_batches=2)
    assert not any(torch.equal(p, b) for p, b in zip(module.net[0].parameters(), before, strict=True))


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(2, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.one(x.view(len(x), 3, 2).transpose(0, 1)).mean(0))


class NoGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        with torch.no_grad():
            x = self.one(x)
        return self.head(x)


class Upstream(Problem):
    def __init__(self) -> None:
        super().__init__(MLP(6, [8], 3))
        self.before = nn.Linear(6, 6)

    def training_step(self, batch, index):
        return self.net(self.before(batch[0])).sum()


@pytest.mark.parametrize(
    ("module", "blocks", "error", "said"),
    [
        (lambda: Problem(SequenceFirst()), ["one"], ValueError, r"gives \(3, 32, 8\) for 32 samples.*batch_first"),
        (lambda: Problem(NoGraph()), ["one"], MisconfigurationException, "one ran without a graph.*no_grad"),
        (Upstream, 1, MisconfigurationException, r"before\.weight.*in no block"),
    ],
)
def test_what_would_train_nothing_or_nonsense_is_refused(module, blocks, error, said):
    with pytest.raises(error, match=said):
        fitted(module(), loader(), bpf.ForwardForward(blocks, network="net"))


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prediction": "logits"}, "prediction='logits': choose 'goodness' or 'readout'"),
        ({"goodness": "max"}, "goodness='max'"),
        ({"length": "layer"}, "length='layer'"),
        ({"negatives": "easy"}, "negatives='easy'.* or a function"),
        ({"label": "corner"}, "label='corner'"),
        ({"schedule": "random"}, "schedule='random'"),
        ({"threshold": 0.0}, r"threshold=0\.0: give a positive number"),
        ({"temperature": -1.0}, "temperature"),
        ({"peer_normalization": -0.1}, "peer_normalization"),
        ({"first_block": -1}, "first_block"),
        ({"epochs_per_block": 0}, "epochs_per_block"),
        ({"num_classes": 1}, "num_classes"),
        ({"label": "none"}, "label='none' with negatives='wrong_label'"),
        ({"negatives": "hybrid"}, "pass label='none'"),
        ({"label": "none", "negatives": "hybrid"}, "prediction='readout'"),
        ({"label": "embedding", "embedding_lr": 0.0}, "lr"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        bpf.ForwardForward(**arguments)


@pytest.mark.parametrize(
    ("rule", "error", "said"),
    [
        (lambda: bpf.ForwardForward(first_block=3), ValueError, "first_block=3: there are 3 blocks"),
        (lambda: bpf.ForwardForward(learning_rates=[1.0]), ValueError, "one factor for each of the 3 blocks"),
        (lambda: bpf.ForwardForward(learning_rates=[1, 1, -1.0]), ValueError, r"learning_rates=\[1, 1, -1"),
        (lambda: bpf.ForwardForward([2, 2], prediction="readout"), ValueError, "every layer is in a block"),
        (lambda: bpf.ForwardForward(params="net.layers.6.*"), MisconfigurationException, "nothing would be trained"),
        (lambda: bpf.ForwardForward(["layers.2", "layers.4"]), MisconfigurationException, "weight.*in no block"),
        (lambda: bpf.ForwardForward(["layers.2", "layers.0", "layers.4"]), RuntimeError, "in the order layers.0"),
        (lambda: bpf.ForwardForward(num_classes=2), ValueError, "values from 0 to 2"),
        (lambda: bpf.ForwardForward(num_classes=6), ValueError, "6 labels do not fit into inputs of 6 values"),
        (lambda: bpf.ForwardForward(negatives=lambda x, y: y), ValueError, "true labels"),
        (lambda: bpf.ForwardForward(negatives=lambda x, y: y.float()), ValueError, "returned torch.float32"),
        (lambda: bpf.ForwardForward(labels=lambda batch: batch[0]), ValueError, r"shape \(16, 6\)"),
        (lambda: bpf.ForwardForward(network="accuracy"), ValueError, "no parameters|does not show|has 0 layer"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_with_the_cure(rule, error, said):
    with pytest.raises(error, match=said):
        fitted(problem(), loader(), rule())


def test_the_number_of_labels_is_asked_for_where_layers_disagree():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.head, self.other = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 5)

    with pytest.raises(ValueError, match=r"widths \[3, 5\] at its end; pass the number"):
        bpf.ForwardForward(["one"], network="").install(Two())
    with pytest.raises(ValueError, match="no linear layer"):
        bpf.ForwardForward(["0"], network="").install(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()))


def test_greedy_needs_an_end():
    with pytest.raises(MisconfigurationException, match="pass epochs_per_block"):
        fitted(problem(), loader(), bpf.ForwardForward(schedule="greedy"), max_epochs=-1, max_steps=2)


def test_one_call_a_step():
    class Twice(Problem):
        def training_step(self, batch, index):
            return self.net(batch[0]).sum() + self.net(batch[0]).sum()

    class Never(Problem):
        def training_step(self, batch, index):
            return self.net.layers(batch[0]).square().mean()

    for kind, said in ((Twice, "more than once.*torch.cat"), (Never, "never called")):
        with pytest.raises(MisconfigurationException, match=said):
            fitted(kind(MLP(6, [8], 3)), loader(), bpf.ForwardForward())


def test_compiled_networks_are_refused():
    module = problem()
    module.net.layers.compile()
    with pytest.raises(MisconfigurationException, match=r"torch\.compile"):
        fitted(module, loader(), bpf.ForwardForward())


def test_scalar_sync_is_refused():
    trainer = types.SimpleNamespace(strategy=bpf.ScalarSyncStrategy())
    with pytest.raises(MisconfigurationException, match="strategy='ddp'"):
        check_fit(bpf.ForwardForward(), ["ForwardForward"], trainer, problem())
