"""Detection of activations that a network calls as functions, for rules that need modules."""

from __future__ import annotations

import inspect
import re

from torch import nn

_MODULES = {
    "relu": "nn.ReLU()",
    "relu_": "nn.ReLU()",
    "gelu": "nn.GELU()",
    "silu": "nn.SiLU()",
    "elu": "nn.ELU()",
    "selu": "nn.SELU()",
    "leaky_relu": "nn.LeakyReLU()",
    "tanh": "nn.Tanh()",
    "sigmoid": "nn.Sigmoid()",
    "softplus": "nn.Softplus()",
}
_CALL = re.compile(rf"(?:\b(?:F|torch|functional)\.|\.)({'|'.join(_MODULES)})\(")


def functional_lines(network: nn.Module) -> list[tuple[str, int, str, str]]:
    """Return the lines of forward passes that call an activation: class, line number, text, and equivalent module.

    Args:
        network: the network; modules of torch itself are not inspected.
    """
    found: dict[tuple[str, int], tuple[str, int, str, str]] = {}
    for kind in dict.fromkeys(type(module) for module in network.modules()):
        if kind.__module__.startswith("torch."):
            continue
        try:
            lines, start = inspect.getsourcelines(inspect.unwrap(kind.forward))
        except (OSError, TypeError):  # written in no file
            continue
        for number, line in enumerate(lines, start):
            match = _CALL.search(line.split("#")[0])
            if match:
                found[kind.__name__, number] = (kind.__name__, number, line.strip(), _MODULES[match[1]])
    return list(found.values())


def as_modules(network: nn.Module) -> str:
    """Return a message that says which lines to change so that activations become modules.

    Examples:
        >>> as_modules(nn.Linear(2, 2))
        'Make them modules: self.act = nn.ReLU() in __init__, and self.act(x) in forward.'
    """
    for part in network.modules():
        given = getattr(part, "activation", None)
        if isinstance(part, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) and not isinstance(
            given, nn.Module
        ):
            module = _MODULES.get(getattr(given, "__name__", ""), "nn.GELU()")
            return f"Give nn.{type(part).__name__} a module, activation={module}."
    lines = functional_lines(network)
    if not lines:
        return "Make them modules: self.act = nn.ReLU() in __init__, and self.act(x) in forward."
    said = "; ".join(f"line {number}: {text}" for _, number, text, _ in lines[:3])
    owner, _, _, module = lines[0]
    return (
        f"In {owner}.forward, {said}: write self.act = {module} in __init__, and self.act(x) there, with a module of "
        "its own for each layer."
    )
