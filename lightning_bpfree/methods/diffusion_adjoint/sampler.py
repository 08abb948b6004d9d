"""A diffusion sampler as a differentiable module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, cast, get_type_hints

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import Unpack  # torch needs it too

from lightning_bpfree.core.arguments import Fraction, NonNegativeFloat, PositiveInt, check, checked
from lightning_bpfree.core.replay.uncounted import counts
from lightning_bpfree.methods.diffusion_adjoint.evaluations import Solve
from lightning_bpfree.methods.diffusion_adjoint.fields import Conditioning, Denoiser, GuidedField, Prediction
from lightning_bpfree.methods.diffusion_adjoint.gradients import Gradient, solved
from lightning_bpfree.methods.diffusion_adjoint.plans import TABLEAUS, Evaluate, Plan, Solver, plan
from lightning_bpfree.methods.diffusion_adjoint.schedules import Node, Schedule


class Options(TypedDict, total=False):
    """The settings of a sampler as keywords; :class:`Settings` says what they mean."""

    num_steps: PositiveInt
    solver: Solver
    gradient: Gradient
    guidance_scale: NonNegativeFloat
    guidance_rescale: Fraction
    last_steps: PositiveInt
    micro_batch: PositiveInt | None
    split_guidance: bool


class Settings(NamedTuple):
    """How a sampler solves its ODE, and how it is differentiated.

    Attributes:
        num_steps: number of solver steps, at least 1.
        solver: ``"euler"`` (DDIM), ``"midpoint"``, ``"heun"``, ``"rk4"`` or ``"dpmpp_2m"``.
        gradient: ``"exact_adjoint"``, ``"adjoint"``, ``"checkpoint"``, ``"direct"`` or ``"truncated"``.
        guidance_scale: scale of classifier-free guidance, at least 0; 1 for none.
        guidance_rescale: in [0, 1]; how far standard deviations are moved back.
        last_steps: steps that ``"truncated"`` differentiates, at least 1.
        micro_batch: samples that are solved, and differentiated, at a time, at least 1. None for all: then the exact
            adjoint keeps the activations of the last evaluation instead of evaluating it twice.
        split_guidance: evaluate with and without the prompt one after another.
    """

    num_steps: int = 20
    solver: Solver = "euler"
    gradient: Gradient = "exact_adjoint"
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    last_steps: int = 1
    micro_batch: int | None = None
    split_guidance: bool = False

    def checked(self, owner: str = "DiffusionSampler") -> Settings:
        """Return these settings, or raise ValueError for what is out of range, naming whose they are."""
        for name, hint in get_type_hints(Options, include_extras=True).items():
            check(owner, name, getattr(self, name), hint)
        if self.gradient == "adjoint" and self.solver not in TABLEAUS:
            raise ValueError(
                f"{owner}: gradient='adjoint' solves an ODE backwards by one of {', '.join(TABLEAUS)}; "
                f"solver={self.solver!r} has no such form: use gradient='exact_adjoint', which has the same memory."
            )
        return self


class DiffusionSampler(nn.Module):
    """Samples from a diffusion model, differentiable in the initial noise, the conditioning and the network's weights.

    The ODE of the model is solved in variables without its stiff part. ``gradient`` determines the cost and memory of a
    backward pass, but not the samples. Under ``torch.no_grad()`` nothing is stored.

    Args:
        denoiser: ``denoiser(x, time, **conditioning)``, which returns a prediction with the shape of x; a module, so
            that its parameters get gradients.
        schedule: the noise schedule.
        prediction: what the network predicts: ``"epsilon"``, ``"sample"``, ``"v_prediction"``, ``"score"``; under flow
            matching ``"flow_prediction"``.
        **settings: see :class:`Settings`.

    Raises:
        ValueError: for arguments out of range, and for a prediction that the schedule does not support.

    Examples:
        >>> from lightning_bpfree.methods.diffusion_adjoint.schedules import DiscreteVP
        >>> class Net(nn.Linear):
        ...     def forward(self, x, time):
        ...         return super().forward(x)
        >>> sampler = DiffusionSampler(Net(3, 3), DiscreteVP.from_betas(), num_steps=10)
        >>> noise = torch.randn(5, 3, requires_grad=True)
        >>> sampler(noise).sum().backward()
        >>> noise.grad.shape, sampler.denoiser.weight.grad.shape
        (torch.Size([5, 3]), torch.Size([3, 3]))

    References:
        J. Pan et al., "AdjointDPM: Adjoint Sensitivity Method for Gradient Backpropagation of Diffusion Probabilistic
        Models", 2024, arXiv 2307.10711.
        J. Song, C. Meng, S. Ermon, "Denoising Diffusion Implicit Models", 2021, arXiv 2010.02502.
        C. Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", 2022,
        arXiv 2211.01095.
    """

    @checked
    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        prediction: Prediction = "epsilon",
        **settings: Unpack[Options],
    ) -> None:
        super().__init__()
        if prediction not in schedule.predictions:
            raise ValueError(
                f"DiffusionSampler: prediction={prediction!r}: it does not belong to {type(schedule).__name__}, which "
                f"has {', '.join(schedule.predictions)}."
            )
        self.denoiser, self.schedule, self.prediction = denoiser, schedule, prediction
        self.settings = Settings(**settings).checked()
        self._counter = _Counter()

    @property
    def network_evals(self) -> float:
        """Network evaluations per sample so far, in forward and backward passes; guidance takes two.

        Rehearsals and measurements of a training rule do not count toward its cost, and are excluded.
        """
        return self._counter.count

    @contextlib.contextmanager
    def using(self, settings: Settings) -> Iterator[None]:
        """Sample with other settings in this context."""
        before, self.settings = self.settings, settings.checked()
        try:
            yield
        finally:
            self.settings = before

    def forward(
        self,
        noise: Tensor,
        conditioning: Conditioning | None = None,
        unconditional: Conditioning | None = None,
    ) -> Tensor:
        """Return samples with the shape of ``noise``, in at least single precision.

        Args:
            noise: standard normal, shape (B, ...).
            conditioning: keyword arguments of the network, each of shape (B, ...) or (1, ...).
            unconditional: the same names for an empty prompt; needed if ``guidance_scale`` is not 1.

        Raises:
            ValueError: if noise, conditioning and settings are incompatible.
            RuntimeError: in inference mode, if a gradient is required.
        """
        settings, conditioning = self.settings, dict(conditioning or {})
        unconditional = None if settings.guidance_scale == 1.0 else unconditional
        self._check(noise, conditioning, unconditional)
        size = len(noise) if settings.micro_batch is None else settings.micro_batch
        solve = plan(settings.solver, self.schedule, settings.num_steps)
        parts = [
            self._solve(
                solve,
                noise[i : i + size],
                _rows(conditioning, i, size, len(noise)),
                _rows(unconditional, i, size, len(noise)),
                len(noise),
            )
            for i in range(0, len(noise), size)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def derivative(self, y: Tensor, node: Node, conditioning: Conditioning) -> Tensor:
        """Return the ODE's right-hand side for a prompt, without guidance, with autograd's own graph.

        Args:
            y: the state at the node, shape (B, ...).
            node: the node of the schedule.
            conditioning: as in :meth:`forward`.
        """
        with self.using(self.settings._replace(guidance_scale=1.0)):
            inputs = _Inputs(self, conditioning, {}, len(y))
        return inputs(node, y, inputs.tensors)

    def _solve(
        self,
        solve: Plan,
        noise: Tensor,
        conditioning: Conditioning | None,
        unconditional: Conditioning | None,
        batch: int,
    ) -> Tensor:
        settings = self.settings
        _check_operations(solve, self.prediction, settings.solver)
        field = _Inputs(self, conditioning or {}, unconditional or {}, batch)
        last_steps = settings.last_steps if settings.gradient == "truncated" else None
        if last_steps is not None and torch.is_grad_enabled() and noise.requires_grad and not field.tensors:
            raise ValueError(
                "gradient='truncated' stops before the initial noise, and nothing else needs a gradient: use "
                "gradient='exact_adjoint' to optimize noise."
            )
        start, end = solve.nodes[0], solve.nodes[-1]
        y = noise.to(torch.promote_types(noise.dtype, torch.float32)) / start.scale
        # Parts of a batch would each hold a graph until the backward pass.
        keep_last = settings.micro_batch is None
        task = Solve(solve, self.schedule, field, settings.solver, last_steps, keep_last)
        y = solved(task, settings.gradient, y, field.tensors)
        return y if end.scale == 1.0 else y * end.scale

    def _check(self, noise: Tensor, conditioning: Conditioning, unconditional: Conditioning | None) -> None:
        if noise.dim() < 1 or not noise.is_floating_point() or len(noise) == 0:
            raise ValueError(f"noise has shape {tuple(noise.shape)} and type {noise.dtype}: give floats, (B, ...).")
        if self.settings.guidance_scale != 1.0:
            if unconditional is None:
                raise ValueError(
                    f"guidance_scale={self.settings.guidance_scale} needs `unconditional`, the conditioning of an "
                    "empty prompt; give it, or guidance_scale=1."
                )
            if set(unconditional) != set(conditioning):
                raise ValueError(
                    f"conditioning has {sorted(conditioning)}, unconditional {sorted(unconditional)}: both need the "
                    "same names."
                )
        for name, value in [*conditioning.items(), *(unconditional or {}).items()]:
            if value.dim() == 0 or len(value) not in (1, len(noise)):
                raise ValueError(
                    f"conditioning {name!r} has shape {tuple(value.shape)}: give {len(noise)} rows, as the noise has, "
                    "or 1."
                )
        self._check_mode([noise, *conditioning.values(), *(unconditional or {}).values()])

    def _check_mode(self, tensors: list[Tensor]) -> None:
        wanted = torch.is_grad_enabled() or any(tensor.requires_grad for tensor in tensors)
        if torch.is_inference_mode_enabled() and wanted:
            raise RuntimeError(
                "gradients through a sampler are not recorded in inference mode: use Trainer(inference_mode=False) "
                "and, where gradients are off, torch.enable_grad()."
            )
        if torch.is_grad_enabled() and any(tensor.is_inference() for tensor in tensors):
            raise RuntimeError(
                "noise or conditioning was made in inference mode, and has no gradient: clone it outside of that mode."
            )


def _check_operations(solve: Plan, prediction: str, solver: str) -> None:
    at_zero = any(isinstance(o, Evaluate) and o.node.sigma == 0.0 for o in solve.operations)
    if at_zero and prediction == "sample":
        raise ValueError(
            f"solver={solver!r} evaluates the network at data without noise, where a predicted sample says nothing of "
            "the noise: use 'euler', 'midpoint' or 'dpmpp_2m', or a schedule with end_at_zero=False."
        )


def _rows(conditioning: Conditioning | None, start: int, size: int, batch: int) -> Mapping[str, Tensor] | None:
    if conditioning is None or size >= batch:
        return conditioning
    return {k: v if len(v) == 1 and batch > 1 else v[start : start + size] for k, v in conditioning.items()}


class _Counter:
    """A number in a separate object: rules that evaluate a step again restore attributes of modules."""

    def __init__(self) -> None:
        self.count = 0.0


class _Inputs:
    """The field of one solve, as a function of every tensor that needs a gradient beside y.

    Args:
        sampler: whose network and settings.
        conditioning: of the prompt.
        unconditional: of the empty prompt; empty where there is no guidance.
        batch: samples of the whole batch, of which this solve may be a part.
    """

    def __init__(
        self, sampler: DiffusionSampler, conditioning: Conditioning, unconditional: Conditioning, batch: int
    ) -> None:
        self.parts = (conditioning, unconditional)
        self.denoiser = sampler.denoiser
        self.places = _trained(self.denoiser) if isinstance(self.denoiser, nn.Module) else {}
        # Everything that needs a gradient is an input of its own.
        self.names = [(i, name) for i, part in enumerate(self.parts) for name in part if part[name].requires_grad]
        weights = [owner._parameters[key] for owner, key in self.places.values()]
        self.tensors: list[Any] = [*(self.parts[i][name] for i, name in self.names), *weights]

        counter = sampler._counter

        def count(rows: int) -> None:
            if counts():
                counter.count += rows / batch

        self.guided = GuidedField(
            self.denoiser,
            sampler.prediction,
            guidance_scale=sampler.settings.guidance_scale,
            guidance_rescale=sampler.settings.guidance_rescale,
            split_guidance=sampler.settings.split_guidance,
            dtype=_dtype(self.denoiser),
            count=count,
        )

    def __call__(self, node: Node, y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Return the derivative at a node, with ``tensors`` in place of those that need a gradient."""
        parts = [dict(part) for part in self.parts]
        for (i, name), value in zip(self.names, tensors, strict=False):
            parts[i][name] = value
        self.guided.denoiser = self._with_weights(tensors[len(self.names) :])
        return self.guided(node, y, parts[0], parts[1] if self.parts[1] else None)

    def _with_weights(self, weights: Sequence[Tensor]) -> Denoiser:
        """Return the denoiser with these parameters: itself, if it still has them, as it nearly always does."""
        pairs = zip(self.places.values(), weights, strict=True)
        if all(owner._parameters.get(key) is weight for (owner, key), weight in pairs):
            return self.denoiser
        module, named = cast("nn.Module", self.denoiser), dict(zip(self.places, weights, strict=True))
        return lambda *args, **kwargs: functional_call(module, named, args, kwargs)


def _trained(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return by name where the parameters are that need a gradient; a shared one once."""
    seen, places = set[int](), {}
    for prefix, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                places[f"{prefix}.{key}" if prefix else key] = (owner, key)
    return places


def _dtype(denoiser: Denoiser) -> torch.dtype | None:
    parameters = denoiser.parameters() if isinstance(denoiser, nn.Module) else ()
    return next((parameter.dtype for parameter in parameters if parameter.is_floating_point()), None)
