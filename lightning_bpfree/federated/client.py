"""A client of a BAFFLE federation, which computes only forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_bpfree.core.directions import Directions
from lightning_bpfree.core.finite_differences import difference_quotients
from lightning_bpfree.core.params import Params
from lightning_bpfree.federated.layerwise import LayerwisePerturbation
from lightning_bpfree.federated.local_loss import LocalLoss, Objective, evaluated_along
from lightning_bpfree.federated.messages import Instructions, Reply
from lightning_bpfree.federated.partition import LocalData
from lightning_bpfree.federated.settings import Baffle, data_seed, noise_seed, weights_digest
from lightning_bpfree.federated.update import ServerUpdate
from lightning_bpfree.training.measurement.peak_memory import PeakMemory


def loss_differences(
    objective: Objective, params: Mapping[str, Tensor], directions: Directions, settings: Baffle
) -> Tensor:
    """Return a client's measurements: one loss difference per direction, shape ``(K,)`` in float64.

    Args:
        objective: the loss over the client's batches.
        params: the point.
        directions: the ``K`` directions.
        settings: ``sigma``, ``scheme`` and ``chunk_size``.
    """
    sigma, num = settings.sigma, len(directions)
    if settings.layerwise and _fits(objective, directions, settings):
        return _layer_by_layer(objective, directions, settings)
    if settings.chunk_size == 1:
        base = objective(params) if settings.scheme == "forward" else None
        return difference_quotients(objective, params, directions, sigma, base_loss=base).double() * sigma

    def perturbation(ks: Sequence[int], side: float = sigma) -> Params:
        return {name: rows.mul_(side) for name, rows in directions.stack(ks).items()}

    ahead = evaluated_along(objective, params, perturbation, num, settings.chunk_size)
    if settings.scheme == "forward":
        return ahead - objective(params).double()
    behind = evaluated_along(objective, params, lambda ks: perturbation(ks, -sigma), num, settings.chunk_size)
    return (ahead - behind) / 2


def _fits(objective: Objective, directions: Directions, settings: Baffle) -> bool:
    """Return whether a client can perturb layer by layer, which it finds out once."""
    if objective.layerwise is None:
        before = [step.forward_evals for step in objective.steps]  # a look at the module, once, is no part of a round
        objective.layerwise = LayerwisePerturbation(objective.slots, directions).fits(objective)
        for step, count in zip(objective.steps, before, strict=True):
            step.forward_evals = count
    if not objective.layerwise and settings.perturb == "layers":
        raise ValueError(
            "Baffle: perturb='layers': some parameters are used outside of the layer that has them, or the loss is not "
            "finite. Use perturb='auto' or perturb='copy'."
        )
    return objective.layerwise


def _layer_by_layer(objective: Objective, directions: Directions, settings: Baffle) -> Tensor:
    """Return the differences without a copy of the parameters, which must be the module's own."""
    moving, sigma = LayerwisePerturbation(objective.slots, directions), settings.sigma

    def moved(k: int, size: float) -> Tensor:
        with moving.along(k, size):
            return objective().double()

    if settings.scheme == "central":
        return torch.stack([(moved(k, sigma) - moved(k, -sigma)) / 2 for k in range(len(directions))])
    base = objective().double()
    return torch.stack([moved(k, sigma) - base for k in range(len(directions))])


