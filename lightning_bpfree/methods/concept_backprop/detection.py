"""Concepts in the layers of a module: one pass over the data, then a probe for every concept and layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import Patterns, PositiveInt, checked
from lightning_bpfree.methods.concept_backprop.concepts import Concept, input_of, known
from lightning_bpfree.methods.concept_backprop.frozen import Forward, device_of, frozen, usable
from lightning_bpfree.methods.concept_backprop.layers import Pool, find_layers, run
from lightning_bpfree.methods.concept_backprop.probe import Detection, ProbeSettings, fit_probe

Inputs = str | int | Callable[[Any], Any] | None
Detections = dict[tuple[str, str], Detection]


class Samples(NamedTuple):
    """What one pass over the data has shown.

    Args:
        features: of every layer, ``(N, D)``, on the CPU.
        labels: labels of every concept, ``(N,)``, NaN where unknown.
        inputs: ``(N, ...)``, on the CPU.
        outputs: outputs of the module, ``(N, ...)``; None where the pass did not go to the end.
    """

    features: dict[str, Tensor]
    labels: dict[str, Tensor]
    inputs: Tensor
    outputs: Tensor | None


@checked
def collect_activations(
    module: nn.Module,
    batches: Iterable[Any],
    layers: Patterns,
    concepts: Sequence[Concept] = (),
    *,
    pool: Pool = "flatten",
    inputs: Inputs = None,
    forward: Forward = None,
    max_samples: PositiveInt | None = None,
    whole: bool = True,
) -> Samples:
    """Return features of all layers and labels of all concepts, from one pass over the data.

    Args:
        module: any trained module; it is not modified, bit for bit.
        batches: a data loader, or a list of batches.
        layers: names or patterns.
        concepts: the concepts; labels come from the batches, or from examples, which need a second pass.
        pool: maps activations to features.
        inputs: selects the module's inputs from a batch.
        forward: how the module is evaluated.
        max_samples: the pass ends after this number of samples; None for all.
        whole: run the whole module and keep outputs; otherwise stop after the last layer.

    Raises:
        ValueError: for unknown layers, invalid labels, layers whose shape differs between batches, or no data.

    Examples:
        >>> data = [(torch.randn(8, 2), torch.zeros(8))]
        >>> collect_activations(nn.Sequential(nn.Linear(2, 3)), data, "0").features["0"].shape
        torch.Size([8, 3])
    """
    found = find_layers(module, layers)
    with frozen(module), torch.no_grad():
        device = device_of(module)
        parts = []
        for batch in _first(batches, max_samples, inputs):
            x = usable(input_of(batch, inputs), device)
            seen = run(module, x, found, pool=pool, forward=forward, whole=whole)
            labels = {c.name: c.labels(batch, input_of(batch, inputs)) for c in concepts if c.examples is None}
            output = None if seen.output is None else seen.output.float().cpu()
            parts.append(Samples({n: _kept(f) for n, f in seen.features.items()}, labels, x.cpu(), output))
        for concept in concepts:
            if concept.examples is not None:
                x = usable(concept.examples[0], device)
                labels = {concept.name: concept.checked(concept.examples[1], len(x))}
                seen = run(module, x, found, pool=pool, forward=forward, whole=whole)
                output = None if seen.output is None else seen.output.float().cpu()
                parts.append(Samples({n: _kept(f) for n, f in seen.features.items()}, labels, x.cpu(), output))
    if not parts:
        raise ValueError("data: no batch; give a data loader or a list with one batch at least.")
    return _joined(parts, [concept.name for concept in concepts])


@checked
def detect_concepts(samples: Samples, concepts: Sequence[Concept], settings: ProbeSettings | None = None) -> Detections:
    """Return a detection for every pair (concept, layer).

    Args:
        samples: the result of :func:`collect_activations`.
        concepts: the concepts.
        settings: how to fit.

    Raises:
        ValueError: for a concept with one class only, or too few examples.
    """
    settings = settings or ProbeSettings()
    made = {}
    for concept in concepts:
        rows, labels = known(concept, samples.labels[concept.name])
        for layer, features in samples.features.items():
            made[concept.name, layer] = fit_probe(
                features[rows], labels, settings, kind=concept.kind, concept=concept.name, layer=layer
            )
    return made


def _kept(features: Tensor) -> Tensor:
    return features.detach().to("cpu", torch.float32 if features.dtype != torch.float64 else torch.float64)


def _first(batches: Iterable[Any], limit: int | None, inputs: Inputs) -> Iterator[Any]:
    seen = 0
    for batch in batches:
        yield batch
        seen += len(input_of(batch, inputs))
        if limit is not None and seen >= limit:
            return


def _joined(parts: Sequence[Samples], names: Sequence[str]) -> Samples:
    unknown = [torch.full((len(part.inputs),), torch.nan, dtype=torch.float64) for part in parts]
    labels = {
        name: torch.cat([part.labels.get(name, nan) for part, nan in zip(parts, unknown, strict=True)])
        for name in names
    }
    outputs = [part.outputs for part in parts if part.outputs is not None]
    same = len(outputs) == len(parts) and len({output.shape[1:] for output in outputs}) == 1
    shapes = {part.inputs.shape[1:] for part in parts}
    inputs = torch.cat([part.inputs for part in parts]) if len(shapes) == 1 else torch.empty(0)
    features = {name: _stacked(name, [part.features[name] for part in parts]) for name in parts[0].features}
    return Samples(features, labels, inputs, torch.cat(outputs) if same else None)


def _stacked(name: str, rows: Sequence[Tensor]) -> Tensor:
    widths = sorted({part.shape[1] for part in rows})
    if len(widths) > 1:
        raise ValueError(
            f"layer {name!r} changes its shape between batches ({', '.join(map(str, widths))} features a sample): use "
            "pool='mean' or 'last', or inputs of one size."
        )
    return torch.cat(list(rows))


def best_layer(detections: Mapping[tuple[str, str], Detection], concept: str) -> str:
    """Return the layer from which a concept can be read best."""
    scores = {layer: found.score for (name, layer), found in detections.items() if name == concept}
    return max(scores, key=lambda layer: scores[layer])
