"""The server's side of BAFFLE as a Flower strategy."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_bpfree.core.seeds import mix
from lightning_bpfree.federated.flower.client_app import NO_KEY
from lightning_bpfree.federated.flower.records import ROUND, array_record, reply_of, to_record
from lightning_bpfree.federated.messages import Instructions, Reply
from lightning_bpfree.federated.run import Row, Run
from lightning_bpfree.federated.secure_round import concluded, judged
from lightning_bpfree.federated.secure_sum import FixedPoint
from lightning_bpfree.federated.server import BaffleServer, RoundReport
from lightning_bpfree.federated.settings import Baffle

_ROUND_OFF = 3  # rounds for which a node that has not answered is left alone
_POLL = 0.2  # seconds


class BaffleStrategy(Strategy):
    """Runs a federation over Flower's grid, with seeds and loss differences instead of weights and updates.

    Nodes are numbered in the order in which they first appear. A node that does not answer in time is skipped for three
    rounds. ``start`` of the base class runs the rounds; :func:`server_app` first resumes from a checkpoint.

    Args:
        run: server, federation, evaluation and history.
        each: called with the row of every round.
        timeout: seconds for a request within a round (keys and masks of secure sums), > 0.
        wait: seconds to wait for the nodes of the first round; after that, ``min_clients`` nodes are enough.

    Raises:
        RuntimeError: from the first round, if too few nodes connect in time.
    """

    def __init__(
        self,
        run: Run,
        each: Callable[[Row], None] | None = None,
        *,
        timeout: float = 60.0,
        wait: float = 120.0,
    ) -> None:
        self.run, self.each, self.timeout, self.wait = run, each, timeout, wait
        self.numbers: dict[int, int] = {}  # node -> client
        self._off: dict[int, int] = {}  # node -> the round from which it is asked again
        self._grid: Grid | None = None
        self._told: dict[int, Instructions] = {}
        self._keys: dict[int, bytes] = {}
        self._session = os.urandom(8).hex()
        self._started = 0.0

    @property
    def server(self) -> Any:
        """The server of the federation."""
        return self.run.server

    def summary(self) -> None:
        """Log a summary of the run."""
        federation = self.run.federation
        rank_zero_info(
            f"{type(federation.method).__name__}: {federation.in_a_round} of {federation.num_clients} clients"
        )

    # --- a round ---

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the instructions of the next round: seeds, and weights for clients that are not synchronized."""
        self._grid, self._started = grid, time.perf_counter()
        nodes = self._chosen(grid)
        keys = self._exchanged(grid, nodes) if self.run.federation.secure else None
        if keys is not None:
            nodes = {node: client for node, client in nodes.items() if client in keys}
        self._told = self.server.begin(sorted(nodes.values()))
        return [
            Message(to_record(self._told[client], keys), node, MessageType.TRAIN, group_id=str(self.server.round))
            for node, client in nodes.items()
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate the answers and apply the update of the round; return the weights and a row of numbers."""
        answers = self._read(list(replies))
        report = self._finished(answers)
        row = self.run.record(report, list(self._told.values()), answers, time.perf_counter() - self._started)
        if self.each is not None:
            self.each(row)
        numbers: Any = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
        return array_record(self.server.params), MetricRecord(numbers)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return nothing: the server evaluates on its own data."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing."""
        return None

    # --- nodes ---

    def _chosen(self, grid: Grid) -> dict[int, int]:
        """Return the nodes of the coming round with their numbers."""
        federation, number = self.run.federation, self.server.round + 1
        wanted = federation.num_clients if not self.numbers else federation.min_clients
        deadline = time.monotonic() + self.wait
        while len(nodes := self._available(grid, number)) < wanted:
            if time.monotonic() > deadline:
                if len(nodes) >= max(federation.min_clients, 2 if federation.secure else 1):
                    break
                raise RuntimeError(
                    f"wait={self.wait:g}: {len(nodes)} nodes are there, and min_clients={federation.min_clients} are "
                    "needed: start more SuperNodes, or wait longer."
                )
            time.sleep(_POLL)
        for node in sorted(nodes):
            self.numbers.setdefault(node, len(self.numbers))
        ordered = sorted(nodes, key=self.numbers.__getitem__)
        if [self.numbers[node] for node in ordered] == list(range(federation.num_clients)):
            return {ordered[client]: client for client in federation.chosen(number)}  # as in one process
        order = torch.randperm(len(ordered), generator=torch.Generator().manual_seed(mix(self.server.seed, number)))
        return {ordered[i]: self.numbers[ordered[i]] for i in sorted(order[: federation.in_a_round].tolist())}

    def _available(self, grid: Grid, number: int) -> list[int]:
        """Return the nodes to choose from: those that are left alone too, where the others are not enough."""
        nodes = list(grid.get_node_ids())
        answering = [node for node in nodes if self._off.get(node, 0) <= number]
        return answering if len(answering) >= max(1, self.run.federation.min_clients) else nodes

    def _read(self, replies: Sequence[Message]) -> list[Reply]:
        """Return the answers of the round's clients; note who has not answered."""
        settings = self.run.federation.method
        expected = settings.num_directions if isinstance(settings, Baffle) else None
        read, clients = [], dict(self.numbers)
        for message in replies:
            client = clients.get(message.metadata.src_node_id, -1)
            if message.has_error():
                reason = f"its app failed: {message.error.reason}"
                read.append(Reply(client, self.server.round, 0, refused=reason))
            else:
                read.append(reply_of(message.content, client, expected))
        answered = {message.metadata.src_node_id for message in replies}
        for node, client in self.numbers.items():
            if client in self._told and node not in answered:
                self._off[node] = self.server.round + 1 + _ROUND_OFF
                rank_zero_warn(f"round {self.server.round}: client {client} has not answered in time.")
        return read

    # --- secure sums ---

    def _asked(self, grid: Grid, nodes: Mapping[int, int], **asked: Any) -> dict[int, dict[str, Any]]:
        """Ask nodes a question, and return what they say by client."""
        messages = []
        for node, client in nodes.items():
            record = RecordDict({ROUND: ConfigRecord({"client": client, "session": self._session, **asked})})
            messages.append(Message(record, node, MessageType.QUERY))
        found: dict[int, dict[str, Any]] = {}
        for message in grid.send_and_receive(messages, timeout=self.timeout):
            client = nodes.get(message.metadata.src_node_id, -1)
            if message.has_error() or client < 0 or ROUND not in message.content:
                continue
            said: dict[str, Any] = dict(message.content[ROUND])
            if "refused" in said:
                rank_zero_warn(f"round {self.server.round}: client {client} refuses: {said['refused']}.")
            else:
                found[client] = said
        return found

    def _exchanged(self, grid: Grid, nodes: Mapping[int, int]) -> dict[int, bytes]:
        """Return the public keys of the coming round's clients; those that give none are left alone for a while."""
        new = {node: client for node, client in nodes.items() if client not in self._keys}
        if new:
            for client, said in self._asked(grid, new, what="key").items():
                if isinstance(said.get("public"), bytes) and said.get("session") == self._session:
                    self._keys[client] = said["public"]
        for node, client in new.items():
            if client not in self._keys:
                self._off[node] = self.server.round + 1 + _ROUND_OFF
        return {client: self._keys[client] for client in sorted(nodes.values()) if client in self._keys}

    def _finished(self, replies: Sequence[Reply]) -> RoundReport:
        server, federation = self.server, self.run.federation
        if not federation.secure or not isinstance(server, BaffleServer):
            report: RoundReport = server.finish(replies)
            return report
        assert self._grid is not None
        fit, left_out = judged(server, replies)
        nodes = {node: client for node, client in self.numbers.items() if client in fit}
        said = self._asked(self._grid, nodes, what="masks", round=server.round, survivors=sorted(fit)) if nodes else {}
        told = {c: dict(zip(own.get("clients", []), own.get("seeds", []), strict=False)) for c, own in said.items()}
        for reply in replies:
            if reply.refused == NO_KEY:
                self._keys.pop(reply.client, None)
        clients = sorted(self._told)
        return concluded(server, fit, told, clients, FixedPoint(federation.step, max(1, len(clients))), left_out)
