"""Detection of a LightningModule's samplers and diffusers pipelines, which are made differentiable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from lightning_bpfree.methods.diffusion_adjoint.pipeline_sampler import PipelineCall
from lightning_bpfree.methods.diffusion_adjoint.sampler import DiffusionSampler


class Held(ABC):
    """Something that a module samples from, for the time of a fit.

    Args:
        name: name of the module's attribute.
        sampler: which draws the samples.
    """

    def __init__(self, name: str, sampler: DiffusionSampler) -> None:
        self.name, self.sampler = name, sampler
        self._evals = sampler.network_evals

    @abstractmethod
    def install(self) -> None:
        """Make it differentiable by the given settings."""

    @abstractmethod
    def remove(self) -> None:
        """Restore the previous state."""

    def describe(self) -> str:
        """Return solver and steps in a few words."""
        settings = self.sampler.settings
        return f"{settings.solver}, {settings.num_steps} steps"

    def take_evals(self) -> float:
        """Return evaluations of the network since the last call."""
        before, self._evals = self._evals, self.sampler.network_evals
        return self._evals - before


class HeldSampler(Held):
    """A sampler of this package, with other settings.

    Args:
        name: name of the module's attribute.
        sampler: the sampler.
        settings: those that it gets.
    """

    def __init__(self, name: str, sampler: DiffusionSampler, settings: dict[str, Any]) -> None:
        super().__init__(name, sampler)
        self._own = sampler.settings
        self._wanted = sampler.settings._replace(**settings).checked()

    def install(self) -> None:
        """Give the sampler its settings."""
        self.sampler.settings = self._wanted

    def remove(self) -> None:
        """Give the sampler the settings that it had."""
        self.sampler.settings = self._own


class HeldPipeline(Held):
    """A pipeline of diffusers, whose calls return images with gradients.

    A call is looked up on the class, not on the object, so the object gets a class of its own.

    Args:
        name: name of the module's attribute.
        pipe: the pipeline.
        settings: those of the sampler that are not taken from the call.
    """

    def __init__(self, name: str, pipe: Any, settings: dict[str, Any]) -> None:
        self._pipe, self._kind = pipe, type(pipe)
        call = PipelineCall(pipe, settings)
        super().__init__(name, call.sampler)

        def differentiable(pipe: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001  # bound in `call` already
            names = [name for name in call.defaults if name != "self"]
            return call(**dict(zip(names, args, strict=False)), **kwargs)

        own = {"__call__": differentiable, "__module__": self._kind.__module__, "__doc__": self._kind.__doc__}
        self._differentiable = type(self._kind.__name__, (self._kind,), own)

    def install(self) -> None:
        """Let calls of the pipeline go through the sampler."""
        self._pipe.__class__ = self._differentiable

    def remove(self) -> None:
        """Give the pipeline its class back, unless someone else has changed it since."""
        if type(self._pipe) is self._differentiable:
            self._pipe.__class__ = self._kind

    def describe(self) -> str:
        """Return what it is."""
        return f"{self._kind.__name__}, {self.sampler.settings.solver}"


def held_samplers(module: nn.Module, settings: dict[str, Any]) -> list[Held]:
    """Return the samplers and pipelines that a module and its parts hold as attributes, each once.

    Args:
        module: the module.
        settings: settings of the sampler.

    Raises:
        ValueError: for a pipeline that cannot be differentiated.
    """
    found: list[Held] = []
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        if isinstance(part, DiffusionSampler):
            found.append(HeldSampler(prefix or "the module", part, settings))
            continue
        for key, value in vars(part).items():
            if _is_pipeline(value) and id(value) not in seen:
                seen.add(id(value))
                found.append(HeldPipeline(f"{prefix}.{key}" if prefix else key, value, settings))
    return found


def _is_pipeline(value: Any) -> bool:
    return any(kind.__name__ == "DiffusionPipeline" for kind in type(value).__mro__)
