"""The ascent of MAP propagation: hidden values climb the log probability of everything that was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_bpfree.nn.stochastic import Gaussian, StochasticUnit


class Drawable(Protocol):
    """A layer of units, as the ascent sees it: what it is, what enters it, what it gave, what is below."""

    unit: StochasticUnit
    potential: Tensor
    value: Tensor
    linear: nn.Linear | None


def ascent_direction(layers: Sequence[Any], values: Sequence[Tensor]) -> list[Tensor]:
    """Return the derivative of the log probability of all layers by each of ``values``.

    Args:
        layers: of units, and the output; their potentials follow from ``values``, by a graph.
        values: of the layers of units, leaves that require a gradient.
    """
    given = [*values, layers[-1].value]
    terms = [layer.unit.log_prob(layer.potential, value).sum() for layer, value in zip(layers, given, strict=True)]
    total = torch.stack([term.to(terms[0].dtype) for term in terms]).sum()
    return list(torch.autograd.grad(total, list(values)))


@torch.no_grad()
def ascend_chain(layers: Sequence[Drawable], steps: int, step_size: float) -> list[Tensor]:
    """Return hidden values after the ascent, where one linear layer lies between any two layers.

    All layers move at once from their old values: ``h += step_size * variance * derivative``, with the derivative of
    the log probability of the layer itself, ``(mean - h) / variance``, and of the next layer, whose score comes down
    through the weights between them.

    Args:
        layers: Gaussian ones, and the output, whose value is held.
        steps: how many.
        step_size: times the variance of each layer.
    """
    *hidden, last = layers
    values = [layer.value.detach().to(torch.promote_types(layer.value.dtype, torch.float32)) for layer in hidden]
    first = hidden[0].unit.mean(layers[0].potential.detach()).to(values[0].dtype)
    down, up = _scaled_weights(hidden, last, step_size)
    # The mean of the first layer stays, so that its values are linear in what has come down to it. They are not needed
    # before the end: the potentials above them move by a product that has the size of the second layer alone.
    weight, bias = up[0]
    field, kept = torch.addmm(bias, values[0], weight), 1 - step_size
    drift, back = torch.addmm(bias, first, weight).mul_(step_size), down[0] @ weight
    total = torch.zeros_like(field)
    for _ in range(steps):
        said, values = _moved(layers, values, field, down, up, step_size)
        total = torch.add(said, total, alpha=kept)
        field = torch.addmm(drift, said, back).add_(field, alpha=kept)
    left = kept**steps
    start = torch.lerp(first, values[0], left)
    return [torch.addmm(start, total, down[0]), *values[1:]]


def _moved(
    layers: Sequence[Drawable],
    values: list[Tensor],
    field: Tensor,
    down: list[Tensor],
    up: list[tuple[Tensor, Tensor]],
    step_size: float,
) -> tuple[Tensor, list[Tensor]]:
    """Return what the second layer says to the first, and the values after a step, but for the first layer's."""
    moved, to_first = list(values), field
    for index, layer in enumerate(layers[1:], 1):
        if index > 1:
            weight, bias = up[index - 1]
            field = torch.addmm(bias, values[index - 1], weight)
        unit, is_last = layer.unit, index == len(values)
        value = layer.value if is_last else values[index]
        if isinstance(unit, Gaussian):
            deviation = value - unit.mean(field)
            if not is_last:
                moved[index] = torch.sub(value, deviation, alpha=step_size)
            said = deviation.mul_(unit.derivative(field))
        else:
            said = value - unit.mean(field)
        if index == 1:
            to_first = said
        else:
            moved[index - 1] = torch.addmm(moved[index - 1], said, down[index - 1])
    return to_first, moved


def _scaled_weights(
    hidden: Sequence[Drawable], last: Drawable, step_size: float
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Return weights that bring a layer's deviations down, with all factors, and those that make its potentials."""
    down, up = [], []
    for below, above in zip(hidden, [*hidden[1:], last], strict=True):
        assert above.linear is not None
        assert isinstance(below.unit, Gaussian)
        unit, weight = above.unit, above.linear.weight.detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        factor = 1 / unit.variance if isinstance(unit, Gaussian) else unit.scale
        down.append(weight * (step_size * below.unit.variance * factor))
        bias = above.linear.bias
        up.append((weight.T, weight.new_zeros(len(weight)) if bias is None else bias.detach().to(weight.dtype)))
    return down, up
