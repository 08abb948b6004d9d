"""Greedy search over discrete inputs: each step takes the best neighbor, until the probe reaches its target."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import PositiveInt, checked
from lightning_bpfree.methods.concept_backprop.change import ChangeSettings, ConceptChange, distances
from lightning_bpfree.methods.concept_backprop.frozen import Forward, device_of, frozen, usable
from lightning_bpfree.methods.concept_backprop.layers import find_layers, run
from lightning_bpfree.methods.concept_backprop.probe import LinearProbe

Neighbors = Callable[[Tensor], Tensor]
"""From one input ``(...)`` to all that may follow it in one step, ``(K, ...)``."""


@checked
def flip_concept(
    module: nn.Module,
    inputs: Tensor,
    probe: LinearProbe,
    neighbors: Neighbors,
    settings: ChangeSettings | None = None,
    *,
    max_flips: PositiveInt = 4,
    forward: Forward = None,
    chunk_size: PositiveInt = 4096,
) -> ConceptChange:
    """Return inputs after the steps that a greedy search needs to bring the probe's score to its target.

    Each step takes the neighbor with the highest score (or the lowest, to remove the concept). No gradient is needed,
    and every intermediate input is one that ``neighbors`` allows: a legal position, a printable text.

    Args:
        module: any trained module.
        inputs: ``(B, ...)``.
        probe: on a layer of the module.
        neighbors: returns the inputs that one step can reach; see :func:`single_changes` and :func:`token_changes`.
        settings: target and direction; penalties, steps and learning rate are not used.
        max_flips: maximum number of steps, >= 1.
        forward: how the module is evaluated.
        chunk_size: neighbors in one forward pass.

    Examples:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
        >>> probe = LinearProbe("first", "0", "binary", torch.tensor([4.0, 0.0, 0.0, 0.0]), torch.tensor(-1.0))
        >>> boards = torch.eye(2)[[1, 1]].T[None]  # two squares, both of the second category
        >>> change = flip_concept(net, boards, probe, single_changes)
        >>> change.distance["l0"], change.reached
        (tensor([2.]), tensor([True]))
    """
    settings = settings or ChangeSettings()
    sign, goal = (1.0 if settings.direction == "raise" else -1.0), settings.goal(probe)
    with frozen(module), torch.no_grad():
        x = usable(inputs, device_of(module))
        layers = find_layers(module, probe.layer)

        def scores(batch: Tensor) -> Tensor:
            parts = [
                probe.score(run(module, part, layers, pool=probe.pool, forward=forward).features[probe.layer])
                for part in batch.split(chunk_size)
            ]
            return torch.cat(parts)

        changed = torch.stack([_climb(sample, scores, neighbors, sign, goal, max_flips) for sample in x])
        seen = [run(module, y, layers, pool=probe.pool, forward=forward, whole=True) for y in (x, changed)]
        before, after = (probe.score(part.features[probe.layer]).cpu() for part in seen)
        outputs = [None if part.output is None else part.output.cpu() for part in seen]
    return ConceptChange(
        concept=probe.concept,
        layer=probe.layer,
        inputs=x.cpu(),
        reference=x.cpu(),
        changed=changed.cpu(),
        before=before,
        after=after,
        reached=sign * (after - goal) >= -1e-6,
        distance=distances(changed.cpu(), x.cpu()),
        outputs_before=outputs[0],
        outputs_after=outputs[1],
        others={},
        steps=max_flips,
    )


def _climb(
    sample: Tensor, scores: Callable[[Tensor], Tensor], neighbors: Neighbors, sign: float, goal: float, limit: int
) -> Tensor:
    height = sign * float(scores(sample[None]))
    for _ in range(limit):
        if height >= sign * goal:
            break
        options = neighbors(sample)
        if not len(options):
            break
        heights = sign * scores(options)
        best = int(heights.argmax())
        if float(heights[best]) <= height:
            break
        sample, height = options[best], float(heights[best])
    return sample


@checked
def single_changes(board: Tensor, legal: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return all one-hot boards ``(N, K, ...)`` that differ from ``(K, ...)`` at one position, or the legal ones.

    Args:
        board: one-hot over the first dimension.
        legal: maps boards ``(N, K, ...)`` to booleans ``(N,)``.

    Examples:
        >>> single_changes(torch.eye(3)[:, [0, 2]]).shape
        torch.Size([4, 3, 2])
    """
    categories = len(board)
    flat = board.flatten(1)
    present = flat.argmax(0)
    made = []
    for position in range(flat.shape[1]):
        for category in range(categories):
            if category != present[position]:
                copy = flat.clone()
                copy[:, position] = 0
                copy[category, position] = 1
                made.append(copy.view_as(board))
    boards = torch.stack(made)
    return boards if legal is None else boards[legal(boards).bool()]


@checked
def token_changes(tokens: Tensor, allowed: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return all sequences ``(N, T)`` that differ from ``(T,)`` in one token.

    Args:
        tokens: ids.
        allowed: ids that may be inserted.
        positions: positions that may change; None for all.

    Examples:
        >>> token_changes(torch.tensor([1, 2]), torch.tensor([1, 2, 3])).shape
        torch.Size([4, 2])
    """
    places = torch.arange(len(tokens), device=tokens.device) if positions is None else positions.to(tokens.device)
    allowed = allowed.to(tokens)
    made = tokens.repeat(len(places) * len(allowed), 1)
    rows = torch.arange(len(made), device=tokens.device)
    made[rows, places.repeat_interleave(len(allowed))] = allowed.repeat(len(places))
    return made[(made != tokens).any(1)]
