"""The results for concepts in a module: detections, sensitivities, changed inputs, entanglement."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_bpfree.methods.concept_backprop.change import ChangeSettings, ConceptChange, PerSample, change_concept
from lightning_bpfree.methods.concept_backprop.concepts import Concept
from lightning_bpfree.methods.concept_backprop.detection import Detections, Samples, best_layer, detect_concepts
from lightning_bpfree.methods.concept_backprop.frozen import Forward
from lightning_bpfree.methods.concept_backprop.parameterizations import AdditiveChange, Parameterization
from lightning_bpfree.methods.concept_backprop.probe import LinearProbe, ProbeSettings
from lightning_bpfree.methods.concept_backprop.sensitivity import Sensitivity, concept_sensitivity

_FOR_SENSITIVITY = 256  # inputs: the mean effect has a standard error of a sixteenth of its spread


@dataclasses.dataclass(frozen=True)
class Plan:
    """The settings of an analysis.

    Args:
        probe: how probes are fitted.
        change: settings for changed inputs; None changes no inputs.
        parameterization: how inputs may change; None for ``AdditiveChange()``.
        layer: whose probes inputs are changed for; None takes the layer from which a concept is read best.
        num_inputs: inputs that are changed for each concept.
        sensitivity: whether it is measured how much the output follows a concept.
        forward: how the module is evaluated.
        validity: differentiable cost of a changed input being no real one, ``(B, ...) -> (B,)``.
        validity_weight: weight of that cost.
        legal: rule of what inputs exist, ``(B, ...) -> (B,)`` of booleans.
    """

    probe: ProbeSettings = dataclasses.field(default_factory=ProbeSettings)
    change: ChangeSettings | None = dataclasses.field(default_factory=ChangeSettings)
    parameterization: Parameterization | None = None
    layer: str | None = None
    num_inputs: int = 64
    sensitivity: bool = True
    forward: Forward = None
    validity: PerSample | None = None
    validity_weight: float = 1.0
    legal: PerSample | None = None


class Report(NamedTuple):
    """What has been found out.

    Args:
        detections: by ``(concept, layer)``.
        sensitivities: the same; empty if not measured.
        changes: by concept; empty if inputs were not changed.
        entanglement: ``E[i][j]``, the mean change of the score of concept ``j`` (in standard deviations, if it is
            continuous) in inputs changed for concept ``i``; ``E[i]["output"]`` is the mean change of the module's
            output in standard deviations over the data.
    """

    detections: Detections
    sensitivities: dict[tuple[str, str], Sensitivity]
    changes: dict[str, ConceptChange]
    entanglement: dict[str, dict[str, float]]

    def scores(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return ``{concept: {layer: {"score", "control", ...}}}`` in plain numbers."""
        made: dict[str, dict[str, dict[str, float]]] = {}
        for key, found in self.detections.items():
            row = {"score": found.score, "control": found.control, "train_score": found.train_score}
            if key in self.sensitivities:
                row |= {"effect": self.sensitivities[key].effect, "effect_ratio": self.sensitivities[key].ratio}
            made.setdefault(key[0], {})[key[1]] = row
        return made

    def metrics(self, prefix: str = "bpfree/concept") -> dict[str, float]:
        """Return the numbers by the names under which they are logged: ``prefix/concept/layer/score`` and so on."""
        values = {
            f"{prefix}/{concept}/{layer}/{name}": value
            for concept, layers in self.scores().items()
            for layer, row in layers.items()
            for name, value in row.items()
            if name != "train_score"
        }
        for concept, change in self.changes.items():
            values[f"{prefix}/{concept}/before"] = float(change.before.mean())
            values[f"{prefix}/{concept}/after"] = float(change.after.mean())
            values[f"{prefix}/{concept}/reached"] = float(change.reached.float().mean())
            values[f"{prefix}/{concept}/distance_l2"] = float(change.distance["l2"].mean())
            for other, value in self.entanglement[concept].items():
                values[f"{prefix}/{concept}/entangled_with/{other}"] = value
        return values

    def table(self) -> str:
        """Return the scores as a Markdown table."""
        rows = [
            "| concept | layer | score | random labels | effect on the output | used? |",
            "| --- | --- | ---: | ---: | ---: | --- |",
        ]
        for key, found in self.detections.items():
            felt = self.sensitivities.get(key)
            used = "-" if felt is None else "yes" if felt.used else "no"
            effect = "-" if felt is None else f"{felt.effect:.2f} ({felt.ratio:.2f} x random)"
            rows.append(f"| {key[0]} | {key[1]} | {found.score:.3f} | {found.control:.3f} | {effect} | {used} |")
        return "\n".join(rows)


