"""Whether a network uses a concept or only represents it: changes of the output, and TCAV scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import NonNegativeInt, PositiveInt, checked
from lightning_bpfree.methods.concept_backprop.frozen import Forward, device_of, frozen, usable
from lightning_bpfree.methods.concept_backprop.layers import Pool, find_layers, run, spread
from lightning_bpfree.methods.concept_backprop.probe import Detection, LinearProbe

OutputOf = Callable[[Tensor], Tensor]


class Sensitivity(NamedTuple):
    """How much the output follows a concept.

    Args:
        effect: mean change of the output when the layer's activations move along the concept by one standard deviation,
            in standard deviations of the output over the samples, >= 0.
        random: the same of random directions, each as long as the concept's by the covariance of the activations.
        sign: mean signed change of the first output; says which way.
    """

    effect: float
    random: tuple[float, ...]
    sign: float

    @property
    def ratio(self) -> float:
        """The effect over the mean effect of random directions; far below 1: the concept is not used."""
        return self.effect / max(sum(self.random) / len(self.random), 1e-12)

    @property
    def p_value(self) -> float:
        """Share of random directions whose effect is at least as large, with the usual correction by one."""
        return (1 + sum(effect >= self.effect for effect in self.random)) / (1 + len(self.random))

    @property
    def used(self) -> bool:
        """Whether the output follows the concept at least half as much as an average direction of the activations."""
        return self.ratio >= 0.5


@checked
def concept_sensitivity(
    module: nn.Module,
    inputs: Tensor,
    detection: Detection | LinearProbe,
    *,
    features: Tensor,
    forward: Forward = None,
    num_random: PositiveInt = 20,
    output_of: OutputOf | None = None,
    seed: NonNegativeInt = 0,
) -> Sensitivity:
    """Return how much the output changes when the activations of the probe's layer move along the concept.

    Activations move along the probe's *pattern*, the direction in which the data itself changes with the concept, by
    one standard deviation up and down. The weights of a probe are not such a direction: they also cancel correlated
    features, and moving along them leaves the distribution of the data.

    Args:
        module: the module.
        inputs: the inputs at which the change is measured, ``(B, ...)``.
        detection: the probe.
        features: features of the probe's layer for many samples, ``(N, D)``, for the covariance of random directions.
        forward: how the module is evaluated.
        num_random: number of random directions, >= 1.
        output_of: maps the module's first output tensor to ``(B, K)``; None flattens it.
        seed: seed of the random directions.

    Raises:
        ValueError: if the module has no output, or ``pool`` is a function.

    Examples:
        >>> net = nn.Sequential(nn.Identity(), nn.Linear(2, 1, bias=False))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 0.0]]))
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> second = torch.tensor([0.0, 1.0])
        >>> unused = LinearProbe("second", "0", "binary", second, torch.tensor(0.0), pattern=second)
        >>> concept_sensitivity(net, x, unused, features=x).used
        False
    """
    probe = detection.probe if isinstance(detection, Detection) else detection
    assert probe.pattern is not None, "probes of fit_probe have a pattern"
    shifts = [probe.pattern * probe.spread if probe.kind == "binary" else _unit(probe)]
    generator = torch.Generator().manual_seed(seed)
    with frozen(module), torch.no_grad():
        centered = features.double() - features.double().mean(0)
        shifts += [_random_shift(centered, generator) for _ in range(num_random)]
        x = usable(inputs, device_of(module))
        layers = find_layers(module, probe.layer)
        plain = _output(run(module, x, layers, pool=probe.pool, forward=forward, whole=True).output, output_of)
        scale = float(plain.std(0).norm().clamp_min(1e-12))
        effects, signs = [], []
        for shift in shifts:
            up, down = (
                _output(_moved(module, x, layers, probe.pool, sign * shift, forward), output_of) for sign in (1.0, -1.0)
            )
            effects.append(float((up - down).norm(dim=1).mean()) / 2 / scale)
            signs.append(float((up - down)[:, 0].mean()) / 2 / scale)
    return Sensitivity(effects[0], tuple(effects[1:]), signs[0])


@checked
def tcav(
    module: nn.Module,
    inputs: Tensor,
    probe: LinearProbe,
    *,
    output: NonNegativeInt = 0,
    forward: Forward = None,
) -> dict[str, float]:
    """Return TCAV scores: how often, and how much, an output increases along the weights of a probe.

    Args:
        module: the module.
        inputs: inputs of the class of interest, ``(B, ...)``.
        probe: its unit normal is the concept activation vector.
        output: which of the outputs ``(B, K)``.
        forward: how the module is evaluated.

    Returns:
        ``sign_count``: share of samples whose output increases along the vector, in [0, 1]; ``magnitude``: sum of the
        positive slopes over that of all absolute ones; ``mean_slope``: their mean, which captum 0.9 calls magnitude.

    Examples:
        >>> net = nn.Sequential(nn.Identity(), nn.Linear(2, 1))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 0.0]]))
        >>> probe = LinearProbe("first", "0", "binary", torch.tensor([2.0, 0.0]), torch.tensor(0.0))
        >>> tcav(net, torch.zeros(4, 2), probe)
        {'sign_count': 1.0, 'magnitude': 1.0, 'mean_slope': 1.0}

    References:
        B. Kim et al., "Interpretability Beyond Feature Attribution: Quantitative Testing with Concept Activation
        Vectors (TCAV)", 2018, arXiv 1711.11279.
    """
    direction = probe.weight / probe.weight.norm()
    with frozen(module):
        x = usable(inputs, device_of(module))
        layers = find_layers(module, probe.layer)
        start = torch.zeros(len(x), len(probe.weight), requires_grad=True, device=x.device)
        made = _moved(module, x, layers, probe.pool, start, forward)
        (slopes,) = torch.autograd.grad(_output(made, None)[:, output].sum(), [start])
        along = slopes.double() @ direction.to(slopes.device, torch.float64)
    total = float(along.abs().sum().clamp_min(1e-24))
    return {
        "sign_count": float((along > 0).double().mean()),
        "magnitude": float(along.clamp_min(0).sum()) / total,
        "mean_slope": float(along.mean()),
    }


def _unit(probe: LinearProbe) -> Tensor:
    # The pattern is per unit of the value; one standard deviation of what the probe reads off.
    return probe.pattern * probe.spread if probe.pattern is not None else probe.weight


def _random_shift(centered: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``cov r / sqrt(r' cov r)``: a pattern as long, by the covariance, as every probe's is."""
    scale = centered.std(0).clamp_min(1e-12)
    weights = torch.randn(centered.shape[1], generator=generator, dtype=torch.float64) / scale
    line = centered @ weights
    return centered.T @ line / len(centered) / line.square().mean().sqrt().clamp_min(1e-24)


def _moved(
    module: nn.Module, x: Any, layers: Mapping[str, nn.Module], pool: Pool, shift: Tensor, forward: Forward
) -> Tensor | None:
    """Return the output with the layer's activations moved by ``shift``, ``(D,)`` or ``(B, D)``."""

    def edit(activation: Tensor) -> Tensor:
        rows = shift.to(activation).expand(len(activation), -1) if shift.dim() == 1 else shift.to(activation)
        return activation + spread(rows, activation, pool)

    (name,) = layers
    return run(module, x, layers, pool=pool, forward=forward, whole=True, edits={name: edit}).output


def _output(output: Tensor | None, output_of: OutputOf | None) -> Tensor:
    if output is None:
        raise ValueError("sensitivity: the module returns no tensor; pass forward= a function that does.")
    return output.float().flatten(1) if output_of is None else output_of(output)
