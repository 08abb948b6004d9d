"""Training through `ReversibleRecompute`: the weights it leaves are those of plain autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from reversible_modules import Encoder, fit
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_bpfree as bpf
from lightning_bpfree import ReversibleRecompute


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


@pytest.mark.parametrize(
    "schedule", ["sequential", pytest.param("parallel", marks=slow), pytest.param("checkpoint", marks=slow)]
)
def test_resuming_goes_on_bit_for_bit(schedule, tmp_path):
    def run(epochs, resume=None, save=False):
        torch.manual_seed(0)
        module = Encoder(dropout=0.1)
        if resume is not None:
            torch.manual_seed(99)  # the resumed process starts from another random state
        callback = ReversibleRecompute("all", schedule)
        trainer = fit(module, [callback], tmp_path, resume, max_epochs=epochs)
        if save:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
        return module

    whole = run(2)
    run(1, save=True)
    resumed = run(2, tmp_path / "half.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


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
