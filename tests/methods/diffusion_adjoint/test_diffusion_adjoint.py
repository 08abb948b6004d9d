"""The callback in modules of any kind: what it swaps, undoes, logs and refuses."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy
from problems import fitted
from tiny_diffusion import prompts, stable_diffusion
from torch.utils.data import DataLoader

from lightning_bpfree import DiffusionAdjoint, DiffusionSampler, DiscreteVP
from lightning_bpfree.methods.diffusion_adjoint.pipeline_sampler import PipelineSampler


class Holder(pl.LightningModule):
    """A module that samples from a pipeline in its training step, as people write it."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.pipe = stable_diffusion()
        self.unet, self.fail = self.pipe.unet, fail
        self.embeds = torch.nn.Parameter(prompts(1))
        self.losses, self.gradients = [], []

    def training_step(self, noise, batch_idx):
        images = self.pipe(
            prompt_embeds=self.embeds.expand(2, -1, -1),
            negative_prompt_embeds=torch.zeros(2, 5, 8),
            latents=noise,
            num_inference_steps=3,
            guidance_scale=2.0,
            output_type="pt",
        ).images
        if self.fail:
            raise KeyboardInterrupt
        loss = (images - 0.3).square().mean()
        self.losses.append(loss.detach())
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def noise_loader() -> DataLoader:
    return DataLoader(torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), batch_size=2)


def test_a_held_pipeline_gives_gradients_and_comes_back():
    torch.manual_seed(0)
    module = Holder()
    kind = type(module.pipe)
    fitted(module, noise_loader(), DiffusionAdjoint(), max_steps=1)
    assert type(module.pipe) is kind
    assert {"embeds", "unet.conv_in.weight"} <= set(module.gradients[0])

    torch.manual_seed(0)
    same = Holder()
    source = PipelineSampler(same.pipe, num_steps=3, guidance_scale=2.0, gradient="direct")
    same.unet.requires_grad_(True)
    noise = next(iter(noise_loader()))
    images = source.images(
        noise, {"prompt_embeds": same.embeds.expand(2, -1, -1)}, {"prompt_embeds": torch.zeros(1, 5, 8)}
    )
    loss = (images - 0.3).square().mean()
    loss.backward()
    torch.testing.assert_close(module.losses[0], loss.detach(), rtol=1e-5, atol=0.0)
    for name, parameter in same.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(module.gradients[0][name], parameter.grad, rtol=1e-4, atol=1e-7)  # float32


def test_undone_after_an_exception():
    module = Holder(fail=True)
    kind = type(module.pipe)
    with pytest.raises(KeyboardInterrupt):
        raise_through(module)
    assert type(module.pipe) is kind


def raise_through(module):
    try:
        fitted(module, noise_loader(), DiffusionAdjoint())
    except SystemExit as stopped:  # Lightning ends the process after an interrupt
        raise KeyboardInterrupt from stopped


def test_without_the_callback_the_pipeline_has_no_gradient():
    with pytest.raises(RuntimeError, match="does not require grad"):
        fitted(Holder(), noise_loader())


class Own(pl.LightningModule):
    """A module that holds a sampler of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.sampler = DiffusionSampler(torch.nn.Bilinear(3, 1, 3), DiscreteVP.from_betas(), num_steps=4)
        self.sampler.denoiser.forward = self.denoise
        self.seen = []

    def denoise(self, x, time):
        return torch.nn.Bilinear.forward(self.sampler.denoiser, x, time[:, None] / 1000)

    def training_step(self, batch, batch_idx):
        self.seen.append(self.sampler.settings)
        return self.sampler(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def samples() -> DataLoader:
    return DataLoader(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), batch_size=4)


def test_a_held_sampler_gets_the_settings_for_the_fit():
    module = Own()
    before = module.sampler.settings
    trainer = fitted(module, samples(), DiffusionAdjoint("direct", num_steps=3, solver="heun"), max_epochs=1)
    assert (module.seen[0].gradient, module.seen[0].num_steps, module.seen[0].solver) == ("direct", 3, "heun")
    assert module.seen[0].guidance_scale == before.guidance_scale  # not given, hence the sampler's own
    assert module.sampler.settings == before
    assert trainer.callback_metrics["bpfree/network_evals"] == 2 * 3 * 2  # batches, steps, stages
    assert trainer.callback_metrics["bpfree/peak_memory"] > 0


def test_settings_and_counts_are_in_the_checkpoint(tmp_path):
    trainer = fitted(Own(), samples(), DiffusionAdjoint(num_steps=3))
    path = tmp_path / "one.ckpt"
    trainer.save_checkpoint(path)
    longer = fitted(Own(), samples(), DiffusionAdjoint(num_steps=3), ckpt_path=path, max_epochs=2)
    assert longer.callback_metrics["bpfree/network_evals"] == 2 * 2 * 5  # epochs, batches; 3 evaluations, and 2 again
    with pytest.warns(UserWarning, match="num_steps=3 .now 5."):
        fitted(Own(), samples(), DiffusionAdjoint(num_steps=5), ckpt_path=path, max_epochs=2)


def test_a_module_that_samples_from_nothing():
    class Nothing(Own):
        def __init__(self):
            super().__init__()
            self.net = self.sampler.denoiser
            del self.sampler

    with pytest.raises(MisconfigurationException, match="finds nothing to differentiate in Nothing"):
        fitted(Nothing(), samples(), DiffusionAdjoint())


def test_strategies_that_shard_parameters():
    class Sharded:
        strategy = FSDPStrategy.__new__(FSDPStrategy)

    with pytest.raises(MisconfigurationException, match="gradient='checkpoint'"):
        DiffusionAdjoint()._check_strategy(Sharded())
    DiffusionAdjoint("checkpoint")._check_strategy(Sharded())


def test_a_pipeline_that_cannot_be_differentiated_is_refused_before_the_first_batch():
    module = Holder()
    module.pipe.safety_checker = object()
    with pytest.raises(ValueError, match="safety_checker"):
        fitted(module, noise_loader(), DiffusionAdjoint())
    assert not module.losses


@pytest.mark.parametrize("inference_mode", [True, False])
def test_a_fit_within_inference_mode(inference_mode):
    with torch.inference_mode(inference_mode):
        if not inference_mode:
            fitted(Own(), samples(), DiffusionAdjoint())
            return
        with pytest.raises(RuntimeError, match="inference"):
            fitted(Own(), samples(), DiffusionAdjoint())
