"""A federation in one process: clients run one after another, deterministically, without Flower or Ray."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_bpfree.core.arguments import NonNegativeInt, PositiveInt, check_arguments
from lightning_bpfree.federated.federation import Federation
from lightning_bpfree.federated.messages import Instructions, Reply
from lightning_bpfree.federated.run import Row, Run
from lightning_bpfree.federated.secure_round import SecureRound, mask_reply
from lightning_bpfree.federated.server import BaffleServer, RoundReport
from lightning_bpfree.federated.settings import Baffle


class InProcessFederation(Run):
    """Runs a federation in this process: the same numbers in every run, and after every resume.

    Args:
        module: any LightningModule; it holds the server's weights.
        datamodule: its training set is split over the clients; the server evaluates on its validation set.
        federation: the settings.
        rounds: number of rounds of the whole run, at least 1.
        evaluate_every: rounds between two evaluations, with one more after the last round; 0 for none.
        measure_memory: whether rows report by how much the memory of this process rose while clients answered.

    Raises:
        ValueError: before the first round, for a module or data that cannot be used.

    Examples:
        >>> from lightning_bpfree.demos.data import DigitsDataModule
        >>> from lightning_bpfree.demos.modules import MLP, Classifier
        >>> federation = Federation(Baffle(num_directions=2, batches=1), num_clients=2)
        >>> run = InProcessFederation(Classifier(MLP(64, [8], 10)), DigitsDataModule(), federation, 1, evaluate_every=0)
        >>> [(row["round"], row["clients"]) for row in run.fit()]
        [(1, 2)]
    """

    def __init__(
        self,
        module: pl.LightningModule,
        datamodule: pl.LightningDataModule,
        federation: Federation,
        rounds: PositiveInt = 100,
        *,
        evaluate_every: NonNegativeInt = 1,
        measure_memory: bool = False,
    ) -> None:
        check_arguments(InProcessFederation, locals())
        super().__init__(module, datamodule, federation, rounds, evaluate_every=evaluate_every)
        partition, numbers = federation.partition(datamodule), range(federation.num_clients)
        # Clients that are sent weights keep nothing, and can compute with the same copy of the module.
        shared = copy.deepcopy(module)
        copies = [copy.deepcopy(module) if federation.downlink == "numbers" else shared for _ in numbers]
        self.clients = [
            federation.client(own, partition, i, noise=self.noise, memory=measure_memory)
            for i, own in zip(numbers, copies, strict=True)
        ]
        self.secure: SecureRound | None = None
        if federation.secure and isinstance(federation.method, Baffle):
            self.secure = SecureRound(federation.method, federation.step)
        self._late: list[Reply] = []

    def fit(self, each: Callable[[Row], None] | None = None) -> list[Row]:
        """Run the remaining rounds, and return a row of numbers for every round, including earlier ones.

        Args:
            each: called with the row of every round, for example to log it or to save a checkpoint.
        """
        while self.server.round < self.rounds:
            row = self.run_round()
            if each is not None:
                each(row)
        return self.history

    def run_round(self) -> Row:
        """Run one round, and return its row."""
        started = time.perf_counter()
        number = self.server.round + 1
        clients = self.federation.chosen(number)
        told = self.server.begin(clients)
        fates = self.federation.fates(number, clients)
        answers = {c: self._answered(told[c], told) for c in clients if fates[c] != "lost"}
        report = self._finished([*self._late, *(answers[c] for c in clients if fates[c] == "")], told)
        self._late = [answers[c] for c in clients if fates[c] == "late"]
        return self.record(report, list(told.values()), list(answers.values()), time.perf_counter() - started)

    def _answered(self, instructions: Instructions, told: Mapping[int, Instructions]) -> Reply:
        reply = self.clients[instructions.client].answer(instructions)
        if self.secure is None or reply.refused:
            return reply
        return mask_reply(reply, self.secure.masks(list(told))[instructions.client], self.secure)

    def _finished(self, replies: Sequence[Reply], told: Mapping[int, Instructions]) -> RoundReport:
        server = self.server
        if self.secure is None or not isinstance(server, BaffleServer):
            return server.finish(replies)
        return self.secure.finish(server, replies, list(told))

    def state_dict(self) -> dict[str, Any]:
        """Return the state for an exact resume, including late answers."""
        return {**super().state_dict(), "late": [vars(reply) for reply in self._late]}

    def load_state_dict(self, state: dict[str, Any], name: str = "a state") -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state, name)
        self._late = [Reply(**reply) for reply in state.get("late", [])]
