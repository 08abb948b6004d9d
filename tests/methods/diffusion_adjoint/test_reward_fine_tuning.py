"""Fine-tuning by a reward: what is trained, what is kept, what is resumed, and rewards without a derivative."""

from __future__ import annotations

import pytest
import torch
from problems import fitted
from tiny_diffusion import image_pipeline, prompts, stable_diffusion
from torchmetrics.image import TotalVariation

import lightning_bpfree as bpf
from lightning_bpfree.methods.diffusion_adjoint.trained_parts import add_lora, without_lora

WIDE = {"class_embed_type": "identity"}
OPTIMIZE = ["noise", "prompt_embeds", "weights", "lora"]


def bright(images):
    return images.mean((1, 2, 3))


def white(images):
    """The mean of pixels as a file would hold them: no derivative."""
    return (images.detach() * 255).round().mean((1, 2, 3)) / 255


def model(optimize="lora", reward=bright, pipe=None, **settings):
    torch.manual_seed(0)
    embeddings = {"prompt_embeds": prompts(3), "negative_prompt_embeds": torch.zeros(1, 5, 8)}
    options = {"num_steps": 2, "batch_size": 4, "batches_per_epoch": 2, "val_samples": 4, "lr": 0.02}
    options |= {"embeddings": embeddings, "guidance_scale": 2.0, "lora_targets": ["to_q", "to_v"], **settings}
    return bpf.RewardFineTuning(pipe or stable_diffusion(), reward, optimize, **options)


