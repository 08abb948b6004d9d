"""Forward gradients over a network in blocks: guesses, targets, and the projection of targets onto guesses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_bpfree.core.directions import Directions, Distribution
from lightning_bpfree.core.labels import LabelsOf, labels_of
from lightning_bpfree.core.network.network_call import Call
from lightning_bpfree.core.params import Params, widen
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.methods.forward_gradient.block_passes import local_slopes, sample_slopes, slopes
from lightning_bpfree.methods.forward_gradient.local_loss import Heads, local_gradients, sample_losses
from lightning_bpfree.training.network_in_blocks import (
    LOCAL_BACKWARD,
    NetworkInBlocks,
    backward_in_blocks,
    pulled_back,
    recorded,
)

Space = Literal["weights", "activations"]
Scope = Literal["network", "block", "tensor"]
Role = Literal["guess", "target"]


def unit(tensors: Sequence[Tensor], each_sample: bool = False) -> list[Tensor]:
    """Return ``tensors`` divided by their joint Euclidean length; zero, or what underflows when squared, gives zero.

    With a unit guess ``q`` the projection of ``g`` is ``<g, q> q``.

    Args:
        tensors: of any shapes.
        each_sample: divide every sample, a row of the first dimension in all of them, by its own length.

    Examples:
        >>> unit([torch.tensor([3.0]), torch.tensor([4.0])])
        [tensor([0.6000]), tensor([0.8000])]
    """
    if not tensors:
        return []
    flat = [widen(t).flatten(1) if each_sample else widen(t).flatten()[None] for t in tensors]
    size = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t, dim=1) for t in flat]), dim=0)
    factor = torch.where(size > torch.finfo(size.dtype).tiny, 1 / size, torch.zeros_like(size))
    return [(t * factor[:, None]).reshape(like.shape).to(like.dtype) for t, like in zip(flat, tensors, strict=True)]


class ProjectionSettings(NamedTuple):
    """The settings of a :class:`BlockProjection`.

    Args:
        space: whether parameters or block outputs are perturbed.
        scope: what is projected together.
        local: whether the target is local.
        same: whether guess and target are the same local losses.
        num: random directions a batch.
        distribution: of random directions.
        labels: returns the labels of a batch.
    """

    space: Space
    scope: Scope
    local: bool
    same: bool
    num: int
    distribution: Distribution
    labels: LabelsOf | None


class BlockProjection:
    """One step on a network in blocks.

    Args:
        settings: what to estimate.
        parts: the blocks of this step.
        heads: of the guess and of a local target.
        num_classes: width of the heads' outputs.
        seed: the rule's own; heads start from it.
        rank: rank of this process; each rank draws its own random activations.
    """

    def __init__(
        self,
        settings: ProjectionSettings,
        parts: NetworkInBlocks,
        heads: dict[Role, Heads],
        num_classes: int,
        seed: int,
        rank: int,
    ) -> None:
        self.settings, self.parts, self.heads = settings, parts, heads
        self.num_classes, self.seed, self.rank = num_classes, seed, rank
        self.step, self.guided = parts.step, "guess" in heads
        self.losses: dict[str, Tensor] = {}
        self.calls: list[Call] = []  # of the network by keywords
        self._made: dict[tuple[Role, int], tuple[str, nn.Module]] = {}
        self._labels: Tensor | None = None

    def gradients(self) -> tuple[Params, list[Tensor]]:
        """Return the gradients of all trained parameters, and the numbers that were measured for them."""
        if not self.parts.active:
            cost = 1 + LOCAL_BACKWARD
            return recorded(self.parts, lambda _, z: z.detach(), graph=True, cost=cost).gradients, []
        if self.settings.same:
            return self._own_losses()
        if self.settings.space == "weights":
            return self._weights()
        return self._local_activations() if self.settings.local else self._activations()

    # --- heads ---

    def _head(self, role: Role, j: int, z: Tensor) -> tuple[str, nn.Module]:
        if (role, j) not in self._made:
            heads, block = self.heads[role], self.parts.blocks[j]
            build = partial(heads.loss.head, tuple(z.shape[1:]), self.num_classes, block)
            self._made[role, j] = heads.of(block, build, z, self.seed, self.step)
        return self._made[role, j]

    def _labels_for(self, z: Tensor) -> Tensor:
        if self._labels is None or len(self._labels) != len(z):
            given = self.calls[-1].labels if self.calls else None
            batch, pick = self.step.args[0], self.settings.labels
            self._labels = labels_of(batch, len(z), self.num_classes, pick, given).to(z.device)
        return self._labels

    def _judged(self, role: Role, j: int, z: Tensor, sources: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the gradients of the summed local losses at ``z``, and keep those of the head."""
        (key, head), heads = self._head(role, j, z), self.heads[role]
        losses, found, own = local_gradients(head, z, self._labels_for(z), sources, heads.trained)
        heads.keep(key, own, len(z))
        self.losses[f"{role}/{self.parts.blocks[j].name}"] = losses.mean()
        return found

    def _train_target(self, j: int, z: Tensor) -> None:
        if "target" in self.heads and self.heads["target"].trained:
            self._judged("target", j, z, [])

    def _target_losses(self, j: int, z: Tensor) -> Tensor:
        return sample_losses(self._head("target", j, z)[1], z, self._labels_for(z))

    # --- the same local losses as guess and target: the projection changes nothing ---

    def _own_losses(self) -> tuple[Params, list[Tensor]]:
        made: Params = {}

        def leave(j: int, z: Tensor) -> Tensor:
            if slots := self.parts.slots[j]:
                found = self._judged("guess", j, z, [slot.parameter for slot in slots])
                for slot, gradient in zip(slots, found, strict=True):
                    made[slot.name] = torch.zeros_like(slot.parameter) if gradient is None else gradient / len(z)
            return z.detach()

        outside = recorded(self.parts, leave, graph=True, cost=1 + LOCAL_BACKWARD)
        return {**outside.gradients, **made}, list(self.losses.values())

    # --- in the space of weights ---

    def _weights(self) -> tuple[Params, list[Tensor]]:
        guesses: Params = {}

        def leave(j: int, z: Tensor) -> Tensor:
            if slots := self.parts.slots[j]:
                if self.guided:
                    found = self._judged("guess", j, z, [slot.parameter for slot in slots])
                    guesses.update({s.name: q for s, q in zip(slots, found, strict=True) if q is not None})
                self._train_target(j, z.detach())
            return z.detach()

        cost = 1 + LOCAL_BACKWARD if self.guided else 1.0
        made = dict(recorded(self.parts, leave, graph=self.guided, cost=cost).gradients)
        groups, measured = self._groups(), []
        totals: Params = {name: torch.zeros_like(widen(p)) for name, p in self.parts.detached.items()}
        for direction in self._directions(guesses, groups):
            measured.append(self._slopes(direction, groups))
            for names, slope in zip(groups, measured[-1] / self.settings.num, strict=True):
                for name in names:
                    if name in direction:
                        totals[name] += widen(direction[name]) * slope.to(totals[name].device, totals[name].dtype)
        made.update({name: totals[name].to(p.dtype) for name, p in self.parts.detached.items()})
        return made, measured

    def _groups(self) -> list[list[str]]:
        blocks = [[slot.name for slot in self.parts.slots[j]] for j in self.parts.active]
        names = [name for block in blocks for name in block]
        return {"network": [names], "block": blocks, "tensor": [[name] for name in names]}[self.settings.scope]

    def _directions(self, guesses: Params, groups: list[list[str]]) -> Iterator[Params]:
        if not self.guided:
            yield from Directions(self.parts.detached, self.settings.num, self.step.seed, self.settings.distribution)
            return
        made: Params = {}
        for names in groups:
            known = [name for name in names if name in guesses]
            made.update(zip(known, unit([guesses.pop(name) for name in known]), strict=True))
        yield made

    def _slopes(self, direction: Params, groups: list[list[str]]) -> Tensor:
        if not self.settings.local:
            return slopes(self.parts, direction, groups)
        mean = lambda j, z: self._target_losses(j, z).mean()  # noqa: E731
        return local_slopes(self.parts, direction, groups, mean, alone=self.settings.scope == "tensor")

    # --- in the space of activations ---

    def _local_activations(self) -> tuple[Params, list[Tensor]]:
        made: Params = {}

        def leave(j: int, z: Tensor) -> Tensor:
            if slots := self.parts.slots[j]:
                plain, signal = z.detach(), torch.zeros_like(widen(z.detach()))
                for v in self._at(j, plain):
                    with torch.no_grad(), forward_ad.dual_level():
                        losses = self._target_losses(j, forward_ad.make_dual(plain, v))
                        signal += _scaled(v, forward_ad.unpack_dual(losses).tangent / (self.settings.num * len(z)))
                made.update(pulled_back(slots, z, signal))
                self._train_target(j, plain)
            return z.detach()

        outside = recorded(self.parts, leave, graph=True, cost=1 + LOCAL_BACKWARD)
        return {**outside.gradients, **made}, list(self.losses.values())

    def _at(self, j: int, z: Tensor) -> Iterator[Tensor]:
        """Yield the directions at the output ``z`` of block ``j``."""
        if self.guided:
            yield from unit([self._guess_at(j, z)], each_sample=True)
        else:
            for k in range(self.settings.num):
                yield self._random_at(k, j, z)

    def _guess_at(self, j: int, z: Tensor) -> Tensor:
        leaf = z.detach().requires_grad_()
        (found,) = self._judged("guess", j, leaf, [leaf])
        return torch.zeros_like(z) if found is None else found

    def _random_at(self, k: int, j: int, z: Tensor) -> Tensor:
        seed = mix(self.step.seed, j, self.rank)
        return Directions({"z": z}, self.settings.num, seed, self.settings.distribution)[k]["z"]

    def _activations(self) -> tuple[Params, list[Tensor]]:
        guesses: dict[int, Tensor] = {}

        def leave(j: int, z: Tensor) -> Tensor:
            if self.guided and self.parts.slots[j]:
                guesses[j] = self._guess_at(j, z)
            return z.detach()

        outside = recorded(self.parts, leave, graph=False, output=True)
        assert outside.output is not None
        together = [self.parts.active] if self.settings.scope == "network" else [[j] for j in self.parts.active]
        for js in together if self.guided else []:
            guesses.update(zip(js, unit([guesses[j] for j in js], each_sample=True), strict=True))

        def direction(k: int, j: int, z: Tensor) -> Tensor:
            if len(z) != len(outside.output):  # type: ignore[arg-type]  # not None
                raise MisconfigurationException(
                    f"ForwardGradient(space='activations'): block {self.parts.blocks[j].name} gives {tuple(z.shape)} "
                    "and the first dimension is not the batch's. Use space='weights'."
                )
            return guesses[j] if self.guided else self._random_at(k, j, z)

        each: dict[int, list[Tensor]] = {j: [] for j in self.parts.active}
        for k in range(self.settings.num):
            for js in together:
                found = sample_slopes(self.parts, outside.output, js, partial(direction, k))
                for j in js:
                    each[j].append(found / self.settings.num)

        def signal(j: int, z: Tensor) -> Tensor:
            parts = [_scaled(direction(k, j, z), c) for k, c in enumerate(each[j])]
            return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

        made = backward_in_blocks(self.parts, signal)
        return {**outside.gradients, **made}, [c for found in each.values() for c in found]


def _scaled(v: Tensor, coefficients: Tensor) -> Tensor:
    return widen(v) * widen(coefficients).view(-1, *[1] * (v.dim() - 1))
