"""Federated averaging by backprop, with the same module, data and rounds: the baseline for forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_bpfree.core.arguments import FractionBelowOne, NonNegativeInt, PositiveInt, checked
from lightning_bpfree.core.params import Params, norm
from lightning_bpfree.core.step import loss_of
from lightning_bpfree.federated.local_loss import LocalLoss, own_randomness
from lightning_bpfree.federated.messages import Instructions, Reply
from lightning_bpfree.federated.partition import LocalData
from lightning_bpfree.federated.server import MovingAverage, RoundReport
from lightning_bpfree.federated.settings import data_seed, noise_seed, round_seed
from lightning_bpfree.federated.update import OptimizerSteps, configured_optimizer
from lightning_bpfree.training.measurement.peak_memory import PeakMemory


class FedAvg:
    """Trains on the clients by backprop.

    Args:
        upload: ``"weights"``: a client takes local steps with the module's optimizer, which is reset in every round,
            and the server averages the weights; ``"gradients"``: it returns the gradient of its loss, and the server
            steps the optimizer.
        local_steps: mini-batches of a client per round, one step each; None for one epoch of its data.

    Raises:
        ValueError: for arguments out of range.

    References:
        B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017,
        arXiv 1602.05629.

    Examples:
        >>> FedAvg(local_steps=5).upload
        'weights'
    """

    noise = "shared"

    @checked
    def __init__(
        self, upload: Literal["weights", "gradients"] = "weights", local_steps: PositiveInt | None = None
    ) -> None:
        self.upload, self.local_steps = upload, local_steps

    def to_plain(self) -> dict[str, Any]:
        """Return the settings as numbers and strings."""
        return dict(vars(self))


class FedAvgClient:
    """Answers with the weights, or the gradient, that backprop computes on its data.

    Args:
        module: any LightningModule.
        data: the client's samples.
        settings: the federation's settings.
        measure_memory: whether answers report by how much the memory of this process rose.
    """

    def __init__(
        self, module: pl.LightningModule, data: LocalData, settings: FedAvg, *, measure_memory: bool = False
    ) -> None:
        self.loss, self.data, self.settings = LocalLoss(module.train()), data, settings
        self.measure_memory = measure_memory

    def answer(self, instructions: Instructions) -> Reply:
        """Return the client's weights or gradient, computed from the server's weights."""
        assert instructions.weights is not None
        slots = {slot.name: slot.parameter for slot in self.loss.state.slots.trainable()}
        with torch.no_grad():
            for name, param in slots.items():
                param.copy_(instructions.weights[name])
        memory = PeakMemory(self.loss.module.device) if self.measure_memory else None
        if memory is not None:
            memory.start()
        seed, client = instructions.seed, instructions.client
        batches = self._batches(seed, client)
        with own_randomness(noise_seed(seed, client, 0), self.loss.module.device), self.loss.state.quiet():
            made = (
                self._trained(slots, batches) if self.settings.upload == "weights" else self._gradient(slots, batches)
            )
        peak, samples = None if memory is None else memory.peak(), sum(size for _, size in batches)
        return Reply(
            client,
            instructions.round,
            seed,
            num_samples=len(self.data) if self.settings.local_steps is None else samples,
            forward_passes=3.0 * len(batches),
            peak_mib=peak,
            weights=made,
        )

    def _batches(self, seed: int, client: int) -> list[tuple[Any, int]]:
        steps = self.settings.local_steps
        each = -(-len(self.data) // self.data.batch_size)
        batches: list[tuple[Any, int]] = []
        for epoch in range(1 if steps is None else -(-steps // each)):
            batches += self.data.batches(data_seed(seed, client, epoch), each)
        return batches if steps is None else batches[:steps]

    def _trained(self, slots: Mapping[str, torch.nn.Parameter], batches: Sequence[tuple[Any, int]]) -> Params:
        optimizer, _ = configured_optimizer(self.loss.module)
        for batch, _ in batches:
            optimizer.zero_grad()
            loss_of(self.loss.evaluate(*self.loss.args(batch))).backward()
            optimizer.step()
        optimizer.zero_grad()
        return {name: param.detach().clone() for name, param in slots.items()}

    def _gradient(self, slots: Mapping[str, torch.nn.Parameter], batches: Sequence[tuple[Any, int]]) -> Params:
        total = sum(size for _, size in batches)
        for batch, size in batches:
            (loss_of(self.loss.evaluate(*self.loss.args(batch))) * (size / total)).backward()
        made = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in slots.items()}
        self.loss.module.zero_grad()
        return made


class FedAvgServer(MovingAverage):
    """Runs the server's side of :class:`FedAvg`.

    Args:
        module: it holds the weights.
        settings: the federation's settings.
        seed: seed of the run.
        ema: decay of the moving average of the weights, in [0, 1); 0 for none.
        ema_every: updates between two steps of the average.
    """

    @checked
    def __init__(
        self,
        module: pl.LightningModule,
        settings: FedAvg,
        seed: NonNegativeInt = 0,
        *,
        ema: FractionBelowOne = 0.0,
        ema_every: PositiveInt = 1,
    ) -> None:
        super().__init__(module, seed, ema, ema_every)
        self.settings, self.steps = settings, OptimizerSteps(module)

    def begin(self, clients: Sequence[int]) -> dict[int, Instructions]:
        """Begin the next round, and return the instructions for each of its clients."""
        self.round += 1
        seed, weights = round_seed(self.seed, self.round), self.params
        return {client: Instructions(self.round, seed, client, "", weights=weights) for client in clients}

    def finish(self, replies: Sequence[Reply]) -> RoundReport:
        """Average the clients' results; non-finite results are left out."""
        fit, left_out, seed = [], {}, round_seed(self.seed, self.round)
        for reply in replies:
            made = reply.weights or {}
            wrong = "" if (reply.round, reply.seed) == (self.round, seed) else f"it answers round {reply.round}"
            if not wrong and not (made and all(bool(part.isfinite().all()) for part in made.values())):
                wrong = "its weights are not finite"
            if wrong:
                left_out[reply.client] = wrong
                rank_zero_warn(f"round {self.round}: client {reply.client} is left out: {wrong}.")
            else:
                fit.append(reply)
        moved = self._update(fit) if fit else 0.0
        return RoundReport(self.round, [reply.client for reply in fit], left_out, moved, bool(fit))

    def _update(self, replies: Sequence[Reply]) -> float:
        """Make the update, and return the norm of the gradient, or of the change that stands for it."""
        total = sum(reply.num_samples for reply in replies)
        mean: Params = {}
        for reply in replies:
            for name, part in (reply.weights or {}).items():
                own = part * (reply.num_samples / total)
                mean[name] = mean[name] + own if name in mean else own
        averages = self.settings.upload == "weights"
        before = self.params
        change = float(norm({name: before[name] - part for name, part in mean.items()} if averages else mean))
        with torch.no_grad():
            for name, param in self.trained.items():
                if averages:
                    param.copy_(mean[name])
                else:
                    param.grad = mean[name]
        if not averages:
            self.steps.step()
        self.follow()
        return change

    def state_dict(self) -> dict[str, Any]:
        """Return the state for an exact resume."""
        return {**super().state_dict(), "settings": self.settings.to_plain(), "update": self.steps.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.steps.load_state_dict(state["update"])
