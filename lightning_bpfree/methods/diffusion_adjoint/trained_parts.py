"""The trained parameters of a fine-tuning: all weights of the network, or LoRA on some layers, and their averages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Optimize = Literal["noise", "prompt_embeds", "weights", "lora"]


def add_lora(network: nn.Module, rank: int, targets: Sequence[str]) -> list[str]:
    """Add low-rank adapters to layers of a network, freeze all else, and return the names of these layers.

    Args:
        network: changed in place.
        rank: rank of the adapters, at least 1.
        targets: ends of layers' names, such as ``"to_q"``.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: where no layer has one of the names.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('optimize="lora" needs peft: pip install "lightning-bpfree[diffusion]"') from error
    names = [name for name, _ in network.named_modules()]
    if not any(name == target or name.endswith(f".{target}") for name in names for target in targets):
        raise ValueError(
            f"lora_targets={list(targets)}: no layer of {type(network).__name__} has one of these names at the end of "
            "its own. See its named_modules()."
        )
    network.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), network)
    return [name for name, part in network.named_modules() if _is_lora(part)]


def _is_lora(part: nn.Module) -> bool:
    return hasattr(part, "get_delta_weight") and hasattr(part, "lora_A")


def updates(network: nn.Module) -> list[Tensor]:
    """Return what the adapters add to their layers' weights."""
    layers: list[Any] = [part for part in network.modules() if _is_lora(part)]
    return [layer.get_delta_weight(name) for layer in layers for name in layer.active_adapters]


@contextlib.contextmanager
def without_lora(network: nn.Module) -> Iterator[None]:
    """Let a network compute without its adapters."""
    layers: list[Any] = [part for part in network.modules() if _is_lora(part)]
    states = [{name: p.requires_grad for name, p in layer.named_parameters()} for layer in layers]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer, state in zip(layers, states, strict=True):
            layer.enable_adapters(True)
            for name, parameter in layer.named_parameters():  # peft switches gradients with the adapters
                parameter.requires_grad_(state[name])


class Averages(nn.Module):
    """Exponential moving averages of parameters, kept as buffers.

    Args:
        parameters: the parameters.
        decay: share of the old average that stays in a step, in (0, 1).

    Examples:
        >>> weight = nn.Parameter(torch.zeros(1))
        >>> averages = Averages([weight], decay=0.75)
        >>> _ = weight.data.fill_(4.0)
        >>> averages.update()
        >>> with averages.in_place():
        ...     print(weight.item())
        1.0
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        super().__init__()
        self.decay = decay
        self._parameters_of: list[nn.Parameter] = list(parameters)
        for index, parameter in enumerate(self._parameters_of):
            self.register_buffer(f"average_{index}", parameter.detach().clone())

    def _averages(self) -> list[Tensor]:
        return list(self.buffers())

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters."""
        for average, parameter in zip(self._averages(), self._parameters_of, strict=True):
            average.lerp_(parameter.to(average), 1.0 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Compute with the averages in place of the parameters."""
        own = [parameter.data for parameter in self._parameters_of]
        for parameter, average in zip(self._parameters_of, self._averages(), strict=True):
            parameter.data = average.to(parameter)
        try:
            yield
        finally:
            for parameter, value in zip(self._parameters_of, own, strict=True):
                parameter.data = value
