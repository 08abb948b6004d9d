"""A lottery ticket: an initialization and a mask, with the results of training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_bpfree.core.arguments import NonNegativeInt, checked, checked_class
from lightning_bpfree.core.params import ParameterSlots, Params
from lightning_bpfree.methods.lottery_ticket.masks import Masks

_FORMAT = "lightning_bpfree.Ticket/1"


@checked_class
@dataclass
class Ticket:
    """A sparse trainable initialization: load it into a module, and train it by any rule.

    Tensors are on the CPU. Names are those of ``module.named_parameters()``; tied weights have one name.

    Args:
        masks: which weights survive; parameters without a mask are dense.
        init: all parameters at the very first initialization, unmasked.
        level: number of prunings before this level was trained, from 0.
        mean: all parameters at the end of the level; None if it has not been trained.
        std: deviations of the weights in the search distribution at the end of the level, in full shape; or None.
        buffers: the buffers at the very first initialization.
        mean_buffers: the buffers at the end of the level.
        metrics: numbers at the end of the level.
        info: plain values that describe the ticket's origin, such as rule, score and seed.

    Raises:
        ValueError: if a mask matches no parameter of ``init``.

    Examples:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> ticket = Ticket(Masks({"weight": torch.tensor([[True, False]])}), {"weight": torch.ones(1, 2)})
        >>> ticket.apply_to(net)
        >>> net.weight.tolist()
        [[1.0, 0.0]]

    References:
        R. T. Lange, H. Sprekeler, "Lottery Tickets in Evolutionary Optimization", 2023, arXiv 2306.00045.
        J. Frankle, M. Carbin, "The Lottery Ticket Hypothesis", 2019, arXiv 1803.03635.
    """

    masks: Masks
    init: Params
    level: NonNegativeInt = 0
    mean: Params | None = None
    std: Params | None = None
    buffers: Params = field(default_factory=dict)
    mean_buffers: Params = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.masks = self.masks.to("cpu")
        self.init, self.buffers = on_cpu(self.init), on_cpu(self.buffers)
        self.mean = None if self.mean is None else on_cpu(self.mean)
        self.std = None if self.std is None else on_cpu(self.std)
        self.mean_buffers = on_cpu(self.mean_buffers)
        wrong = _differences(self.masks, {name: self.init[name] for name in self.masks if name in self.init})
        if wrong:
            raise ValueError(f"Masks and init of a ticket must agree (mask | init): {'; '.join(wrong)}.")

    @checked
    def save(self, path: str | Path) -> None:
        """Write the ticket atomically to a file of plain dicts and tensors."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        partial = path.with_name(f"{path.name}.partial")
        torch.save({**content, "masks": dict(self.masks), "format": _FORMAT}, partial)
        os.replace(partial, path)  # noqa: PTH105  # named for what it does

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Ticket:
        """Read a ticket; nothing in the file is executed.

        Raises:
            ValueError: if the file does not contain a ticket.
        """
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} holds no ticket of this version: give a file that Ticket.save has written.")
        return cls(**{**content, "masks": Masks(content["masks"])})

    @checked
    def apply_to(self, module: nn.Module, weights: Literal["init", "mean"] = "init") -> None:
        """Set the parameters and buffers of ``module`` in place, bit for bit, and the pruned weights to zero.

        Args:
            module: a module with exactly the parameters of the ticket.
            weights: ``"init"`` for the first initialization, ``"mean"`` for the trained weights.

        Raises:
            ValueError: if names or shapes differ (the message lists them), or the ticket has no trained weights.
        """
        params = self.init if weights == "init" else self.mean
        if params is None:
            raise ValueError("This ticket holds no trained weights: use weights='init', and train it.")
        own = {slot.name: slot.parameter for slot in ParameterSlots(module)}
        buffers = self.buffers if weights == "init" else self.mean_buffers
        both = {name: buffer for name, buffer in module.named_buffers() if name in buffers}
        wrong = [*_differences(params, own), *_differences({name: buffers[name] for name in both}, both)]
        if wrong:
            raise ValueError(f"The ticket does not fit {type(module).__name__} (ticket | module): {'; '.join(wrong)}.")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(params[name])
            for name, buffer in both.items():
                buffer.copy_(buffers[name])
        for name, mask in self.masks.items():  # one by one, for parameters may lie on several devices
            Masks({name: mask.to(own[name].device)}).apply_(own)

    @checked
    def to_torch_pruning(self, module: nn.Module) -> None:
        """Prune ``module`` in the format of ``torch.nn.utils.prune``: ``weight`` becomes ``weight_orig`` and a mask.

        The module computes with its own weights and the ticket's masks; after :meth:`apply_to`, its output is the same.

        Args:
            module: a module with all parameters that the masks name.

        Raises:
            ValueError: if names or shapes differ.

        Examples:
            >>> net = nn.Linear(2, 1, bias=False)
            >>> ticket = Ticket(Masks({"weight": torch.tensor([[True, False]])}), {"weight": torch.ones(1, 2)})
            >>> ticket.to_torch_pruning(net)
            >>> sorted(net.state_dict())
            ['weight_mask', 'weight_orig']
        """
        slots = {slot.name: slot for slot in ParameterSlots(module)}
        own = {name: slots[name].parameter for name in self.masks if name in slots}
        wrong = _differences(self.masks, own)
        if wrong:
            raise ValueError(f"The masks do not fit {type(module).__name__} (mask | module): {'; '.join(wrong)}.")
        for name, mask in self.masks.items():
            for owner, key in slots[name].places:
                prune.custom_from_mask(owner, key, mask.to(own[name].device))

    @classmethod
    @checked
    def from_torch_pruning(cls, module: nn.Module, init: Mapping[str, Tensor] | None = None, **content: Any) -> Ticket:
        """Return the ticket of a module that ``torch.nn.utils.prune`` has pruned.

        Args:
            module: a module with ``weight_orig`` and ``weight_mask`` instead of some weights.
            init: all parameters at the first initialization, by plain name (``"0.weight"``); the module's weights are
                then the trained ones. None uses the module's weights as the initialization.
            **content: further fields of the ticket, such as ``level``, ``metrics`` and ``info``.

        Raises:
            ValueError: if nothing in the module is pruned.

        Examples:
            >>> net = prune.l1_unstructured(nn.Linear(4, 1), "weight", amount=0.25)
            >>> Ticket.from_torch_pruning(net).masks
            Masks(3 of 4 weights left in 1 tensors)
        """
        masks: Params = {}
        params: Params = {}
        for slot in ParameterSlots(module):
            owner, key = slot.places[0]
            plain = key.removesuffix("_orig")
            mask = owner._buffers.get(f"{plain}_mask") if plain != key else None
            name = slot.name if mask is None else slot.name.removesuffix("_orig")
            params[name] = slot.parameter.detach()
            if mask is not None:
                masks[name] = mask != 0  # the mask is explicit there, as numbers
        if not masks:
            raise ValueError(f"Nothing in {type(module).__name__} is pruned by torch.nn.utils.prune.")
        buffers = {n: b for n, b in module.named_buffers() if n.removesuffix("_mask") not in masks}
        if init is None:
            return cls(Masks(masks), params, buffers=buffers, **content)
        return cls(Masks(masks), dict(init), mean=params, mean_buffers=buffers, **content)


def on_cpu(tensors: Mapping[str, Tensor]) -> Params:
    """Return detached copies on the CPU that share no memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _differences(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    def shape(tensors: Mapping[str, Tensor], name: str) -> str:
        return str(tuple(tensors[name].shape)) if name in tensors else "missing"

    shapes = {name: (shape(given, name), shape(own, name)) for name in [*given, *own]}
    return [f"{name} {one} | {other}" for name, (one, other) in shapes.items() if one != other]
