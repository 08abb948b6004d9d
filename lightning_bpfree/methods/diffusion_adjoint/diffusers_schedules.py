"""Schedules of diffusers' schedulers, and checks for settings that a differentiable solve does not support."""

from __future__ import annotations

from typing import Any, cast

import torch

from lightning_bpfree.methods.diffusion_adjoint.fields import Prediction
from lightning_bpfree.methods.diffusion_adjoint.schedules import DiscreteVP, FlowMatching, Schedule

VARIANCE_PRESERVING = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
FLOW_MATCHING = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")

# Settings that change the samples in a way that this package's solvers do not have.
_CLIPPING = {
    "clip_sample": "it clips the predicted data, where the gradient dies",
    "thresholding": "it clips the predicted data by a quantile, where the gradient dies",
}
_OTHER_NODES = {
    "use_karras_sigmas": "the solver has nodes of its own",
    "use_exponential_sigmas": "the solver has nodes of its own",
    "use_beta_sigmas": "the solver has nodes of its own",
    "stochastic_sampling": "the solver is deterministic",
    "invert_sigmas": "the solver goes from noise to data",
}


def schedule_of(scheduler: Any, prediction: str | None = None, mu: float | None = None) -> tuple[Schedule, Prediction]:
    """Return the schedule of a diffusers scheduler, and what its network predicts.

    The scheduler's numbers are taken, its ``step`` is not: a solver of this package has its own nodes, keeps double
    precision, and has no state.

    Args:
        scheduler: a diffusers scheduler.
        prediction: what the network predicts, to be compared with the scheduler's own word; None takes that.
        mu: of a flow's dynamic shift, which depends on the size of the image.

    Raises:
        ValueError: for a scheduler that a solver cannot represent, for settings under which gradients die, and for a
            prediction that is not the scheduler's.

    Examples:
        >>> class FlowMatchEulerDiscreteScheduler:
        ...     config = {"shift": 3.0}
        >>> schedule, prediction = schedule_of(FlowMatchEulerDiscreteScheduler())
        >>> prediction, round(schedule.grid(2)[1].rho, 2)
        ('flow_prediction', 0.75)
    """
    name, config = type(scheduler).__name__, dict(scheduler.config)
    if name not in (*VARIANCE_PRESERVING, *FLOW_MATCHING):
        raise ValueError(
            f"scheduler {name} has no schedule that the solvers can represent. Supported are "
            f"{', '.join((*VARIANCE_PRESERVING, *FLOW_MATCHING))}: build one of them by its from_config(...)."
        )
    for setting, reason in {**_CLIPPING, **_OTHER_NODES}.items():
        if config.get(setting):
            raise ValueError(
                f"{setting}=True of {name}: {reason}. Use pipe.scheduler = "
                f"{name}.from_config(pipe.scheduler.config, {setting}=False)."
            )
    flow = name in FLOW_MATCHING or bool(config.get("use_flow_sigmas"))
    own = "flow_prediction" if flow else str(config.get("prediction_type", "epsilon"))
    if prediction is not None and prediction != own:
        raise ValueError(
            f"prediction={prediction!r}, but {name} says that the network predicts {own!r}: leave prediction out, or "
            "correct the scheduler's prediction_type."
        )
    schedule = _flow(config, mu) if flow else _variance_preserving(scheduler, config)
    if own not in schedule.predictions:
        raise ValueError(f"prediction_type={own!r} of {name} is not supported: {', '.join(schedule.predictions)} are.")
    return schedule, cast("Prediction", own)


def _variance_preserving(scheduler: Any, config: dict[str, Any]) -> DiscreteVP:
    at_zero = config.get("set_alpha_to_one", config.get("final_sigmas_type", "zero") == "zero")
    return DiscreteVP(
        scheduler.alphas_cumprod.to("cpu", torch.float64),
        spacing=config.get("timestep_spacing", "leading"),
        steps_offset=int(config.get("steps_offset", 0)),
        end_at_zero=bool(at_zero),
    )


def _flow(config: dict[str, Any], mu: float | None) -> FlowMatching:
    if not config.get("use_dynamic_shifting"):
        return FlowMatching(float(config.get("shift", config.get("flow_shift", 1.0)) or 1.0))
    if config.get("time_shift_type", "exponential") != "exponential":
        raise ValueError(
            f"time_shift_type={config['time_shift_type']!r} is not supported: use 'exponential', or a fixed shift by "
            "use_dynamic_shifting=False."
        )
    if mu is None:
        raise ValueError("use_dynamic_shifting=True needs mu, which depends on the size of the image: give mu.")
    return FlowMatching(mu=mu)


def dynamic_mu(config: Any, tokens: int) -> float | None:
    """Return the exponent of a flow's dynamic shift for an image of so many tokens; None where there is none.

    Args:
        config: of the scheduler.
        tokens: patches of the image.
    """
    if not config.get("use_dynamic_shifting"):
        return None
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (high - low) * (tokens - few) / (many - few))
