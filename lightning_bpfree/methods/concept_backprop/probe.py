"""Linear probes: how well a concept can be decoded from a layer, on samples that the probe has not seen."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import NonNegativeFloat, OpenFraction, PositiveInt, checked, checked_class
from lightning_bpfree.methods.concept_backprop.concepts import Kind
from lightning_bpfree.methods.concept_backprop.layers import Pool
from lightning_bpfree.methods.concept_backprop.linear_models import Linear, least_squares, logistic

Penalty = Literal["l2", "l1", "mean_difference"]


@checked_class
@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """How probes are fitted.

    Args:
        penalty: on the weights of standardized features: ``"l2"`` or ``"l1"``; ``"mean_difference"``: the direction
            from the mean of all samples to the mean of samples with the concept, without a fit (as FastCAV).
        strength: strength of the penalty, >= 0.
        held_out: share of the samples on which scores are measured, in (0, 1).
        controls: probes of random labels for each concept, >= 1, whose scores give the chance level.
        balanced: whether both classes of a binary concept have equal weight.
        pool: maps activations to features; see :func:`~lightning_bpfree.methods.concept_backprop.layers.pooled`.
        seed: seed of the split and of random labels.

    Raises:
        ValueError: for values out of range.

    Examples:
        >>> ProbeSettings(penalty="l1").strength
        0.01
    """

    penalty: Penalty = "l2"
    strength: NonNegativeFloat = 0.01
    held_out: OpenFraction = 0.3
    controls: PositiveInt = 3
    balanced: bool = True
    pool: Pool = "flatten"
    seed: int = 0


@checked_class
@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """A linear function of a layer's features that predicts a concept.

    Args:
        concept: name of the concept.
        layer: name of the layer.
        kind: ``"binary"``: the function is the logit; ``"continuous"``: the value itself.
        weight: ``(D,)``.
        bias: scalar.
        pattern: ``(D,)``, the change of the features in the data when the logit increases by one: ``cov(h) w / (w'
            cov(h) w)``. The weights of a probe also cancel noise; the pattern does not (Haufe et al. 2014).
        spread: standard deviation of the logit, or of the concept's values, on the training samples; scalar.
        quantiles: quantiles of the labels of a continuous concept, at 10 % and 90 %.
        pool: maps activations to features.

    Examples:
        >>> probe = LinearProbe("large", "0", "binary", torch.tensor([1.0, 0.0]), torch.tensor(0.0))
        >>> probe.score(torch.tensor([[0.0, 3.0]]))
        tensor([0.5000])
    """

    concept: str
    layer: str
    kind: Kind
    weight: Tensor
    bias: Tensor
    pattern: Tensor | None = None
    spread: float = 1.0
    quantiles: tuple[float, float] = (0.0, 1.0)
    pool: Pool = "flatten"

    def logit(self, features: Tensor) -> Tensor:
        """Return the logit, or the value of a continuous concept, of features ``(B, D)``; shape ``(B,)``.

        Raises:
            ValueError: for features of another width.
        """
        if features.dim() != 2 or features.shape[1] != len(self.weight):
            raise ValueError(
                f"probe of {self.concept!r} on {self.layer!r} was fitted on {len(self.weight)} features, and gets "
                f"{tuple(features.shape)}: the layer's shape has changed. Use pool='mean' for inputs of any size."
            )
        return features @ self.weight.to(features) + self.bias.to(features)

    def score(self, features: Tensor) -> Tensor:
        """Return the probability of the concept, or its value."""
        found = self.logit(features)
        return found.sigmoid() if self.kind == "binary" else found

    def to_plain(self) -> dict[str, Any]:
        """Return the probe in tensors, strings and numbers."""
        return {key: value for key, value in vars(self).items() if not callable(value)}


@dataclasses.dataclass(frozen=True)
class Detection:
    """How well a concept can be read off a layer.

    Args:
        probe: the probe.
        score: on held-out samples: ``2 (balanced accuracy - 1/2)`` of a binary concept, R^2 of a continuous one; 1 is
            perfect, 0 is chance.
        train_score: the same on the samples of the fit.
        controls: held-out scores of probes of random labels.
        control_probes: these probes, for null distributions.
        samples: in all.
    """

    probe: LinearProbe
    score: float
    train_score: float
    controls: tuple[float, ...]
    control_probes: tuple[LinearProbe, ...] = dataclasses.field(repr=False)
    samples: int = 0

    @property
    def control(self) -> float:
        """The mean score of random labels."""
        return sum(self.controls) / len(self.controls)

    @property
    def selectivity(self) -> float:
        """The score beyond that of random labels."""
        return self.score - self.control


@checked
def fit_probe(
    features: Tensor,
    labels: Tensor,
    settings: ProbeSettings | None = None,
    *,
    kind: Kind = "binary",
    concept: str = "concept",
    layer: str = "layer",
) -> Detection:
    """Return a probe, and its score on held-out samples next to that of random labels.

    Args:
        features: activations, ``(N, D)``.
        labels: ``(N,)``; 0 and 1, or any numbers for a continuous concept.
        settings: how to fit.
        kind: kind of the concept.
        concept: its name.
        layer: name of the layer.

    Raises:
        ValueError: for features that are not finite, or labels of another length.

    Examples:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> fit_probe(x, (x[:, 0] > 0).float()).score > 0.9
        True
    """
    settings = settings or ProbeSettings()
    if features.dim() != 2 or len(features) != len(labels):
        raise ValueError(f"labels: {len(labels)} for features of shape {tuple(features.shape)}; give one a row.")
    if not features.isfinite().all():
        raise ValueError(f"layer {layer!r} gives activations that are not finite: no probe can be fitted on them.")
    # Float64 on the CPU, so that probes are the same on every device and rank.
    x, y = features.detach().to("cpu", torch.float64), labels.to("cpu", torch.float64)
    with torch.inference_mode(False), torch.enable_grad():
        x, y = x.clone(), y.clone()
        generator = torch.Generator().manual_seed(settings.seed)
        train, test = _split(y, kind, settings.held_out, generator)
        shuffled = [y[torch.randperm(len(y), generator=generator)] for _ in range(settings.controls)]
        targets = torch.stack([y, *shuffled], 1)
        models = _fit(x[train], targets[train], kind, settings)
        predicted = x @ models.weight + models.bias
        names = [concept, *(f"random {i}" for i in range(settings.controls))]
        probes = [
            _probe(models, i, x[train], targets[train], concept=name, layer=layer, kind=kind, pool=settings.pool)
            for i, name in enumerate(names)
        ]
        held = [_score(predicted[test, i], targets[test, i], kind) for i in range(len(names))]
        return Detection(
            probe=probes[0],
            score=held[0],
            train_score=_score(predicted[train, 0], y[train], kind),
            controls=tuple(held[1:]),
            control_probes=tuple(probes[1:]),
            samples=len(y),
        )


def _split(labels: Tensor, kind: Kind, held_out: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return rows of training and held-out samples, both with the same share of a binary concept."""
    order = torch.randperm(len(labels), generator=generator)
    groups = [order[labels[order] == value] for value in (0, 1)] if kind == "binary" else [order]
    counts = [max(1, round(held_out * len(group))) for group in groups]
    test = torch.cat([group[:n] for group, n in zip(groups, counts, strict=True)])
    train = torch.cat([group[n:] for group, n in zip(groups, counts, strict=True)])
    return train, test


