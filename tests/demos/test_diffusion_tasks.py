"""The diffusion model of digits and its rewards: what they measure, and that the model's folder is a pipeline."""

from __future__ import annotations

import lightning as L
import pytest
import torch

import lightning_bpfree as bpf
from lightning_bpfree.demos.data import DigitsDataModule
from lightning_bpfree.demos.diffusion_tasks import digit_rewards
from lightning_bpfree.demos.diffusion_tasks.digit_rewards import digits

pytest.importorskip("sklearn")


def test_judges_read_real_digits():
    images, labels = digits("test")
    assert float(digit_rewards.Legibility()(images, labels).mean()) > 0.97
    assert float(digit_rewards.ToyClassifierTurned()(images, labels).mean()) < 0.06
    assert float(digit_rewards.Legibility(digit=7)(images, labels).mean()) == pytest.approx(
        float((labels == 7).float().mean()), abs=0.01
    )


def test_the_toy_classifier_is_turned_by_its_gradient_alone():
    images, labels = digits("test")
    images = images[:32].clone().requires_grad_()
    reward = digit_rewards.TurnToyClassifier(margin=2.0)
    before = reward(images, labels[:32])
    before.sum().backward()
    after = reward((images + 3.0 * images.grad.sign()).detach(), labels[:32])
    assert float(before.detach().mean()) < 0 < float(after.mean())
    assert float(after.max()) <= 2.0
    for judge in (digit_rewards.Legibility(), digit_rewards.ToyClassifierTurned()):
        assert not judge(images, labels[:32]).requires_grad


def test_fooled_is_turned_and_legible():
    images, labels = digits("test")
    images = images[:64] + 0.6 * torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    turned = digit_rewards.ToyClassifierTurned()(images, labels[:64])
    legible = digit_rewards.Legibility()(images, labels[:64])
    fooled = digit_rewards.ToyClassifierFooled()(images, labels[:64])
    assert 0 < int(turned.sum()) < 64
    assert torch.equal(fooled.bool(), turned.bool() & legible.bool())


def test_styles_are_measured_and_have_derivatives():
    images = digits("test")[0][:8].clone().requires_grad_()
    thick = torch.nn.functional.max_pool2d(images.detach(), 3, 1, 1)
    width = digit_rewards.StrokeThickness()
    assert bool((width(thick) > width(images.detach())).all())
    for measure in (width, digit_rewards.Slant(), digit_rewards.Likeness(3)):
        reward = digit_rewards.Towards(measure, 2.0)(images)
        assert reward.shape == (8,)
        assert bool((reward <= 0).all())
        assert float(torch.autograd.grad(reward.sum(), images)[0].abs().sum()) > 0
    assert not digit_rewards.Printed(width)(images).requires_grad
    assert float(digit_rewards.Likeness(3)(images)[3].detach()) == 0.0


def test_the_model_learns_and_its_folder_fine_tunes(tmp_path):
    pytest.importorskip("diffusers")
    from lightning_bpfree.demos.diffusion_tasks.digit_diffusion import DigitDiffusion

    torch.manual_seed(0)
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    model, data = DigitDiffusion(str(tmp_path / "model"), channels=(8, 16), lr=0.01), DigitsDataModule(batch_size=64)
    trainer = L.Trainer(max_epochs=1, limit_train_batches=12, limit_val_batches=1, enable_model_summary=False, **quiet)
    first = trainer.validate(model, data, verbose=False)[0]["val_loss"]
    trainer.fit(model, data)
    assert float(trainer.callback_metrics["val_loss"]) < 0.9 * first
    tuned = bpf.RewardFineTuning(
        tmp_path / "model",
        digit_rewards.Towards(digit_rewards.StrokeThickness(), 1.6),
        optimize="prompt_embeds",
        embeddings=tmp_path / "model" / "embeddings.safetensors",
        judges={"fooled": digit_rewards.ToyClassifierFooled()},
        num_steps=2,
        val_samples=4,
        guidance_scale=2.0,
    )
    tested = L.Trainer(enable_model_summary=False, **quiet).test(tuned, verbose=False)[0]
    assert 0.0 <= tested["test_fooled"] <= 1.0
    assert tested["test_reward"] <= 0.0