class BaffleClient:
    """Answers the rounds of a server.

    The client keeps only its weights, so that the server need not send them again.

    Args:
        module: any LightningModule without BatchNorm; its trained parameters are overwritten.
        data: the client's samples.
        settings: the federation's settings, equal to the server's.
        number: the number of the client's part of the data, which determines its batches.
        measure_memory: whether answers report by how much the memory of this process rose.

    Raises:
        ValueError: if the module has BatchNorm or nothing to train, or sigma is lost in the rounding of its parameters.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        data: LocalData,
        settings: Baffle,
        number: int,
        *,
        measure_memory: bool = False,
    ) -> None:
        self.loss, self.data, self.settings, self.number = LocalLoss(module.train()), data, settings, number
        settings.check(self.loss.params)
        if settings.perturb == "layers" and settings.local_steps > 1:
            raise ValueError("Baffle: local_steps > 1: a client that walks has a copy anyway; use perturb='auto'.")
        self.fingerprint = settings.fingerprint(self.loss.params, self.loss.frozen)
        self.measure_memory = measure_memory
        self.round = 0  # behind which the weights are
        self._update: ServerUpdate | None = None

    def answer(self, instructions: Instructions) -> Reply:
        """Return the client's numbers for a round, or the reason why there are none."""
        refused = self.take(instructions)
        if refused:
            return Reply(instructions.client, instructions.round, instructions.seed, refused=refused)
        memory = PeakMemory(self.loss.module.device) if self.measure_memory else None
        if memory is not None:
            memory.start()
        differences, num_samples, passes = self.measured(instructions.seed, instructions.client)
        return Reply(
            instructions.client,
            instructions.round,
            instructions.seed,
            differences,
            num_samples,
            passes,
            None if memory is None else memory.peak(),
        )

    def take(self, instructions: Instructions) -> str:
        """Update to the server's weights; if that is not possible, return the reason."""
        if instructions.fingerprint != self.fingerprint:
            return (
                f"fingerprint={instructions.fingerprint}: the server trains another module, or with other settings, "
                f"than this client, whose fingerprint is {self.fingerprint}: give both the same version of the module "
                "and the same configuration"
            )
        if instructions.weights is not None:
            self.load(instructions.weights)
            self.round = instructions.round - 1
            if instructions.optimizer is not None:
                self._update = self._update or ServerUpdate(self.loss.module, self.settings)
                self._update.load_tensors(instructions.optimizer, instructions.made)
        elif instructions.base != self.round:
            return f"out of step: behind round {self.round}, not {instructions.base}"
        else:
            for update in instructions.updates:
                self.replayed(update.seed, update.means)
            self.round = instructions.round - 1
        if instructions.digest and weights_digest(self.loss.params) != instructions.digest:
            self.round = -1
            return "out of step: the weights differ from the server's"
        return ""

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load the server's weights."""
        with torch.no_grad():
            for name, param in self.loss.params.items():
                param.copy_(weights[name])

    def replayed(self, seed: int, means: Tensor) -> None:
        """Apply the server's update of a round, from its seed and its numbers."""
        if not means.numel():  # a round without an update
            return
        if self._update is None:
            self._update = ServerUpdate(self.loss.module, self.settings)
        self._update.apply(seed, {None: (1.0, means)})

    def update_state(self) -> dict[str, Any]:
        """Return the state of the optimizer with which a synchronized client applies the server's updates."""
        return {} if self._update is None else self._update.state_dict()

    def load_update_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`update_state` returned."""
        if state:
            self._update = self._update or ServerUpdate(self.loss.module, self.settings)
            self._update.load_state_dict(state)

    def measured(self, seed: int, client: int) -> tuple[Tensor, float, float]:
        """Return the differences ``(local_steps, K)``, the number of samples, and the number of forward passes."""
        params = {name: param.clone() for name, param in self.loss.params.items()} if self._walks else self.loss.params
        rows, num_samples, passes = [], 0, 0.0
        for step in range(self.settings.local_steps):
            directions = self.settings.drawn(params, seed, step, client)
            with self.loss.on(self.chosen(seed, step), noise_seed(seed, self.number, step)) as objective:
                rows.append(loss_differences(objective, params, directions, self.settings))
                num_samples += objective.num_samples
                passes += sum(part.forward_evals for part in objective.steps)
            if step + 1 < self.settings.local_steps:
                _descend(params, directions, rows[-1], self.settings)
        return torch.stack(rows).cpu(), num_samples, passes

    @property
    def _walks(self) -> bool:
        return self.settings.local_steps > 1

    def chosen(self, seed: int, step: int) -> list[tuple[Any, int]]:
        """Return the batches of a local step."""
        return self.data.batches(data_seed(seed, self.number, step), self.settings.batches)


def _descend(params: Params, directions: Directions, differences: Tensor, settings: Baffle) -> None:
    """Take a step of plain gradient descent along what was measured."""
    weights = differences / (settings.sigma * settings.num_directions)
    for name, gradient in directions.combine(weights).items():
        params[name].sub_(gradient, alpha=settings.local_lr)
