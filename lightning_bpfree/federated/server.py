"""The server of a BAFFLE federation: weights, optimizer, moving average, and which clients are synchronized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_bpfree.core.arguments import FractionBelowOne, NonNegativeInt, PositiveFloat, PositiveInt, checked
from lightning_bpfree.core.params import ParameterSlots, Params
from lightning_bpfree.federated.messages import Instructions, Reply, Update, fault, stacked
from lightning_bpfree.federated.normalization import check_no_batch_norm
from lightning_bpfree.federated.settings import Baffle, round_seed, weights_digest
from lightning_bpfree.federated.update import Numbers, ServerUpdate


class Combine(Protocol):
    """Aggregates the clients' vectors of numbers into one."""

    def __call__(self, numbers: Tensor, weights: Tensor) -> Tensor:
        """Return shape ``(local_steps, K)`` for ``(clients, local_steps, K)`` and ``(clients,)``."""


def weighted_mean(numbers: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of the clients' numbers, weighted by their numbers of samples.

    Args:
        numbers: shape ``(clients, local_steps, K)``.
        weights: numbers of samples, shape ``(clients,)``.
    """
    mean: Tensor = torch.tensordot(weights / weights.sum(), numbers, 1)
    return mean


class RoundReport(NamedTuple):
    """The outcome of a round.

    Args:
        round: its number.
        used: clients whose numbers were used.
        left_out: clients whose answers were not used, with the reasons.
        grad_norm: norm of the estimate after clipping; 0 for a lost round.
        updated: whether the weights changed.
    """

    round: int
    used: list[int]
    left_out: dict[int, str]
    grad_norm: float
    updated: bool


class MovingAverage:
    """The weights of a server, their moving average, and the count of rounds.

    Args:
        module: it holds the weights.
        seed: seed of the run.
        ema: decay of the average, in [0, 1); 0 for none.
        ema_every: updates between two steps of the average.
    """

    def __init__(self, module: pl.LightningModule, seed: int, ema: float, ema_every: int) -> None:
        self.module, self.seed, self.ema, self.ema_every = module, seed, ema, ema_every
        self.round = self.updates = 0
        self.average: Params = {name: param.clone() for name, param in self.params.items()} if ema else {}

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by name."""
        return {slot.name: slot.parameter for slot in ParameterSlots(self.module).trainable()}

    @property
    def params(self) -> Params:
        """The trained parameters, detached, by name."""
        return {name: param.detach() for name, param in self.trained.items()}

    def evaluated(self) -> Params:
        """Return the parameters to evaluate: the average if there is one, else the weights."""
        return self.average or self.params

    def follow(self) -> None:
        """Count an update, and update the average of the weights."""
        self.updates += 1
        if not self.ema or self.updates % self.ema_every:
            return
        num = self.updates // self.ema_every
        keep = min(self.ema, (1 + num) / (10 + num))
        for name, param in self.params.items():
            self.average[name].lerp_(param, 1 - keep)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for an exact resume: tensors, numbers and strings alone."""
        return {
            "round": self.round,
            "updates": self.updates,
            "seed": self.seed,
            "params": {name: param.clone() for name, param in self.params.items()},
            "average": {name: param.clone() for name, param in self.average.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.round, self.updates = int(state["round"]), int(state["updates"])
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(state["params"][name])
            for name, own in self.average.items():
                own.copy_(state["average"][name])


class BaffleServer(MovingAverage):
    """Runs the rounds: sends seeds, validates answers, computes the estimate, and steps the module's own optimizer.

    Args:
        module: any LightningModule without BatchNorm, with one optimizer; it holds the weights.
        settings: the federation's settings, equal to the clients'.
        seed: seed of the run; round ``t`` has the seed ``mix(seed, t)``.
        ema: decay of the moving average of the weights, in [0, 1); 0 for none. It starts with the first update, and is
            at most ``(1 + n) / (10 + n)`` after ``n`` updates.
        ema_every: updates between two steps of the average, at least 1.
        downlink: ``"weights"``, or ``"numbers"``: synchronized clients get the seed and numbers of the last round
            instead.
        largest_difference: an answer with a larger absolute number is left out.
        combine: aggregates the clients' vectors; None takes the mean weighted by numbers of samples.

    Raises:
        ValueError: for arguments out of range, or a module that cannot be trained in this way.
    """

    @checked
    def __init__(
        self,
        module: pl.LightningModule,
        settings: Baffle,
        seed: NonNegativeInt = 0,
        *,
        ema: FractionBelowOne = 0.0,
        ema_every: PositiveInt = 1,
        downlink: Literal["weights", "numbers"] = "weights",
        largest_difference: PositiveFloat = 100.0,
        combine: Combine | None = None,
    ) -> None:
        check_no_batch_norm(module)
        super().__init__(module, seed, ema, ema_every)
        self.settings, self.downlink = settings, downlink
        self.largest_difference, self.combine = largest_difference, combine
        self._check_settings()
        self.update = ServerUpdate(module, settings)
        settings.check(self.params)
        trained = self.params
        frozen = {s.name: s.parameter.detach() for s in ParameterSlots(module) if s.name not in trained}
        self.fingerprint = settings.fingerprint(trained, frozen)
        self.history: list[Update] = []  # rounds since the one behind `first`, for clients in step
        self._first = 0
        self._in_step: dict[int, int] = {}  # client -> the round behind which it is

    def _check_settings(self) -> None:
        if self.settings.noise == "per_client":
            for name, given in (("downlink", self.downlink == "numbers"), ("combine", self.combine is not None)):
                if given:
                    raise ValueError(
                        f"BaffleServer: {name}={getattr(self, name)!r} needs the same directions on all clients: "
                        "use Baffle(noise='shared')."
                    )

    def begin(self, clients: Sequence[int]) -> dict[int, Instructions]:
        """Begin the next round, and return the instructions for each of its clients."""
        self.round += 1
        seed, params = round_seed(self.seed, self.round), self.params
        digest = weights_digest(params) if self.downlink == "numbers" else ""
        told = {}
        for client in clients:
            behind = self._in_step.get(client)
            shared: dict[str, Any] = {"fingerprint": self.fingerprint, "digest": digest}
            if self.downlink == "weights" or behind is None or behind < self._first:
                if self.downlink == "numbers":
                    shared |= {"optimizer": self.update.tensors(), "made": self.updates}
                told[client] = Instructions(self.round, seed, client, weights=params, **shared)
            else:
                updates = self.history[behind - self._first :]
                told[client] = Instructions(self.round, seed, client, updates=updates, base=behind, **shared)
        return told

    def finish(self, replies: Sequence[Reply]) -> RoundReport:
        """Validate the answers, and apply the update of the round; without a valid answer, the weights stay."""
        seed = round_seed(self.seed, self.round)
        left_out: dict[int, str] = {}
        fit: list[Reply] = []
        for reply in replies:
            wrong = fault(reply, self.settings, self.round, seed, self.largest_difference)
            if wrong is None and reply.client in [other.client for other in fit]:
                wrong = "it has answered already"
            if wrong is None:
                fit.append(reply)
            else:
                left_out[reply.client] = wrong
                self._in_step.pop(reply.client, None)
                rank_zero_warn(f"round {self.round}: client {reply.client} is left out: {wrong}.")
        return self.conclude(self.numbers(fit), [reply.client for reply in fit], left_out)

    def numbers(self, replies: Sequence[Reply]) -> Numbers:
        """Return the numbers that determine the update."""
        if not replies:
            return {}
        numbers, weights = stacked(replies)
        if self.settings.noise == "per_client":
            shares = (weights / weights.sum()).tolist()
            return {reply.client: (share, own) for reply, share, own in zip(replies, shares, numbers, strict=True)}
        return {None: (1.0, (self.combine or weighted_mean)(numbers, weights))}

    def conclude(self, numbers: Numbers, used: list[int], left_out: dict[int, str]) -> RoundReport:
        """Apply the update of the round from its numbers, which may come from a secure sum; without any, no update."""
        seed = round_seed(self.seed, self.round)
        if numbers:
            self.update.apply(seed, numbers)
            self.follow()
        if self.downlink == "numbers":
            self._remember(seed, numbers, used)
        return RoundReport(self.round, used, left_out, self.update.grad_norm if numbers else 0.0, bool(numbers))

    def _remember(self, seed: int, numbers: Numbers, used: Sequence[int]) -> None:
        """Keep what clients in step need; those that answered have the weights of before this round."""
        if not numbers:  # nobody moves: whoever was in step still is, but the count of rounds goes on
            self.history.append(Update(seed, torch.zeros(0, self.settings.num_directions)))
        else:
            self.history.append(Update(seed, numbers[None][1]))
        for client in used:
            self._in_step[client] = self.round - 1
        weights = sum(param.nbytes for param in self.params.values())
        cheaper = weights // (8 * (1 + self.settings.numbers)) + 1  # rounds that are shorter to send than the weights
        self._in_step = {c: behind for c, behind in self._in_step.items() if self.round - behind <= cheaper}
        oldest = min(self._in_step.values(), default=self.round)
        self.history = self.history[oldest - self._first :]
        self._first = oldest

    def forget(self, client: int) -> None:
        """Send this client weights in its next round, since it has lost its state."""
        self._in_step.pop(client, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for an exact resume: tensors, numbers and strings alone."""
        own = {"settings": self.settings.to_plain(), "fingerprint": self.fingerprint}
        return {**super().state_dict(), **own, "update": self.update.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; clients get weights at their next round.

        Raises:
            ValueError: if the state belongs to another module or other settings.
        """
        if state["fingerprint"] != self.fingerprint or state["seed"] != self.seed:
            raise ValueError(
                f"resume: the checkpoint is of the fingerprint {state['fingerprint']} and seed {state['seed']}, and "
                f"this federation of {self.fingerprint} and {self.seed}: resume with the configuration it was made by."
            )
        super().load_state_dict(state)
        self.update.load_state_dict(state["update"])
        self.history, self._first, self._in_step = [], self.round, {}