def report_on(module: nn.Module, samples: Samples, concepts: Sequence[Concept], plan: Plan) -> Report:
    """Return all that the plan asks for.

    Args:
        module: any trained module.
        samples: of :func:`~lightning_bpfree.methods.concept_backprop.detection.collect_activations`, with outputs.
        concepts: the concepts.
        plan: the settings of the analysis.

    Raises:
        ValueError: for concepts that no probe can be fitted on, or inputs that cannot be changed.
    """
    detections = detect_concepts(samples, concepts, plan.probe)
    felt: dict[tuple[str, str], Sensitivity] = {}
    if plan.sensitivity and samples.outputs is not None and len(samples.inputs):
        inputs = samples.inputs[:_FOR_SENSITIVITY]
        for key, found in detections.items():
            felt[key] = concept_sensitivity(
                module, inputs, found, features=samples.features[key[1]], forward=plan.forward
            )
    if plan.change is None:
        return Report(detections, felt, {}, {})
    if not len(samples.inputs):
        raise ValueError("change: inputs of several shapes cannot be changed in one batch; pass change=None.")
    parameterization = plan.parameterization or AdditiveChange()
    parameterization.prepare(samples.inputs)
    changes, matrix = {}, {}
    for concept in concepts:
        layer = plan.layer or best_layer(detections, concept.name)
        if (concept.name, layer) not in detections:
            raise ValueError(f"layer={layer!r} is not among the layers {sorted({key[1] for key in detections})}.")
        probe = detections[concept.name, layer].probe
        others = [found.probe for (_, where), found in detections.items() if where == layer]
        rows = candidates(probe, samples.features[layer], plan.change, len(samples.inputs))
        chosen = samples.inputs[
            _without(concept, samples.labels[concept.name][rows], plan.change, rows)[: plan.num_inputs]
        ]
        changes[concept.name] = change_concept(
            module,
            chosen,
            probe,
            plan.change,
            parameterization=parameterization,
            forward=plan.forward,
            others=others,
            validity=plan.validity,
            validity_weight=plan.validity_weight,
            legal=plan.legal,
        )
        matrix[concept.name] = _moved(changes[concept.name], others, samples.outputs)
    return Report(detections, felt, changes, matrix)


def candidates(probe: LinearProbe, features: Tensor, settings: ChangeSettings, count: int) -> Tensor:
    """Return rows to change: first those on the other side, with a score below 0.1 (or above 0.9), in their order.

    Where there are too few, the farthest from the target follow.
    """
    sign = 1.0 if settings.direction == "raise" else -1.0
    height = sign * probe.logit(features)
    edge = -torch.logit(torch.tensor(0.9, dtype=height.dtype)) if probe.kind == "binary" else height.quantile(0.25)
    rows = torch.nonzero(height < edge).squeeze(1)
    if len(rows) < count:
        rest = height.argsort()
        rows = torch.cat([rows, rest[~torch.isin(rest, rows)]])
    return rows[:count]


def _without(concept: Concept, labels: Tensor, settings: ChangeSettings, rows: Tensor) -> Tensor:
    """Return the labeled rows in their order, first those whose labels lack what is asked for."""
    if concept.kind == "continuous":
        return rows[~labels.isnan()]
    has_not = labels == (0.0 if settings.direction == "raise" else 1.0)
    return torch.cat([rows[has_not], rows[~has_not & ~labels.isnan()]])


def _moved(change: ConceptChange, probes: Sequence[LinearProbe], outputs: Tensor | None) -> dict[str, float]:
    row: dict[str, Any] = {}
    for probe in probes:
        before, after = change.others[probe.concept, probe.layer].unbind(1)
        scale = 1.0 if probe.kind == "binary" else max(probe.spread, 1e-12)
        row[probe.concept] = float((after - before).mean()) / scale
    if outputs is not None and change.outputs_before is not None and change.outputs_after is not None:
        scale = float(outputs.flatten(1).std(0).norm().clamp_min(1e-12))
        moved = (change.outputs_after - change.outputs_before).float().flatten(1)
        row["output"] = float(moved.norm(dim=1).mean()) / scale
    return row
