"""Training steps of members one after another, each with its backward pass before the next starts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bpfree.core.injection import inject
from lightning_bpfree.core.step import SkipBatchError, loss_of
from lightning_bpfree.methods.deep_ensemble.member_steps import MemberSteps, Step
from lightning_bpfree.methods.deep_ensemble.own_attributes import OwnAttributes


class InTurn(MemberSteps):
    """Evaluates a training step member by member; no two graphs are alive at a time.

    The gradients are made at once, with the factor by which Lightning is going to multiply the loss, and wait for its
    backward pass: each member's have the bits that they have alone.
    """

    def __post_init__(self) -> None:
        """Prepare what the members assign to the module."""
        super().__post_init__()
        self.attributes = OwnAttributes(self.module, self.members.count)

    def loss(self, steps: list[Step], args: tuple[Any, ...], kwargs: dict[str, Any], factor: Tensor) -> Tensor | None:
        """Return the members' mean loss, whose backward pass gives every member its own gradient.

        Args:
            steps: the training step as each member evaluates it.
            args: of the step.
            kwargs: of the step.
            factor: what Lightning will multiply the loss by: 1 over the accumulated batches, times the loss scale.
        """
        values: list[Tensor] = []
        receivers: list[Tensor] = []
        gradients: list[Tensor] = []
        for member in range(self.members.count):
            with self._at_work(member):
                batch = (args[0][member], *args[1:]) if self.own_batches else args
                output = steps[member](*batch, **kwargs)
                if member == 0:
                    self.first_output = output
                try:
                    loss = loss_of(output)
                except SkipBatchError:
                    continue
                values.append(loss.detach())
                found = self._gradients(loss, factor)
            for parameter, gradient in zip(self._parameters(member), found, strict=True):
                if gradient is not None:
                    receivers.append(parameter)
                    gradients.append(gradient)
        if not values:
            return None
        mean = torch.stack([value.to(values[0].device) for value in values]).mean()
        return inject(mean, receivers, lambda scale: _rescaled(gradients, scale, factor))

    @contextlib.contextmanager
    def _at_work(self, member: int) -> Iterator[None]:
        self.at_work.member = member
        try:
            with (
                self.members.at_work(member),
                self.streams.at_work(member),
                self.attributes.at_work(member),
                self.log.listening(),
            ):
                yield
        finally:
            self.at_work.member = 0

    def _parameters(self, member: int) -> list[nn.Parameter]:
        return [p for p in self.members.apart[member].values() if p.requires_grad]

    def _gradients(self, loss: Tensor, factor: Tensor) -> tuple[Tensor | None, ...]:
        carriers = [slot.parameter for slot in self.members.slots if slot.parameter.requires_grad]
        # As outside of the precision plugin's forward context, where backward passes run.
        with torch.autocast(loss.device.type, enabled=False):
            scale = factor.to(loss.device, loss.dtype)
            return torch.autograd.grad(loss, carriers, scale, allow_unused=True)


def _rescaled(gradients: list[Tensor], scale: Tensor, factor: Tensor) -> list[Tensor]:
    given = list(gradients)
    gradients.clear()  # autograd keeps a gradient that nobody else holds, and copies the others
    ratio = float(scale) / float(factor)
    return given if ratio == 1 else [gradient * ratio for gradient in given]
