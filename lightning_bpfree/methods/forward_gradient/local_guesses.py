"""A forward gradient's arguments about blocks, guesses and targets: their meaning, and checks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_bpfree.core.block_hooks import calls_of, scores_leaving
from lightning_bpfree.core.blocks import Blocks, Cut, cut, find_network
from lightning_bpfree.core.directions import Distribution
from lightning_bpfree.core.labels import LabelsOf
from lightning_bpfree.core.network.network_call import RefusedError
from lightning_bpfree.core.params import ParameterSlots
from lightning_bpfree.core.step import Estimate, Step
from lightning_bpfree.methods.forward_gradient.block_passes import DUAL_COST
from lightning_bpfree.methods.forward_gradient.local_loss import Heads, LocalLoss
from lightning_bpfree.methods.forward_gradient.projection import BlockProjection, ProjectionSettings, Role, Scope, Space
from lightning_bpfree.training.network_in_blocks import LOCAL_BACKWARD, NetworkInBlocks


class LocalGuesses:
    """The estimates of a :class:`ForwardGradient` whose network is cut into blocks, and the heads that they need.

    Args:
        guess: gives the directions; None draws them at random.
        target: the losses whose gradient is estimated; None for the user's.
        blocks: see :func:`lightning_bpfree.core.blocks.cut`.
        network: see :func:`lightning_bpfree.core.blocks.find_network`.
        settings: what to estimate.
    """

    def __init__(
        self,
        guess: LocalLoss | None,
        target: LocalLoss | None,
        blocks: Blocks,
        network: str | None,
        settings: ProjectionSettings,
    ) -> None:
        self.blocks, self.network, self.settings = blocks, network, settings
        losses: dict[Role, LocalLoss | None] = {"guess": guess, "target": None if settings.same else target}
        self.heads: dict[Role, Heads] = {role: Heads(loss) for role, loss in losses.items() if loss is not None}
        self._num_classes = self._given_classes
        self._cut: Cut | None = None
        self._module: nn.Module | None = None
        self._inspected: frozenset[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: the heads, without the user's module."""
        return {**self.__dict__, "_cut": None, "_module": None, "_inspected": None}

    @property
    def uses_tangents(self) -> bool:
        """Whether estimates need forward-mode differentiation; local losses as their own target do not."""
        return not self.settings.same

    @property
    def _given_classes(self) -> int:
        return max((heads.loss.num_classes or 0 for heads in self.heads.values()), default=0)

    def go_on_with(self, before: LocalGuesses) -> None:
        """Adopt the heads of another object where they are the same."""
        self._num_classes = self._given_classes or before._num_classes
        for role, heads in self.heads.items():
            if role in before.heads and heads.loss is before.heads[role].loss:
                heads.own = before.heads[role].own
                heads.own.configure(heads.loss.optimizer, heads.loss.lr)

    # --- before the first batch ---

    def check(self, module: nn.Module, slots: ParameterSlots) -> None:
        """Cut the network, and refuse modules for which the estimate would be wrong."""
        if self.network is not None or not any(part is self._module for part in module.modules()):
            _, self._module = find_network(module, self.network)
        assert self._module is not None
        self._cut = cut(self._module, self.blocks)
        for block in self._cut.blocks:
            inside = {id(part) for top in block.modules for part in top.modules()}
            mine = {id(parameter) for parameter in block.parameters}
            for slot in slots:
                places = [id(owner) in inside for owner, _ in slot.places]
                if id(slot.parameter) in mine and len(places) > 1 and not all(places):
                    raise MisconfigurationException(
                        f"ForwardGradient: {slot.name} is tied, and block {block.name} has only one of the modules "
                        "that use it. Put all of them into one block, or leave it out by params=...."
                    )
        if self.settings.space == "activations" and not self.settings.local:
            self._check_coupling(self._module)

    def _check_coupling(self, network: nn.Module) -> None:
        assert self._cut is not None
        first = {id(part) for block in self._cut.blocks[:1] for top in block.modules for part in top.modules()}
        for name, part in network.named_modules():
            norm = isinstance(part, nn.modules.batchnorm._BatchNorm)
            if norm and id(part) not in first and (part.training or part.running_mean is None):
                raise MisconfigurationException(
                    f"ForwardGradient(space='activations') measures the slope of every sample separately, and {name} "
                    f"({type(part).__name__}) mixes samples. Use GroupNorm or LayerNorm, put it into "
                    "eval mode before the fit, or use space='weights'."
                )

    def release(self) -> None:
        """Release the user's module."""
        self._cut = self._module = self._inspected = None

    # --- one batch ---

    def estimate(self, step: Step, seed: int) -> Estimate:
        """Return the loss and the projected gradient; heads get theirs.

        Args:
            step: the step.
            seed: the rule's own.
        """
        assert self._cut is not None, "estimate before check"
        assert self._module is not None
        trained = frozenset(slot.name for slot in step.trained)
        parts = NetworkInBlocks.of(
            "ForwardGradient", step, self._module, self._cut.blocks, inspect=trained != self._inspected
        )
        if self.heads and parts.active and not self._num_classes:
            self._num_classes = _width_of_output(parts)
        rank = int(getattr(step.module, "global_rank", 0))
        projection = BlockProjection(self.settings, parts, self.heads, self._num_classes, seed, rank)
        self.settle(False)  # of a batch that was interrupted
        with calls_of(self._module) as projection.calls:
            gradients, measured = projection.gradients()
        assert step.recorded_loss is not None
        loss = step.recorded_loss = step.recorded_loss.detach()  # its graph has done its work
        numbers = torch.cat([number.detach().flatten() for number in measured or [loss]])
        step.measure(len(numbers), lambda _: numbers)  # raises for numbers that are not finite
        self._inspected = trained
        losses = {f"local_loss/{name}": value for name, value in projection.losses.items()}
        return Estimate(loss, {slot.name: gradients[slot.name] for slot in step.trained}, losses)

    def settle(self, succeeded: bool) -> None:
        """Keep what the heads learned from the batch, or drop it."""
        for heads in self.heads.values():
            heads.own.settle(succeeded)

    def step_heads(self, reduce: Callable[[Tensor], Tensor] | None) -> None:
        """Move the heads along the mean of their gradients since the last step."""
        for heads in self.heads.values():
            heads.own.step(reduce)

    def state_dict(self) -> dict[str, Any]:
        """Return heads, their optimizers' states, and the number of classes found at the first batch."""
        return {"num_classes": self._num_classes, **{role: h.own.state_dict() for role, h in self.heads.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._num_classes = state["num_classes"]
        for role, heads in self.heads.items():
            heads.own.load_state_dict(state.get(role, {}))

    # --- banner ---

    def describe(self) -> dict[str, str]:
        """Return rows for the banner."""
        guess, target = (self.heads.get(role) for role in ("guess", "target"))
        along = "random directions" if guess is None else f"the guess of {guess.loss!r}"
        of = "the same local losses" if self.settings.same else "the loss" if target is None else repr(target.loss)
        names = None if self._cut is None else ", ".join(block.name for block in self._cut.blocks)
        return {
            "a step": self._cost(),
            "route": f"along {along}, in the space of {self.settings.space}; target: {of}",
            "blocks": f"{names or self.blocks}; layers behind them get their exact gradient",
        }

    def _cost(self) -> str:
        """Return the cost of a step; heads, and the backward pass behind the blocks, are not counted."""
        settings, once = self.settings, 1 + LOCAL_BACKWARD
        if settings.same or (settings.local and settings.space == "activations"):
            return f"1 forward, and a backward pass inside each block ({once:g} forwards)"
        first = once if "guess" in self.heads else 1.0
        first = 1 + once if settings.space == "activations" else first
        passes, each = settings.num, ""
        if settings.scope == "tensor":
            each = " a parameter tensor"
        elif settings.scope == "block" and not settings.local:
            if self._cut is None:
                each = " a block"
            else:
                passes *= len(self._cut.blocks)
        total = "" if each else f" ({first + DUAL_COST * passes:g} forwards)"
        return f"{passes} dual forward{'s' * (passes > 1)}{each} beside {first:g} plain{total}"


def _width_of_output(parts: NetworkInBlocks) -> int:
    found: list[Tensor] = []

    def look(out: Tensor) -> Tensor:
        found.append(out)
        return out

    with scores_leaving(parts.network, look), torch.no_grad():
        parts.step.loss(recorded=False)
    if len(found) != 1 or found[0].dim() != 2 or found[0].shape[1] < 2:
        shapes = ", ".join(str(tuple(out.shape)) for out in found)
        raise RefusedError(
            f"num_classes=None takes the width of the network's output, and found {shapes or 'none'}: pass "
            "LocalLoss(num_classes=...)."
        )
    return found[0].shape[1]


def local_guesses(
    guess: LocalLoss | None,
    target: LocalLoss | str,
    space: Space,
    scope: Scope | None,
    blocks: Blocks | None,
    network: str | None,
    labels: LabelsOf | None,
    num: int,
    distribution: Distribution,
) -> LocalGuesses | None:
    """Return what the arguments of a ForwardGradient ask for, or None if they leave the network in one piece.

    Raises:
        ValueError: for arguments that are unknown or contradict each other.
    """
    plain = (guess, target, space, blocks, network) == (None, "global", "weights", None, None)
    if plain and scope in (None, "network"):
        if labels is not None:
            raise ValueError(
                "ForwardGradient: labels are for local losses, and neither guess nor target asks for one: leave labels "
                "out."
            )
        return None
    local = target if isinstance(target, LocalLoss) else guess
    if target == "local" and guess is None:
        local = LocalLoss(blocks=1 if blocks is None else blocks, network=network, labels=labels)
    if target == "global":
        local = None
    if guess is not None and (num != 1 or distribution != "gaussian"):
        raise ValueError(
            f"ForwardGradient: num_directions={num}, directions={distribution!r} beside guess={guess!r}: a guess is "
            "one direction a batch. Leave them out, or use guess=None."
        )
    if space == "activations" and (scope == "tensor" or (scope == "network" and local is not None)):
        raise ValueError(
            f"ForwardGradient: scope={scope!r} with space='activations'{' and a local target' if local else ''}: "
            "this scope has no meaning there. Use scope='block'."
        )
    where = [loss for loss in (guess, local) if loss is not None]
    cut_by, of = _one_cut(where, blocks, network)
    settings = ProjectionSettings(
        space,
        scope or "block",
        local is not None,
        local is not None and local is guess,
        num,
        distribution,
        next((loss.labels for loss in where if loss.labels is not None), labels),
    )
    return LocalGuesses(guess, local, cut_by, of, settings)


def _one_cut(where: list[LocalLoss], blocks: Blocks | None, network: str | None) -> tuple[Blocks, str | None]:
    """Return blocks and network, on which the local losses and the rule itself must agree."""
    cuts: list[tuple[Blocks | None, str | None]] = [(loss.blocks, loss.network) for loss in where]
    cuts += [(blocks, network)] if (blocks, network) != (None, None) else []
    if any(one != cuts[0] for one in cuts):
        raise ValueError(
            f"ForwardGradient: blocks and network differ: {', '.join(map(repr, cuts))}. Guess and target must cut the "
            "network in the same way; beside a LocalLoss, leave blocks and network of the rule out."
        )
    cut_by, of = cuts[0] if cuts else (None, None)
    return 1 if cut_by is None else cut_by, of
