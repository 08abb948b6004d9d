"""Differentiable sampling in any LightningModule: a callback that gives diffusion samplers a gradient."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_bpfree.core.arguments import Fraction, NonNegativeFloat, PositiveInt, checked
from lightning_bpfree.methods.diffusion_adjoint.gradients import Gradient
from lightning_bpfree.methods.diffusion_adjoint.held_samplers import Held, held_samplers
from lightning_bpfree.methods.diffusion_adjoint.plans import Solver
from lightning_bpfree.methods.diffusion_adjoint.sampler import Settings
from lightning_bpfree.training.checks import TESTED_STRATEGIES
from lightning_bpfree.training.measurement.peak_memory import peak_mib, reset_peak
from lightning_bpfree.training.trainer_attributes import log_every_n_steps

_WHOLE_PARAMETERS = ("exact_adjoint", "adjoint", "truncated")


class DiffusionAdjoint(Callback):
    """Differentiates a LightningModule's samples from a diffusion model, with the memory of one network evaluation.

    During ``fit``, samplers in the module use these settings, and calls of its diffusers pipelines
    (``self.pipe(prompt_embeds=..., latents=...)``) return differentiable images: gradients flow to the initial noise,
    the conditioning and the networks' weights, if these require gradients. The module's ``training_step`` does not
    change. After the fit, samplers and pipelines are restored, so that ``test`` and ``predict`` sample with their own
    settings. A setting that is None is taken from the sampler, or from the arguments of the call.

    All gradient modes give the same samples. ``"exact_adjoint"`` gives the exact gradient of the solver; so do
    ``"direct"`` (autograd; memory grows with the steps) and ``"checkpoint"`` (torch's). ``"adjoint"`` is AdjointDPM's:
    the gradient of the underlying ODE, with an error of the solver's order. ``"truncated"`` (DRaFT-K) differentiates
    only the last steps.

    Logs, every ``log_every_n_steps`` optimizer steps, ``bpfree/network_evals`` (cumulative, per sample) and
    ``bpfree/peak_memory`` in MiB (allocated on a CUDA device; of the process on the CPU).

    Args:
        gradient: ``"exact_adjoint"``, ``"adjoint"``, ``"checkpoint"``, ``"direct"`` or ``"truncated"``.
        num_steps: number of solver steps, at least 1.
        solver: ``"euler"`` (DDIM), ``"midpoint"``, ``"heun"``, ``"rk4"`` or ``"dpmpp_2m"``.
        guidance_scale: scale of classifier-free guidance, at least 0; 1 for none.
        guidance_rescale: in [0, 1].
        last_steps: steps that ``"truncated"`` differentiates, at least 1.
        micro_batch: samples that are solved at a time, at least 1.
        split_guidance: evaluate the network with and without the prompt one after another.

    Raises:
        ValueError: for arguments out of range; when a fit starts, for a pipeline that cannot be differentiated.
        MisconfigurationException: when a fit starts, if the module holds no sampler, or the strategy shards parameters.

    Examples:
        >>> callback = DiffusionAdjoint("exact_adjoint", num_steps=20)
        >>> callback.settings()["num_steps"]
        20

    References:
        J. Pan et al., "AdjointDPM: Adjoint Sensitivity Method for Gradient Backpropagation of Diffusion Probabilistic
        Models", 2024, arXiv 2307.10711.
        K. Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", 2024, arXiv 2309.17400.
    """

    logged: ClassVar[dict[str, str]] = {
        "bpfree/network_evals": "evaluations of the noise network since the start of the fit",
        "bpfree/peak_memory": "peak memory of the device since the last entry, in MiB (GPU only)",
    }

    @checked
    def __init__(
        self,
        gradient: Gradient = "exact_adjoint",
        num_steps: PositiveInt | None = None,
        solver: Solver | None = None,
        guidance_scale: NonNegativeFloat | None = None,
        *,
        guidance_rescale: Fraction | None = None,
        last_steps: PositiveInt | None = None,
        micro_batch: PositiveInt | None = None,
        split_guidance: bool | None = None,
    ) -> None:
        given = {
            "gradient": gradient,
            "num_steps": num_steps,
            "solver": solver,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            "last_steps": last_steps,
            "micro_batch": micro_batch,
            "split_guidance": split_guidance,
        }
        self._given: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        Settings(**self._given).checked("DiffusionAdjoint")
        self._held: list[Held] = []
        self._evals, self._logged_at = 0.0, 0

    def settings(self) -> dict[str, Any]:
        """Return the settings that override those of samplers; settings that are None are omitted."""
        return dict(self._given)

    # --- swap and undo ---

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the samplers in the module differentiable, after all checks."""
        self._check_strategy(trainer)
        self._held = held_samplers(pl_module, self._given)
        if not self._held:
            raise MisconfigurationException(
                f"DiffusionAdjoint finds nothing to differentiate in {type(pl_module).__name__}: give it an attribute "
                "with a DiffusionSampler, or a diffusers pipeline, and sample from that in training_step."
            )
        for held in self._held:
            held.install()
        names = ", ".join(f"{held.name} ({held.describe()})" for held in self._held)
        rank_zero_info(f"DiffusionAdjoint: gradient={self._given['gradient']!r} through {names}.")
        for logger in trainer.loggers:
            logger.log_hyperparams({"bpfree_diffusion": self.settings()})
        self._logged_at = trainer.global_step

    def _check_strategy(self, trainer: pl.Trainer) -> None:
        known = TESTED_STRATEGIES & {kind.__name__ for kind in type(trainer.strategy).__mro__}
        if self._given["gradient"] in _WHOLE_PARAMETERS and not known:
            raise MisconfigurationException(
                f"gradient={self._given['gradient']!r} needs whole parameters in the backward pass, which "
                f"{type(trainer.strategy).__name__} may not have: use gradient='checkpoint', one device, or "
                "strategy='ddp'."
            )

    def _restore(self) -> None:
        for held in self._held:
            held.remove()
        self._held = []

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore samplers and pipelines."""
        self._restore()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore samplers and pipelines, if the fit did not reach its end."""
        if stage == "fit":
            self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore samplers and pipelines: Lightning calls no teardown hooks after an exception."""
        self._restore()

    # --- what it costs ---

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start measuring; refuse to train in inference mode, which records no graph."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "training runs in inference mode, where nothing is recorded: leave that mode around fit."
            )
        if trainer.global_step == self._logged_at:
            reset_peak(trainer.strategy.root_device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count evaluations; log when the Trainer logs."""
        self._evals += sum(held.take_evals() for held in self._held)
        every = log_every_n_steps(trainer)
        if trainer.barebones or not every or trainer.global_step % every or trainer.global_step == self._logged_at:
            return
        self._logged_at = trainer.global_step
        values = {"bpfree/network_evals": self._evals}
        peak = peak_mib(trainer.strategy.root_device)
        if peak is not None:
            values["bpfree/peak_memory"] = peak
        pl_module.log_dict(values, on_step=True, on_epoch=False)

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Return the settings and the count of evaluations."""
        return {"settings": self.settings(), "network_evals": self._evals}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the count; warn if the checkpoint was trained with other solver settings."""
        self._evals = float(state_dict["network_evals"])
        then, now = state_dict["settings"], self.settings()
        changed = [
            f"{n}={then.get(n)!r} (now {now.get(n)!r})" for n in sorted({*then, *now}) if then.get(n) != now.get(n)
        ]
        if changed:
            rank_zero_warn(f"The checkpoint was trained by DiffusionAdjoint with {', '.join(changed)}.")
