"""Fine-tuning of a diffusion model, its prompts or its noise with a reward for images, as a LightningModule."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bpfree.core.arguments import (
    NonEmpty,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    checked,
)
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.methods.diffusion_adjoint.image_grids import save_grid
from lightning_bpfree.methods.diffusion_adjoint.pipeline_sampler import PipelineSampler, load_pipeline
from lightning_bpfree.methods.diffusion_adjoint.plans import Solver
from lightning_bpfree.methods.diffusion_adjoint.priors import Prior, check_prior, kl, l2
from lightning_bpfree.methods.diffusion_adjoint.prompt_table import Embeddings, check_table, encoded, rows
from lightning_bpfree.methods.diffusion_adjoint.rewards import check_finite, name_of, scored
from lightning_bpfree.methods.diffusion_adjoint.sampler import DiffusionSampler, Settings
from lightning_bpfree.methods.diffusion_adjoint.trained_parts import (
    Averages,
    Optimize,
    add_lora,
    updates,
    without_lora,
)
from lightning_bpfree.training.trainer_attributes import is_dry_run

_STAGES = {"train": 0, "val": 1, "test": 2}
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


class RewardFineTuning(pl.LightningModule):
    """Maximizes a reward for the images of a diffusion pipeline, by gradients through its sampler.

    The gradient is that of :class:`~lightning_bpfree.methods.diffusion_adjoint.callback.DiffusionAdjoint` in the
    Trainer, or the exact adjoint without one. A reward without a derivative needs a rule that only evaluates the
    training step, such as ``ZerothOrder`` or ``EvolutionStrategy`` on a LoRA. The module has its own data loaders:
    batches are numbers of samples, and each number determines the noise and the prompt of its sample, on every device.

    Logs ``train_reward``, ``prior`` if there is one, ``val_reward`` and ``val_<judge>``. Checkpoints hold the trained
    parameters, not the pipeline.

    Args:
        pipeline: folder of a pipeline in the diffusers format, or a pipeline.
        reward: maps images in [0, 1], shape (B, C, H, W), to one number per image or one for all, which is maximized;
            if it has a second argument, it gets the numbers of their prompts, int64 of shape (B,). A callable, or a
            metric of torchmetrics.
        optimize: ``"noise"`` (of ``batch_size`` images), ``"prompt_embeds"``, ``"weights"`` or ``"lora"``.
        prompts: texts, which samples use in turn. None for a model without text.
        embeddings: encoded prompts instead, or a safetensors file with them.
        negative_prompt: the text that guidance steers away from.
        judges: further scores by name, which are measured in validation and never trained on.
        batch_size: samples per step, at least 1.
        batches_per_epoch: at least 1.
        val_samples: at least 1; for ``"noise"``, the images themselves.
        num_steps: number of solver steps, at least 1.
        solver: ``"euler"`` (DDIM), ``"midpoint"``, ``"heun"``, ``"rk4"`` or ``"dpmpp_2m"``.
        guidance_scale: scale of classifier-free guidance; 1 for none.
        lr: learning rate, above 0.
        optimizer: ``"adamw"``, ``"adam"`` or ``"sgd"``.
        lora_rank: at least 1.
        lora_targets: suffixes of the names of the layers that get adapters.
        prior: ``"l2"``, the mean squared change of the trained numbers (for LoRA, the update of the weights);
            ``"kl"``, the divergence of the model's reverse diffusion from the frozen model's; None.
        prior_weight: its factor, above 0.
        ema_decay: decay of averages of the trained parameters, which validation uses; in (0, 1), None for none.
        keep_norm: keep the norm of each optimized noise, as for a standard normal.
        fixed_noise: train on the same noise in every epoch, instead of new noise.
        image_every: epochs between image grids in PNG files and W&B; 0 for none.
        seed: seed of the noise; None uses torch's initial seed (``seed_everything``).

    Raises:
        FileNotFoundError: if the folder of the pipeline does not exist.
        ModuleNotFoundError: if diffusers, or peft for ``"lora"``, is not installed.
        ValueError: for arguments out of range, and for pipelines that cannot be differentiated.
        RuntimeError: in training, for a reward that is not finite (parameters do not change), and for one without a
            derivative under backprop.

    Examples:
        >>> from lightning_bpfree import DiffusionAdjoint
        >>> def brightness(images):
        ...     return images.mean((1, 2, 3))
        >>> def fine_tuned(folder):
        ...     model = RewardFineTuning(folder, brightness, optimize="weights")
        ...     pl.Trainer(max_epochs=10, callbacks=[DiffusionAdjoint(num_steps=20)]).fit(model)
    """

    @checked
    def __init__(
        self,
        pipeline: Any,
        reward: Callable[..., Any],
        optimize: Optimize = "lora",
        *,
        prompts: Annotated[Sequence[str], NonEmpty()] | None = None,
        embeddings: Embeddings | None = None,
        negative_prompt: str = "",
        judges: Mapping[str, Callable[..., Any]] | None = None,
        batch_size: PositiveInt = 8,
        batches_per_epoch: PositiveInt = 10,
        val_samples: PositiveInt = 16,
        num_steps: PositiveInt = 20,
        solver: Solver = "euler",
        guidance_scale: NonNegativeFloat = 1.0,
        lr: PositiveFloat = 1e-3,
        optimizer: Literal["adamw", "adam", "sgd"] = "adamw",
        lora_rank: PositiveInt = 4,
        lora_targets: Annotated[Sequence[str], NonEmpty()] = ("to_q", "to_k", "to_v", "to_out.0"),
        prior: Prior | None = None,
        prior_weight: PositiveFloat = 1.0,
        ema_decay: OpenFraction | None = None,
        keep_norm: bool = True,
        fixed_noise: bool = False,
        image_every: NonNegativeInt = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_prior(prior, optimize)
        self.strict_loading = False  # checkpoints hold what is trained
        self.reward, self.optimize, self.judges = reward, optimize, dict(judges or {})
        self.batch_size, self.batches_per_epoch, self.val_samples = batch_size, batches_per_epoch, val_samples
        self.lr, self.optimizer_name, self.prior, self.prior_weight = lr, optimizer, prior, prior_weight
        self.keep_norm, self.fixed_noise, self.image_every = keep_norm, fixed_noise, image_every
        self.seed = torch.initial_seed() if seed is None else seed
        self._take(pipeline, Settings(num_steps, solver, guidance_scale=guidance_scale))
        self._encode(prompts, negative_prompt, embeddings)
        self._open(lora_rank, lora_targets)
        self._watch(ema_decay)

    def _take(self, pipeline: Any, settings: Settings) -> None:
        """Take network, schedule and decoder of a pipeline, without gradients by their weights."""
        pipe = load_pipeline(pipeline) if isinstance(pipeline, str) or hasattr(pipeline, "__fspath__") else pipeline
        self._source = PipelineSampler(pipe, **settings._asdict())
        self.sampler: DiffusionSampler = self._source.sampler
        # Under names of its own, so that Lightning moves it; a text encoder has done its part.
        self.decoder = getattr(pipe, "vae", None)
        for part in (self.sampler, self.decoder):
            if part is not None:
                part.requires_grad_(False).train()

    def _encode(self, prompts: Sequence[str] | None, negative_prompt: str, embeddings: Embeddings | None) -> None:
        """Keep the conditioning of all prompts, and of the empty one, as buffers."""
        table, without = encoded(self._source.family, prompts, negative_prompt, embeddings)
        check_table(table, self._source.family, self.optimize == "prompt_embeds")
        self._names = {"prompt": list(table), "negative": list(without)}
        for kind, part_of in {"prompt": table, "negative": without}.items():
            for name, tensor in part_of.items():
                self.register_buffer(f"{kind}_{name}", tensor, persistent=False)
        self.num_prompts = max((len(value) for value in table.values()), default=1)

    def _watch(self, ema_decay: float | None) -> None:
        """Average what is trained, and hold the rewards and judges that are modules."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.averages = None if ema_decay is None else Averages(trained, ema_decay)
        scores = (score for score in (self.reward, *self.judges.values()) if isinstance(score, nn.Module))
        self._scores = nn.ModuleList(scores).requires_grad_(False).train()
        self._averaged_at = 0

    def _open(self, lora_rank: int, lora_targets: Sequence[str]) -> None:
        """Make trainable what is to be trained, and keep what a prior compares with."""
        network: Any = self.sampler.denoiser
        if self.optimize == "noise":
            seeds = [mix(self.seed, 0, index) for index in range(self.batch_size)]
            self.noise = nn.Parameter(self._source.noise(seeds))
        elif self.optimize == "prompt_embeds":
            self.trained_prompts = nn.Parameter(self.get_buffer("prompt_prompt_embeds").clone())
        elif self.optimize == "lora":
            add_lora(network, lora_rank, lora_targets)
        if self.prior == "kl" and self.optimize == "weights":
            self.frozen = copy.deepcopy(self.sampler)
        if self.optimize == "weights":
            network.requires_grad_(True)
        self._origins: list[str] = []
        if self.prior == "l2" and self.optimize != "lora":
            for index, parameter in enumerate(p for p in self.parameters() if p.requires_grad):
                self.register_buffer(f"origin_{index}", parameter.detach().clone())
                self._origins.append(f"origin_{index}")

    # --- images and what they are worth ---

    def forward(self, index: Tensor, stage: str = "train") -> Tensor:
        """Return images in [0, 1] for the given sample numbers, shape (B, C, H, W)."""
        return self._source.family.decode(self._latents(index, stage))

    def _latents(self, index: Tensor, stage: str) -> Tensor:
        prompts = index % self.num_prompts
        table = {name: self.get_buffer(f"prompt_{name}") for name in self._names["prompt"]}
        if self.optimize == "prompt_embeds":
            table["prompt_embeds"] = self.trained_prompts
        without = {name: self.get_buffer(f"negative_{name}")[:1] for name in self._names["negative"]}
        return self._source.latents(self._noise(index, stage), rows(table, prompts), without or None)

    def _noise(self, index: Tensor, stage: str) -> Tensor:
        if self.optimize == "noise":
            noise: Tensor = self.noise[index]
            if not self.keep_norm:
                return noise
            dims = tuple(range(1, noise.dim()))
            norms: Tensor = noise.square().sum(dims, keepdim=True).sqrt()
            unit: Tensor = noise / norms
            return unit * math.sqrt(noise[0].numel())
        epoch = self.current_epoch if stage == "train" and not self.fixed_noise else 0
        seeds = [mix(self.seed, _STAGES[stage], epoch, number) for number in index.tolist()]
        return self._source.noise(seeds).to(index.device)

    def training_step(self, index: Tensor, batch_idx: int) -> Tensor:
        """Return the negative mean reward of a batch, plus the prior."""
        latents = self._latents(index, "train")
        rewards = scored(self.reward, self._source.family.decode(latents), index % self.num_prompts)
        if torch.is_grad_enabled():
            check_finite(self.reward, rewards.detach())
        loss = -rewards.mean()
        self.log("train_reward", -loss.detach(), on_step=True, on_epoch=True, batch_size=len(index), prog_bar=True)
        if self.prior is not None:
            distance = self._prior(latents, index)
            self.log("prior", distance.detach(), on_step=True, on_epoch=True, batch_size=len(index))
            loss = loss + self.prior_weight * distance
        if torch.is_grad_enabled() and not rewards.requires_grad:
            raise RuntimeError(
                f"reward {name_of(self.reward)} has no derivative by the images, so backprop through the sampler "
                "trains nothing: use a rule that only evaluates it, such as callbacks=[ZerothOrder(...)] or "
                "[EvolutionStrategy(...)]."
            )
        return loss

    def _prior(self, latents: Tensor, index: Tensor) -> Tensor:
        if self.prior == "l2" and self.optimize == "lora":
            moved = updates(self.sampler)
            return l2(moved, [None] * len(moved))
        if self.prior == "l2":
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return l2(trained, [self.get_buffer(name) for name in self._origins])
        table = {name: self.get_buffer(f"prompt_{name}") for name in self._names["prompt"]}
        generator = torch.Generator().manual_seed(mix(self.seed, self.current_epoch, int(index[0])))
        conditioning = rows(table, index % self.num_prompts) or {}
        return kl(self.sampler, latents, conditioning, self._frozen, generator)

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[DiffusionSampler]:
        if self.optimize == "weights":
            yield self.frozen
            return
        with without_lora(self.sampler):
            yield self.sampler

    # --- evaluation ---

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Use the averages of the trained parameters in this context, if there are any."""
        with contextlib.nullcontext() if self.averages is None else self.averages.in_place():
            yield

    def _evaluate(self, index: Tensor, stage: str) -> None:
        with self.averaged(), torch.no_grad():
            images = self(index, stage)
        for name, score in {"reward": self.reward, **self.judges}.items():
            value = scored(score, images, index % self.num_prompts).mean()
            self.log(f"{stage}_{name}", value, batch_size=len(index), sync_dist=True, prog_bar=name == "reward")

    def validation_step(self, index: Tensor, batch_idx: int) -> None:
        """Measure reward and judges on samples that training does not draw."""
        self._evaluate(index, "val")

    def test_step(self, index: Tensor, batch_idx: int) -> None:
        """Measure reward and judges on separate test samples."""
        self._evaluate(index, "test")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the averages after each optimizer step."""
        if self.averages is not None and self.global_step != self._averaged_at:
            self.averages.update()
        self._averaged_at = self.global_step

    def on_train_start(self) -> None:
        """Put networks and scores into evaluation mode, and show the images before training."""
        # Here rather than when they are made: Lightning warns of modules that are in this mode when training starts.
        for part in (self.sampler, self.decoder, self._scores):
            if part is not None:
                part.eval()
        self._averaged_at = self.global_step
        if self.global_step == 0:
            self._show("epoch_0000_before")

    def on_train_epoch_end(self) -> None:
        """Show images every ``image_every`` epochs."""
        done = self.current_epoch + 1
        if self.image_every and done % self.image_every == 0:
            self._show(f"epoch_{done:04d}")

    def on_train_end(self) -> None:
        """Show the images after training."""
        self._show(f"epoch_{self.current_epoch:04d}_after")

    def _show(self, name: str) -> None:
        if not self.image_every or not self.trainer.is_global_zero or is_dry_run(self.trainer):
            return
        index = torch.arange(self.batch_size if self.optimize == "noise" else self.val_samples, device=self.device)
        with self.averaged(), torch.no_grad():
            save_grid(self.trainer, self(index, "val"), name)

    # --- what Lightning asks for ---

    def train_dataloader(self) -> DataLoader[Any]:
        """Numbers of samples; for noise, numbers of the images, which are the same in every batch."""
        batches = self.batches_per_epoch
        if self.optimize == "noise":
            return self._loader(torch.arange(self.batch_size).repeat(batches), self.batch_size)
        return self._loader(torch.arange(self.batch_size * batches), self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """Numbers of samples for validation."""
        samples = self.batch_size if self.optimize == "noise" else self.val_samples
        return self._loader(torch.arange(samples), max(self.batch_size, 64))

    def test_dataloader(self) -> DataLoader[Any]:
        """Numbers of samples for the test."""
        return self.val_dataloader()

    def _loader(self, numbers: Tensor, batch_size: int) -> DataLoader[Any]:
        return DataLoader(TensorDataset(numbers), batch_size, collate_fn=_stacked)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the trained parameters."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return _OPTIMIZERS[self.optimizer_name](trained, lr=self.lr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Omit what the pipeline restores."""
        kept = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = checkpoint["state_dict"]
        own = ("averages.", "origin_") if self.optimize == "noise" else ("averages.",)
        checkpoint["state_dict"] = {n: v for n, v in state.items() if n in kept or n.startswith(own)}
        checkpoint["bpfree_noise_seed"] = self.seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the seed, so that noise continues as in the checkpoint's run."""
        self.seed = checkpoint.get("bpfree_noise_seed", self.seed)


def _stacked(rows_of: list[tuple[Tensor]]) -> Tensor:
    return torch.stack([number for (number,) in rows_of])