def _fit(x: Tensor, targets: Tensor, kind: Kind, settings: ProbeSettings) -> Linear:
    """Return the models in the coordinates of the raw features."""
    means, deviations = x.mean(0), x.std(0, correction=0)
    deviations = torch.where(deviations > 1e-12 * (1 + means.abs()), deviations, torch.inf)  # constant: weight 0
    standard = (x - means) / deviations
    if settings.penalty == "mean_difference":
        found = _mean_difference(standard, targets, kind)
    elif kind == "continuous":
        scales = targets.std(0).clamp_min(1e-12)  # the penalty acts on labels of unit variance
        made = least_squares(standard, targets / scales, settings.strength, settings.penalty == "l1")
        found = Linear(made.weight * scales, made.bias * scales)
    else:
        weights = _class_weights(targets) if settings.balanced else torch.ones_like(targets)
        found = logistic(standard, targets, settings.strength, weights, settings.penalty == "l1")
    weight = found.weight / deviations[:, None]
    return Linear(weight, found.bias - means @ weight)


def _class_weights(targets: Tensor) -> Tensor:
    share = targets.mean(0)
    return torch.where(targets == 1, 0.5 / share, 0.5 / (1 - share))


def _mean_difference(x: Tensor, targets: Tensor, kind: Kind) -> Linear:
    """Directions from the mean of all to that of the concept; threshold and slope come from one number a sample."""
    centered = targets - targets.mean(0)
    directions = x.T @ centered / len(x)  # proportional to mean(x | concept) - mean(x)
    columns = []
    for i in range(targets.shape[1]):
        line = x @ directions[:, i : i + 1]
        scale = line.std(correction=0).clamp_min(1e-12)
        wanted = targets[:, i : i + 1]
        if kind == "binary":
            small = logistic(line / scale, wanted, 1e-3, _class_weights(wanted))
        else:
            small = least_squares(line / scale, wanted, 0.0)
        columns.append(Linear(directions[:, i] * small.weight[0, 0] / scale, small.bias[0]))
    return Linear(torch.stack([c.weight for c in columns], 1), torch.stack([c.bias for c in columns]))


def _probe(models: Linear, column: int, x: Tensor, targets: Tensor, **named: Any) -> LinearProbe:
    weight = models.weight[:, column].clone()
    centered = x - x.mean(0)
    line = centered @ weight
    variance = float(line.square().mean())
    labels = targets[:, column]
    low, high = torch.quantile(labels, torch.tensor([0.1, 0.9], dtype=labels.dtype)).tolist()
    return LinearProbe(
        weight=weight,
        bias=models.bias[column].clone(),
        pattern=centered.T @ line / len(x) / max(variance, 1e-24),
        spread=math.sqrt(variance) if named["kind"] == "binary" else float(labels.std()),
        quantiles=(low, high),
        **named,
    )


def _score(predicted: Tensor, labels: Tensor, kind: Kind) -> float:
    if kind == "continuous":
        return 1 - float((predicted - labels).square().mean() / labels.var(correction=0).clamp_min(1e-24))
    correct = ((predicted > 0) == (labels == 1)).double()
    # A control may have drawn one class only into the held-out samples, which says nothing.
    rates = [correct[labels == value].mean() for value in (0, 1)]
    return float(2 * torch.stack(rates).nanmean() - 1)
