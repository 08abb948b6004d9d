"""One training pass of a team: every layer draws, the output acts, and the data for the update is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bpfree.core.network.network_call import Call, RefusedError
from lightning_bpfree.core.replay.random_streams import RandomStreams
from lightning_bpfree.core.step import Step
from lightning_bpfree.methods.team_reinforce.layer import Layer, as_input, averaged
from lightning_bpfree.methods.team_reinforce.network import TeamNetwork
from lightning_bpfree.methods.team_reinforce.units.exploration import Drawn


class TeamPass:
    """Runs in the network's place in a training step, once.

    Args:
        step: the step it is part of.
        num_samples: draws of each input, ``M``; the rows of all of them are folded into the batch: row ``m * B + b``
            is draw ``m`` of input ``b``.
        generator: of the draws.
        negative_phase: whether the scores of lateral weights have their mean subtracted.
        leaves: whether values are to collect derivatives by what is above them.
        again: whether the network may run again, with the same dropout.
    """

    def __init__(
        self,
        step: Step,
        num_samples: int,
        generator: torch.Generator,
        *,
        negative_phase: bool,
        leaves: bool,
        again: bool = False,
    ) -> None:
        self.step, self.num_samples, self.generator = step, num_samples, generator
        self.negative_phase, self.leaves = negative_phase, leaves
        self._streams = RandomStreams([generator.device]) if again else None
        self.layers: list[Layer] = []
        self.labels: Tensor | None = None

    def __call__(self, team: TeamNetwork, inputs: Tensor, call: Call) -> Any:
        """Draw, act, and return what the training step sees: the output, averaged over draws, without a graph."""
        if self.layers:
            raise RefusedError(
                "TeamReinforce: the training step calls its network twice; a reward belongs to one call. Concatenate "
                "the batches, or name the submodule that is called once by network=...."
            )
        copies, self.team, self.labels = self.num_samples, team, call.labels
        self.inputs = inputs.repeat(copies, *[1] * (inputs.dim() - 1)) if copies > 1 else inputs
        self.call = call.times(len(inputs), copies)
        self._before = None if self._streams is None else self._streams.save()
        self.layers = team.run(self.inputs, self.call, self._drawn)
        last = self.layers[-1]
        if team.output is not None:
            last.drawn = Drawn(*last.unit.draw(last.potential.detach(), self.generator))
            last.value = last.drawn.value
        if team.is_one_machine:
            self._draw_jointly()
        scores = averaged(last.potential.detach(), copies, team.output)
        return team.as_output(last.returned, scores, copies)

    def _drawn(self, layer: Layer) -> Tensor:
        value = self.team.draw(layer, self.generator, self.negative_phase)
        return value.requires_grad_() if self.leaves else value

    def set_values(self, values: Sequence[Tensor]) -> None:
        """Give the layers of units other values, and the potentials above them what follows from these.

        Args:
            values: values of every layer of units, without the output's.
        """
        hidden, below = self.layers[:-1], [None, *values]
        self.layers[-1].drawn = None  # what was done stays, but its score follows from the values below
        for layer, value in zip(hidden, values, strict=True):
            layer.value, layer.drawn = as_input(layer, value), None
        if not self.is_chain:
            self._run_again()
            return
        for layer, previous in zip(self.layers[1:], below[1:], strict=True):
            assert layer.linear is not None
            assert previous is not None
            layer.below = as_input(layer, previous)
            layer.potential = F.linear(layer.below, layer.linear.weight, layer.linear.bias)

    def set_leaves(self, values: Sequence[Tensor]) -> None:
        """Like :meth:`set_values`, with potentials that can be differentiated by the values, leaves of a graph."""
        for layer, value in zip(self.layers, values, strict=False):
            layer.value, layer.drawn = value, None
        self._run_again()

    @property
    def is_chain(self) -> bool:
        """Whether one linear layer lies between any two layers of units, and before the output."""
        return all(layer.linear is not None and layer.chained for layer in self.layers[1:])

    def _run_again(self) -> None:
        values = iter([layer.value for layer in self.layers[:-1]])
        with self.step.aside():
            if self._streams is not None and self._before is not None:
                self._streams.load(self._before)
            again = self.team.run(self.inputs, self.call, lambda _: next(values))
        for layer, fresh in zip(self.layers, again, strict=True):
            layer.potential, layer.linear = fresh.potential, fresh.linear
            layer.below, layer.chained = fresh.below, fresh.chained

    def _draw_jointly(self) -> None:
        """Draw hidden layers and output as one Boltzmann machine."""
        team, layers = self.team, self.layers
        machine = team.machine(layers)
        with torch.autocast(layers[0].potential.device.type, enabled=False):
            first = layers[0].potential.detach().to(machine.dtype)
            values = machine.draw(first, self.generator)
            others = machine.draw(first, self.generator) if self.negative_phase else [None] * len(values)
        self.set_values(values[:-1])
        layers[-1].value = values[-1]
        for layer, part, value, other in zip(layers, machine.layers, values, others, strict=True):
            layer.drawn = machine.settings.drawn(part.unit, value, other, lateral=part.lateral is not None)