def trained(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def plain(**settings):
    return model("weights", pipe=image_pipeline(), embeddings=None, guidance_scale=1.0, **settings)


@pytest.mark.parametrize("optimize", OPTIMIZE)
def test_the_reward_rises_and_nothing_else_moves(optimize):
    module = model(optimize)
    frozen = {n: p.detach().clone() for n, p in module.named_parameters() if not p.requires_grad}
    index = torch.arange(4)
    with torch.no_grad():
        before = bright(module(index)).mean()
    fitted(module, None, bpf.DiffusionAdjoint(), max_epochs=3)
    # The noise of the first epoch again, so that weights are all that has changed.
    module.trainer.fit_loop.epoch_progress.current.processed = 0
    with torch.no_grad():
        assert bright(module(index)).mean() > before
    assert all(torch.equal(frozen[n], p) for n, p in module.named_parameters() if not p.requires_grad)
    moving = {"noise": "noise", "prompt_embeds": "trained_prompts", "weights": "sampler.", "lora": "sampler."}
    assert all(name.startswith(moving[optimize]) for name in trained(module))
    assert optimize != "lora" or all("lora_" in name for name in trained(module))


@pytest.mark.parametrize("optimize", OPTIMIZE)
def test_the_callback_gives_the_gradient_of_backprop(optimize):
    found = {}
    for gradient in ("direct", "exact_adjoint"):
        module = model(optimize, lr=1e-3, optimizer="sgd")
        fitted(module, None, bpf.DiffusionAdjoint(gradient), max_epochs=1)
        found[gradient] = trained(module)
    for name, value in found["direct"].items():
        torch.testing.assert_close(found["exact_adjoint"][name], value, rtol=1e-5, atol=1e-7)  # float32


@pytest.mark.parametrize(
    ("optimize", "settings"), [("noise", {"prior": "l2"}), ("lora", {"prior": "kl", "ema_decay": 0.5})]
)
def test_resuming_is_exact(optimize, settings, tmp_path):
    whole = model(optimize, **settings)
    fitted(whole, None, bpf.DiffusionAdjoint(), max_epochs=4)
    half = model(optimize, **settings)
    trainer = fitted(half, None, bpf.DiffusionAdjoint(), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(99)  # another process has other numbers
    rest = model(optimize, **settings)
    fitted(rest, None, bpf.DiffusionAdjoint(), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    for (name, value), (_, other) in zip(trained(whole).items(), trained(rest).items(), strict=True):
        assert torch.equal(value, other), name
    if rest.averages is not None:
        assert all(map(torch.equal, whole.averages.buffers(), rest.averages.buffers()))


def test_a_checkpoint_brings_its_noise(tmp_path):
    module = plain(seed=5)
    fitted(module, None, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    other = plain(seed=6)
    fitted(other, None, max_epochs=1, ckpt_path=tmp_path / "one.ckpt")
    assert other.seed == 5
    assert torch.equal(other._noise(torch.arange(4), "val"), module._noise(torch.arange(4), "val"))


@pytest.mark.parametrize("fixed_noise", [False, True])
def test_training_noise_is_new_in_each_epoch_unless_fixed(fixed_noise):
    module, seen = plain(fixed_noise=fixed_noise), []
    module.on_train_epoch_start = lambda: seen.append(module._noise(torch.arange(4), "train"))
    fitted(module, None, max_epochs=2, limit_val_batches=0)
    assert torch.equal(*seen) == fixed_noise


def test_averages_move_with_the_optimizer_and_validate():
    module = plain(ema_decay=0.5, batches_per_epoch=4)
    moved = []
    module.averages.update = lambda: moved.append(module.global_step)
    trainer = fitted(module, None, max_epochs=1, accumulate_grad_batches=2)
    assert moved == [1, 2]
    with torch.no_grad(), module.averages.in_place():  # which have not moved, unlike the weights
        reward = bright(module(torch.arange(4), "val")).mean()
    torch.testing.assert_close(trainer.callback_metrics["val_reward"], reward, rtol=1e-5, atol=0.0)
    with torch.no_grad():
        assert not torch.isclose(reward, bright(module(torch.arange(4), "val")).mean(), rtol=1e-5)


def test_computing_without_a_lora_leaves_what_needs_a_gradient():
    network = image_pipeline().unet
    add_lora(network, 2, ["to_q"])
    frozen = next(parameter for name, parameter in network.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    with without_lora(network):
        pass
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == before


def test_checkpoints_hold_what_is_trained_alone(tmp_path):
    module = model("lora", ema_decay=0.9)
    fitted(module, None, max_epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    names = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert set(names) == {*trained(module), *(f"averages.{n}" for n, _ in module.averages.named_buffers())}


def test_samples_are_theirs_whatever_the_batch():
    module = plain()
    with torch.no_grad():
        all_at_once, alone = module(torch.arange(4)), module(torch.tensor([2]))
        other_stage = module(torch.arange(4), "val")
    torch.testing.assert_close(all_at_once[2:3], alone, rtol=1e-5, atol=1e-6)  # float32
    assert not torch.equal(all_at_once, other_stage)


def test_optimized_noise_keeps_its_norm():
    module = model("noise", lr=1.0)
    fitted(module, None, max_epochs=2)
    norms = module._noise(torch.arange(4), "train").flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((4,), 256.0).sqrt(), rtol=1e-5, atol=0.0)


@pytest.mark.slow  # three seconds each
@pytest.mark.parametrize("optimize", ["weights", "lora"])
def test_priors_begin_at_zero_and_hold_back(optimize):
    moved = {}
    for prior, weight in ((None, 1.0), ("l2", 100.0), ("kl", 100.0)):
        module = model(optimize, prior=prior, prior_weight=weight, optimizer="sgd", lr=1e-3)
        start = trained(module)
        first = []
        module.log = lambda name, value, first=first, **_: first.append(value) if name == "prior" else None
        fitted(module, None, max_epochs=3)
        assert prior is None or first[0] < 1e-9
        moved[prior] = sum((start[n] - v).square().sum() for n, v in trained(module).items())
    assert moved["l2"] < moved[None]
    assert moved["kl"] != moved[None]


def test_the_kl_of_two_gaussians_is_an_integral():
    """Predictions that differ by a constant: the divergence is the length of the log-SNR interval times its square."""
    from contextlib import contextmanager

    from diffusion_problems import STABLE_DIFFUSION

    from lightning_bpfree.methods.diffusion_adjoint.priors import kl

    ours, theirs = (
        bpf.DiffusionSampler(lambda x, time, c=c: torch.full_like(x, c), STABLE_DIFFUSION, num_steps=4)
        for c in (0.5, 0.2)
    )

    @contextmanager
    def frozen():
        yield theirs

    nodes = STABLE_DIFFUSION.grid(4)
    length = torch.tensor([node.alpha / node.sigma for node in (nodes[0], nodes[-2])]).log().diff()
    found = kl(ours, torch.randn(2, 3), {}, frozen, torch.Generator())
    torch.testing.assert_close(found, (length * 0.09)[0].to(found), rtol=1e-5, atol=0.0)


def test_the_kl_of_two_flows_is_that_of_their_noises():
    from contextlib import contextmanager

    from lightning_bpfree.methods.diffusion_adjoint.priors import kl

    schedule = bpf.FlowMatching()
    ours, theirs = (
        bpf.DiffusionSampler(lambda x, time, c=c: torch.full_like(x, c), schedule, "flow_prediction", num_steps=4)
        for c in (0.5, 0.2)
    )

    @contextmanager
    def frozen():
        yield theirs

    draw = torch.rand((), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    low, high = (torch.tensor((1 - s) / s, dtype=torch.float64).log() for s in (0.75, 0.25))  # the inner nodes
    alpha = torch.sigmoid(low + (high - low) * draw)  # alpha / (1 - alpha) is the signal-to-noise ratio
    found = kl(ours, torch.randn(2, 3), {}, frozen, torch.Generator().manual_seed(7))
    # The noise is x + alpha v, so that noises differ by alpha times what velocities do.
    torch.testing.assert_close(found.double(), (high - low) * (alpha * 0.3).square(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("bad", "count"), [([float("nan")] * 4, 4), ([float("inf"), 1.0, 1.0, 1.0], 1)])
def test_rewards_that_are_not_finite_leave_parameters_intact(bad, count):
    calls = []

    def spoiled(images):
        calls.append(len(images))
        return bright(images) * torch.tensor(bad if len(calls) > 1 else [1.0] * 4)

    module = plain(reward=spoiled)
    after_first = {}
    module.on_train_batch_end = lambda *_: after_first.update(trained(module))
    with pytest.raises(
        RuntimeError, match=rf"reward spoiled gave NaN or infinity for {count} of 4 values\. No parameter"
    ):
        fitted(module, None, bpf.DiffusionAdjoint(), limit_val_batches=0, num_sanity_val_steps=0)
    assert after_first
    assert all(torch.equal(value, after_first[name]) for name, value in trained(module).items())


def test_rewards_by_prompt_and_metrics_of_torchmetrics():
    seen = []

    def by_prompt(images, numbers):
        seen.append(numbers.tolist())
        return bright(images)

    fitted(model("lora", by_prompt), None, limit_val_batches=0)
    assert seen[0] == [0, 1, 2, 0]
    module = model("lora", TotalVariation(), judges={"brightness": bright})
    trainer = fitted(module, None)
    assert {"val_reward", "val_brightness", "train_reward"} <= set(trainer.callback_metrics)
    assert module.reward.update_count == 1  # a reward is of one batch, and holds no graph of those before

    with pytest.raises(ValueError, match=r"returned shape \(4, 3\) for 4 images"):
        fitted(model("lora", lambda images: images.mean((2, 3))), None, limit_val_batches=0)


RULES = {
    "zeroth_order": lambda: bpf.ZerothOrder(4, sigma=0.05),
    "evolution_strategy": lambda: bpf.EvolutionStrategy(bpf.SNES(sigma=0.3), 4, chunk_size=1),
}


@pytest.mark.parametrize("rule", RULES)
def test_rewards_without_a_derivative(rule):
    options = {"embeddings": None, "guidance_scale": 1.0, "lr": 0.5, "fixed_noise": True, "optimizer": "sgd"}
    module = model("lora", white, image_pipeline(), **options)
    with torch.no_grad():
        before = white(module(torch.arange(8))).mean()
    trainer = fitted(module, None, RULES[rule](), bpf.DiffusionAdjoint(), max_epochs=4, limit_val_batches=0)
    with torch.no_grad():
        assert white(module(torch.arange(8))).mean() > before
    # Every evaluation of the rule is counted, also those that leave no trace in the module; rehearsals are not, as in
    # the rule's own count. Each evaluation is two steps of the sampler.
    evaluations = {"zeroth_order": 9, "evolution_strategy": 5}[rule]
    assert trainer.callback_metrics["bpfree/network_evals"] == 2 * (4 * 2 * evaluations)
    assert trainer.callback_metrics["bpfree/forward_evals"] == 4 * 2 * evaluations


def test_backprop_refuses_a_reward_without_a_derivative():
    with pytest.raises(RuntimeError, match=r"reward white has no derivative.*ZerothOrder"):
        fitted(plain(reward=white), None, limit_val_batches=0)


def test_images_are_written(tmp_path):
    from PIL import Image

    module = plain(image_every=2)
    fitted(module, None, max_epochs=2, default_root_dir=tmp_path)
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["epoch_0000_before.png", "epoch_0002.png", "epoch_0002_after.png"]
    with Image.open(tmp_path / "images" / names[0]) as grid:
        assert grid.size == (136, 136)  # 2 x 2 images of 8 pixels, enlarged, with borders


def test_images_go_to_loggers_that_take_them(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    taken = []

    class Images(CSVLogger):
        def log_image(self, key, images, caption):
            taken.append((key, caption, images[0].size))

    fitted(plain(image_every=1), None, max_epochs=1, logger=Images(tmp_path))
    assert taken[0] == ("images", ["epoch_0000_before"], (136, 136))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimize": "unet"}, "optimize='unet': choose 'noise'"),
        ({"optimizer": "lion"}, "optimizer='lion'"),
        ({"prior": "l1"}, "prior='l1'"),
        ({"optimize": "noise", "prior": "kl"}, "prior='kl' compares networks"),
        ({"prior": "l2", "prior_weight": 0.0}, "prior_weight=0.0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"lora_targets": ["q_proj"]}, r"lora_targets=\['q_proj'\]: no layer"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"embeddings": {"text": torch.zeros(1)}}, r"embeddings have \['text'\]"),
        ({"prompts": ["a"]}, "prompts and embeddings are both given"),
        ({"optimize": "prompt_embeds", "embeddings": None}, "starts from prompts"),
        ({"pipe": image_pipeline, "prompts": ["a"], "embeddings": None}, "reads no prompts"),
    ],
)
def test_arguments(settings, message):
    settings = {"optimize": "lora", **settings}
    if "pipe" in settings:
        settings["pipe"] = settings["pipe"]()
    with pytest.raises(ValueError, match=message):
        model(**settings)


def test_folders_and_files_that_do_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="pipeline='nowhere'"):
        bpf.RewardFineTuning("nowhere", bright)
    with pytest.raises(FileNotFoundError, match="embeddings="):
        model(embeddings=str(tmp_path / "none.safetensors"))
