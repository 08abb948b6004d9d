"""Changes of inputs until a probe detects a concept, or no longer detects it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import NonNegativeFloat, PositiveFloat, PositiveInt, checked, checked_class
from lightning_bpfree.methods.concept_backprop.discrete import TokenChange
from lightning_bpfree.methods.concept_backprop.frozen import Forward, device_of, frozen, usable
from lightning_bpfree.methods.concept_backprop.layers import find_layers, run
from lightning_bpfree.methods.concept_backprop.parameterizations import AdditiveChange, Parameterization
from lightning_bpfree.methods.concept_backprop.probe import LinearProbe

PerSample = Callable[[Tensor], Tensor]

# Of the search for the smallest change, tried against closed forms on linear networks.
_BETAS = (0.5, 0.9)  # of Adam: short memories, since the multiplier moves the objective
_DUAL_RATE, _DUAL_GAIN = 0.05, 3.0
_HALVINGS = 8


@checked_class
@dataclasses.dataclass(frozen=True)
class ChangeSettings:
    """The target, penalties and steps of a change.

    Args:
        direction: ``"raise"`` or ``"lower"`` the probe's score.
        target: score to reach. None: for a binary concept, 0.95 up or 0.05 down; for a continuous one, the 90 % or 10 %
            quantile of its labels.
        loss: ``"smallest"``: minimizes the penalties subject to the target (dual ascent, one multiplier per sample;
            only the ratio of the weights matters); ``"bce"``: cross-entropy with 1 or 0 plus penalties, as in the
            paper; for a continuous concept, the squared error. Both use the logit, which does not saturate.
        distance: between changed inputs and their reference, summed over the values of a sample: ``"l2"`` (half the
            squared distance), ``"l1"``, or ``"mse"`` (mean).
        distance_weight: >= 0.
        sparsity: weight of the size of the change in free numbers (L1; for boards and tokens, the number of changed
            positions), >= 0.
        steps: steps of Adam, >= 1.
        lr: its learning rate, which falls to 0 along a cosine.
        sparsify: whether to undo the smallest changes at the end, as many as possible without missing the target.
        stop_when_reached: end a sample's search at the target; cheaper, but farther from the smallest change.

    Raises:
        ValueError: for values out of range.

    Examples:
        >>> ChangeSettings(direction="lower").goal(LinearProbe("a", "0", "binary", torch.ones(1), torch.tensor(0.0)))
        0.05
    """

    direction: Literal["raise", "lower"] = "raise"
    target: float | None = None
    loss: Literal["smallest", "bce"] = "smallest"
    distance: Literal["l2", "l1", "mse"] = "l2"
    distance_weight: NonNegativeFloat = 1.0
    sparsity: NonNegativeFloat = 0.0
    steps: PositiveInt = 200
    lr: PositiveFloat = 0.05
    sparsify: bool = False
    stop_when_reached: bool = False

    def goal(self, probe: LinearProbe) -> float:
        """Return the score to reach.

        Raises:
            ValueError: for a probability outside of (0, 1).
        """
        up = self.direction == "raise"
        if self.target is None:
            return (0.95 if up else 0.05) if probe.kind == "binary" else probe.quantiles[1 if up else 0]
        if probe.kind == "binary" and not 0 < self.target < 1:
            raise ValueError(f"target={self.target}: the score of a binary concept is a probability, in (0, 1).")
        return self.target


class ConceptChange(NamedTuple):
    """What has become of a batch of inputs; all tensors have the number of samples first, and no graph.

    Args:
        concept: name of the concept.
        layer: name of the layer.
        inputs: as they were given.
        reference: what they are compared with: the inputs, or their reconstruction by an autoencoder.
        changed: the changed inputs.
        before: the probe's score of the inputs, ``(B,)``.
        after: that of the changed inputs.
        reached: whether the target is reached, ``(B,)``.
        distance: ``{"l1", "l2", "linf", "l0"}``, each ``(B,)``; ``l0`` is the number of values that differ.
        outputs_before: first tensor of the module's output; None if it has none.
        outputs_after: the same of the changed inputs.
        others: of every other probe by ``(concept, layer)``, its scores before and after, ``(B, 2)``.
        steps: how many were taken.
    """

    concept: str
    layer: str
    inputs: Tensor
    reference: Tensor
    changed: Tensor
    before: Tensor
    after: Tensor
    reached: Tensor
    distance: dict[str, Tensor]
    outputs_before: Tensor | None
    outputs_after: Tensor | None
    others: dict[tuple[str, str], Tensor]
    steps: int

    @property
    def delta(self) -> Tensor:
        """Changed inputs minus reference; for token ids, 1 where they differ."""
        if self.inputs.is_floating_point():
            return self.changed - self.reference
        return (self.changed != self.reference).float()


@checked
def change_concept(
    module: nn.Module,
    inputs: Tensor,
    probe: LinearProbe,
    settings: ChangeSettings | None = None,
    *,
    parameterization: Parameterization | None = None,
    forward: Forward = None,
    others: Sequence[LinearProbe] = (),
    validity: PerSample | None = None,
    validity_weight: NonNegativeFloat = 1.0,
    legal: PerSample | None = None,
) -> ConceptChange:
    """Return inputs that are changed, as little as possible, so that the probe's score reaches a target.

    All samples of the batch are changed at once, and do not influence each other. For each sample, the smallest change
    that reaches the target is kept; if none does, the one that comes nearest. The module, random streams and gradients
    are not modified, bit for bit; the caller may be in inference mode.

    Args:
        module: any trained module.
        inputs: ``(B, ...)``.
        probe: on a layer of the module.
        settings: target, penalties and steps.
        parameterization: how inputs may change; None for :class:`AdditiveChange` without limits.
        forward: how the module is evaluated; None for ``module(inputs)``.
        others: further probes, whose scores before and after show with which concepts this one is entangled.
        validity: differentiable cost of unrealistic inputs, ``(B, ...) -> (B,)``.
        validity_weight: weight of that cost.
        legal: function that returns which inputs are legal, ``(B, ...) -> (B,)`` of booleans; only legal changes count
            as reached.

    Raises:
        ValueError: for inputs out of range, a layer that does not exist, or incompatible arguments.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> _ = nn.init.eye_(net[0].weight)
        >>> probe = LinearProbe("large", "0", "binary", torch.tensor([1.0, 0.0]), torch.tensor(0.0))
        >>> change = change_concept(net, torch.zeros(3, 2), probe)
        >>> bool((change.after > 0.94).all()), net[0].weight.grad is None
        (True, True)
    """
    with frozen(module):
        parameterization = parameterization or AdditiveChange()
        if isinstance(parameterization, TokenChange):
            parameterization.bind(module)
        search = _Search(module, probe, settings or ChangeSettings(), parameterization, forward)
        search.validity, search.validity_weight, search.legal = validity, validity_weight, legal
        x = usable(inputs, device_of(module))
        with _constant_autoencoder(parameterization):
            free, steps = search.smallest(x)
            return search.report(x, free, steps, others)


def _constant_autoencoder(parameterization: Parameterization) -> contextlib.AbstractContextManager[None]:
    autoencoder = getattr(parameterization, "autoencoder", None)
    return frozen(autoencoder if isinstance(autoencoder, nn.Module) else nn.Identity())


class _Seen(NamedTuple):
    logit: Tensor
    size: Tensor  # penalties alone
    legal: Tensor


class _Search:
    """The search for one batch, within a frozen module."""

    def __init__(
        self,
        module: nn.Module,
        probe: LinearProbe,
        settings: ChangeSettings,
        parameterization: Parameterization,
        forward: Forward,
    ) -> None:
        self.module, self.probe, self.settings, self.forward = module, probe, settings, forward
        self.parameterization = parameterization
        self.layers = find_layers(module, probe.layer)
        goal = settings.goal(probe)
        self.sign = 1.0 if settings.direction == "raise" else -1.0
        self.goal = math.log(goal / (1 - goal)) if probe.kind == "binary" else goal
        self.validity: PerSample | None = None
        self.legal: PerSample | None = None
        self.validity_weight = 1.0

    def smallest(self, x: Tensor) -> tuple[Tensor, int]:
        """Return the free numbers of the smallest change of every sample that reaches the target."""
        free = self.parameterization.start(x).requires_grad_()
        reference = self.parameterization.reference(x).detach()
        optimizer = torch.optim.Adam([free], lr=self.settings.lr, betas=_BETAS)
        best = _Best(free)
        multiplier = torch.ones(len(free), device=free.device, dtype=free.dtype)
        steps = 0
        for step in range(self.settings.steps + 1):
            seen = self.look(x, free, reference)
            cost = self.cost(seen.logit, seen.size, multiplier)
            best.offer(free, *self.standing(seen, cost.detach()))
            if step == self.settings.steps or (self.settings.stop_when_reached and bool(best.reached.all())):
                break
            (free.grad,) = torch.autograd.grad(cost.sum(), [free])  # a sum: samples do not interact
            if self.settings.stop_when_reached:
                free.grad[best.reached] = 0.0
            rate = (1 + math.cos(math.pi * step / self.settings.steps)) / 2
            optimizer.param_groups[0]["lr"] = self.settings.lr * rate
            optimizer.step()
            # Dual ascent: the concept weighs more while the target is missed, and less once it is reached.
            multiplier *= torch.exp(_DUAL_RATE * torch.tanh(_DUAL_GAIN * self.missing(seen.logit.detach())))
            with torch.no_grad():
                self.parameterization.project(x, free)
            steps += 1
        found = self.sparser(x, best.free) if self.settings.sparsify else best.free
        shortens = self.parameterization.continuous and self.settings.loss == "smallest"
        return (self.shorter(x, found) if shortens else found), steps

    def standing(self, seen: _Seen, cost: Tensor) -> tuple[Tensor, Tensor]:
        """Return which samples have what is asked for, and the value by which they are compared among themselves."""
        if self.settings.loss == "bce":
            return seen.legal, cost
        reached = self.reached(seen.logit) & seen.legal
        return reached, torch.where(reached, seen.size.detach(), -self.sign * seen.logit.detach())

    def look(self, x: Tensor, free: Tensor, reference: Tensor) -> _Seen:
        """Return logit, cost and penalties of every sample."""
        changed = self.parameterization.apply(x, free)
        logit = self.logit(changed, free)
        size = self.penalties(changed, reference, x, free)
        legal = torch.ones_like(logit, dtype=torch.bool)
        if self.legal is not None:
            legal = self.legal(changed.detach()).to(legal)
        return _Seen(logit, size, legal)

    def logit(self, changed: Tensor, free: Tensor) -> Tensor:
        with self.parameterization.attached(self.module, free):
            seen = run(self.module, changed, self.layers, pool=self.probe.pool, forward=self.forward)
        features = seen.features[self.probe.layer]
        return self.probe.logit(features)

    def missing(self, logit: Tensor) -> Tensor:
        """Return how far the logit is from the target, in standard deviations of the logit over the data."""
        return self.sign * (self.goal - logit) / max(self.probe.spread, 1e-12)

    def cost(self, logit: Tensor, size: Tensor, multiplier: Tensor) -> Tensor:
        """Return what every sample descends."""
        if self.settings.loss == "bce" and self.probe.kind == "binary":
            return nn.functional.softplus(-self.sign * logit) + size
        missing = self.missing(logit)
        if self.settings.loss == "bce":
            return missing.square() + size
        return multiplier * missing + missing.relu().square() / 2 + size

    def reached(self, logit: Tensor) -> Tensor:
        return self.sign * (logit.detach() - self.goal) >= -1e-6 * (1 + abs(self.goal))

    def penalties(self, changed: Tensor, reference: Tensor, x: Tensor, free: Tensor) -> Tensor:
        size = free.new_zeros(len(free))
        if self.settings.distance_weight and changed.is_floating_point():
            difference = (changed - reference).flatten(1)
            terms = {
                "l2": difference.square().sum(1) / 2,
                "l1": difference.abs().sum(1),
                "mse": difference.square().mean(1),
            }
            size = size + self.settings.distance_weight * terms[self.settings.distance]
        if self.settings.sparsity:
            size = size + self.settings.sparsity * self.parameterization.size(x, free)
        if self.validity is not None:
            size = size + self.validity_weight * self.validity(changed)
        return size

    @torch.no_grad()
    def sparser(self, x: Tensor, free: Tensor) -> Tensor:
        """Undo the smallest changes of every sample, as many as leave the target reached; by bisection."""
        start = self.parameterization.start(x)
        moved = (free - start).flatten(1)
        order = moved.abs().argsort(1).argsort(1)  # rank of every entry, the smallest first
        low, high = torch.zeros(len(free), dtype=torch.int64, device=free.device), (moved != 0).sum(1)
        high = moved.shape[1] - torch.zeros_like(high)
        kept = free.clone()
        for _ in range(int(math.log2(moved.shape[1])) + 2):
            middle = (low + high + 1) // 2
            trial = (torch.where(order >= middle[:, None], moved, 0.0)).view_as(free) + start
            good = self.reached(self.logit(self.parameterization.apply(x, trial), trial))
            kept = torch.where(_per_sample(good, free), trial, kept)
            low, high = torch.where(good, middle, low), torch.where(good, high, (middle - 1).clamp_min(0))
        return kept

    @torch.no_grad()
    def shorter(self, x: Tensor, free: Tensor) -> Tensor:
        """Shorten every change along its line as far as the target stays reached; by bisection."""
        start = self.parameterization.start(x)
        low, high = free.new_zeros(len(free)), free.new_ones(len(free))
        kept = free.clone()
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            trial = start + _per_sample(middle, free) * (free - start)
            changed = self.parameterization.apply(x, trial)
            good = self.reached(self.logit(changed, trial))
            if self.legal is not None:
                good &= self.legal(changed).to(good)
            kept = torch.where(_per_sample(good, free), trial, kept)
            low, high = torch.where(good, low, middle), torch.where(good, middle, high)
        return kept

    @torch.no_grad()
    def report(self, x: Tensor, free: Tensor, steps: int, others: Sequence[LinearProbe]) -> ConceptChange:
        """Return what has become of the inputs."""
        reference = self.parameterization.reference(x)
        changed = self.parameterization.apply(x, free).detach()
        layers = find_layers(self.module, sorted({self.probe.layer, *(other.layer for other in others)}))
        seen = [
            run(self.module, y, layers, pool=self.probe.pool, forward=self.forward, whole=True) for y in (x, changed)
        ]
        logits = [self.probe.logit(part.features[self.probe.layer]) for part in seen]
        legal = torch.ones_like(logits[1], dtype=torch.bool) if self.legal is None else self.legal(changed)
        scores = {
            (other.concept, other.layer): torch.stack(
                [other.score(part.features[other.layer]) for part in seen], 1
            ).cpu()
            for other in others
        }
        outputs = [None if part.output is None else part.output.cpu() for part in seen]
        return ConceptChange(
            concept=self.probe.concept,
            layer=self.probe.layer,
            inputs=x.cpu(),
            reference=reference.cpu(),
            changed=changed.cpu(),
            before=self.probe.score(seen[0].features[self.probe.layer]).cpu(),
            after=self.probe.score(seen[1].features[self.probe.layer]).cpu(),
            reached=(self.reached(logits[1]) & legal).cpu(),
            distance=distances(changed.cpu(), reference.cpu()),
            outputs_before=outputs[0],
            outputs_after=outputs[1],
            others=scores,
            steps=steps,
        )


class _Best:
    """The best free numbers of every sample so far: of those that reach the target, else of all, the lowest value."""

    def __init__(self, free: Tensor) -> None:
        self.free = free.detach().clone()
        self.reached = torch.zeros(len(free), dtype=torch.bool, device=free.device)
        self.value = torch.full((len(free),), torch.inf, device=free.device, dtype=torch.float64)

    def offer(self, free: Tensor, reached: Tensor, value: Tensor) -> None:
        """Keep what reaches the target where nothing did so far, or has a lower value at the same standing."""
        better = (reached & ~self.reached) | ((reached == self.reached) & (value < self.value))
        self.free = torch.where(_per_sample(better, free), free.detach(), self.free)
        self.value = torch.where(better, value.double(), self.value)
        self.reached = self.reached | reached


def _per_sample(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (like.dim() - 1))


def distances(changed: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """Return L1, L2 and largest difference, and the number of values that differ, of every sample.

    Examples:
        >>> distances(torch.tensor([[3.0, 4.0, 0.0]]), torch.zeros(1, 3))["l2"]
        tensor([5.])
    """
    if not changed.is_floating_point():
        count = (changed != reference).flatten(1).sum(1).float()
        return {"l1": count, "l2": count.sqrt(), "linf": (count > 0).float(), "l0": count}
    difference = (changed - reference).flatten(1)
    return {
        "l1": difference.abs().sum(1),
        "l2": difference.norm(dim=1),
        "linf": difference.abs().amax(1),
        "l0": (difference != 0).sum(1).float(),
    }
