"""A federation in one process: its clients one behind the other, deterministic, without Flower or Ray."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from lightning_bpfree.core.arguments import (
    Fraction,
    FractionBelowOne,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Seed32,
    check_arguments,
    checked,
)
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.federated.client import BaffleClient
from lightning_bpfree.federated.evaluation import Evaluation
from lightning_bpfree.federated.fedavg import FedAvg, FedAvgClient, FedAvgServer
from lightning_bpfree.federated.messages import Instructions, Reply
from lightning_bpfree.federated.partition import Partition
from lightning_bpfree.federated.privacy import PrivateClient, Privacy
from lightning_bpfree.federated.robust import Robust, RobustName
from lightning_bpfree.federated.secure_round import SecureRound, mask_reply
from lightning_bpfree.federated.server import BaffleServer, RoundReport
from lightning_bpfree.federated.settings import Baffle

Row = dict[str, Any]
_CLIENTS, _DROPOUTS = 0xC11E, 0xD209


class Federation:
    """Clients, how they are chosen, what goes wrong with them, and what is kept from whom.

    Args:
        method: :class:`Baffle`, or :class:`FedAvg` by backprop; None for ``Baffle()``.
        num_clients: clients that the training set is split over.
        alpha: None for an even random split, else how unequal clients are: see :func:`dirichlet_partition`.
        fraction: share of the clients in a round, in (0, 1].
        min_clients: a round has at least this many clients.
        dropout: probability that a client of a round does not answer.
        straggler: probability that an answer comes a round late, and is then of no use.
        seed: of rounds, directions, batches and the choice of clients.
        split_seed: of the split of the data.
        batch_size: of the clients; None for the data module's.
        ema: decay of the moving average of the weights that is evaluated; 0 for none.
        ema_every: updates between two steps of the average.
        downlink: ``"weights"`` or ``"numbers"``: see :class:`BaffleServer`.
        secure: sum the clients' numbers under masks; needs the extra ``federated``.
        step: rounding of secure sums.
        privacy: noise on the numbers, and the guarantee that it gives.
        robust: a name of :class:`Robust`, for clients that lie.
        largest_difference: an answer with a larger absolute number is left out.

    Raises:
        ValueError: for arguments out of range, or that do not go together.

    Examples:
        >>> Federation(Baffle(20), num_clients=4).num_clients
        4
    """

    @checked
    def __init__(
        self,
        method: Baffle | FedAvg | None = None,
        num_clients: PositiveInt = 10,
        alpha: PositiveFloat | None = None,
        fraction: PositiveFraction = 1.0,
        *,
        min_clients: PositiveInt = 1,
        dropout: FractionBelowOne = 0.0,
        straggler: FractionBelowOne = 0.0,
        seed: Seed32 = 0,
        split_seed: Seed32 = 0,
        batch_size: PositiveInt | None = None,
        ema: FractionBelowOne = 0.0,
        ema_every: PositiveInt = 1,
        downlink: Literal["weights", "numbers"] = "weights",
        secure: bool = False,
        step: PositiveFloat = 2.0**-32,
        privacy: Privacy | None = None,
        robust: RobustName | None = None,
        largest_difference: PositiveFloat = 100.0,
    ) -> None:
        self.method = Baffle() if method is None else method
        self.num_clients, self.alpha, self.fraction, self.min_clients = num_clients, alpha, fraction, min_clients
        self.dropout, self.straggler, self.seed, self.split_seed = dropout, straggler, seed, split_seed
        self.batch_size, self.ema, self.ema_every, self.downlink = batch_size, ema, ema_every, downlink
        self.secure, self.step, self.privacy, self.robust = secure, step, privacy, robust
        self.largest_difference = largest_difference
        self._check()

    def _check(self) -> None:
        if self.min_clients > self.num_clients:
            raise ValueError(
                f"Federation: min_clients={self.min_clients}: there are num_clients={self.num_clients}; give fewer."
            )
        plain = isinstance(self.method, FedAvg)
        needs = {"secure": self.secure, "privacy": self.privacy, "robust": self.robust}
        for name, given in {**needs, "downlink": self.downlink == "numbers"}.items():
            if given and (plain or self.method.noise == "per_client"):
                raise ValueError(
                    f"Federation: {name}={getattr(self, name)!r} needs numbers along directions that all clients share: "
                    "use method=Baffle(noise='shared')."
                )
        if self.secure and self.robust:
            raise ValueError(
                f"Federation: robust={self.robust!r} with secure=True: of a secure sum there are no terms to choose "
                "from; leave out one of them."
            )
        if self.secure and self.in_a_round < 2:
            raise ValueError("Federation: secure=True needs two clients in a round; give a larger fraction.")

    @property
    def in_a_round(self) -> int:
        """How many clients a round has."""
        return max(1, self.min_clients, round(self.fraction * self.num_clients))

    def chosen(self, number: int) -> list[int]:
        """Return the clients of a round, in ascending order."""
        if self.in_a_round == self.num_clients:
            return list(range(self.num_clients))
        generator = torch.Generator().manual_seed(mix(self.seed, _CLIENTS, number))
        return sorted(torch.randperm(self.num_clients, generator=generator)[: self.in_a_round].tolist())

    def fates(self, number: int, clients: Sequence[int]) -> dict[int, str]:
        """Return what becomes of each client's answer in a simulation: ``""``, ``"lost"`` or ``"late"``."""
        generator = torch.Generator().manual_seed(mix(self.seed, _DROPOUTS, number))
        chance = torch.rand(self.num_clients, 2, generator=generator).tolist()
        lost = {c: "lost" if chance[c][0] < self.dropout else "" for c in clients}
        return {c: fate or ("late" if chance[c][1] < self.straggler else "") for c, fate in lost.items()}

    def partition(self, datamodule: pl.LightningDataModule) -> Partition:
        """Return the training set of a data module, split over the clients."""
        return Partition(datamodule, self.num_clients, self.alpha, self.split_seed, batch_size=self.batch_size)

    def server(self, module: pl.LightningModule) -> BaffleServer | FedAvgServer:
        """Return the server that holds ``module``."""
        shared: dict[str, Any] = {"ema": self.ema, "ema_every": self.ema_every}
        if isinstance(self.method, FedAvg):
            return FedAvgServer(module, self.method, self.seed, **shared)
        return BaffleServer(
            module,
            self.method,
            self.seed,
            downlink=self.downlink,
            largest_difference=self.largest_difference,
            combine=Robust(self.robust) if self.robust else None,
            **shared,
        )

    def client(
        self, module: pl.LightningModule, partition: Partition, number: int, *, noise: float = 0.0, memory: bool = False
    ) -> BaffleClient | FedAvgClient:
        """Return client ``number``, which computes with ``module``.

        Args:
            module: it may be shared by clients that answer one behind the other and are sent weights.
            partition: of the training set.
            number: from 0.
            noise: what all clients of a round add for privacy, in units of ``clip``.
            memory: whether answers say how far the memory of this process rose.
        """
        data = partition.client(number)
        if isinstance(self.method, FedAvg):
            return FedAvgClient(module, data, self.method, measure_memory=memory)
        if self.privacy is None:
            return BaffleClient(module, data, self.method, measure_memory=memory)
        share = noise / self.in_a_round**0.5
        return PrivateClient(module, data, self.method, privacy=self.privacy, share=share, measure_memory=memory)

    def to_plain(self) -> dict[str, Any]:
        """Return the settings as numbers, strings and dicts of them."""
        plain = dict(vars(self))
        plain["method"] = {"name": type(self.method).__name__, **self.method.to_plain()}
        plain["privacy"] = None if self.privacy is None else self.privacy.to_plain()
        return plain


class InProcessFederation:
    """Runs a federation in this process: the same numbers in every run, and behind every resume.

    Args:
        module: any LightningModule; it holds the server's weights.
        datamodule: its training set is split over the clients, its validation set is the server's.
        federation: what to run.
        rounds: how many rounds the whole run has, at least 1.
        evaluate_every: rounds between two evaluations, and one behind the last round; 0 for none.
        measure_memory: whether rows say how far the memory of this process rose while clients answered.

    Raises:
        ValueError: for a module or data that cannot be used; before the first round.

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
        self.module, self.federation, self.rounds = module, federation, rounds
        self.server, partition = federation.server(module), federation.partition(datamodule)
        privacy = federation.privacy
        self.noise = 0.0 if privacy is None else privacy.multiplier(rounds)
        numbers = range(federation.num_clients)
        # Clients that are sent weights keep nothing, and can compute with the same copy of the module.
        shared = copy.deepcopy(module)
        copies = [copy.deepcopy(module) if federation.downlink == "numbers" else shared for _ in numbers]
        self.clients = [
            federation.client(own, partition, i, noise=self.noise, memory=measure_memory)
            for i, own in zip(numbers, copies, strict=True)
        ]
        self.secure = SecureRound(federation.method, federation.step) if self._is_secure else None
        self.evaluation = Evaluation(module, datamodule) if evaluate_every else None
        self.evaluate_every, self.history, self._late = evaluate_every, [], []  # type: ignore[var-annotated]
        self._multipliers: list[float] = []

    @property
    def _is_secure(self) -> bool:
        return self.federation.secure and isinstance(self.federation.method, Baffle)

    def fit(self, each: Callable[[Row], None] | None = None) -> list[Row]:
        """Run the rounds that are left, and return a row of numbers for each of all rounds.

        Args:
            each: called with the row of every round, such as to log it or to save a checkpoint.
        """
        while self.server.round < self.rounds:
            row = self.run_round()
            if each is not None:
                each(row)
        return self.history

    def run_round(self) -> Row:
        """Run one round, and return what there is to say of it."""
        started = time.perf_counter()
        number = self.server.round + 1
        clients = self.federation.chosen(number)
        told = self.server.begin(clients)
        fates = self.federation.fates(number, clients)
        answers = {c: self._answered(told[c], told) for c in clients if fates[c] != "lost"}
        in_time = [answers[c] for c in clients if fates[c] == ""]
        report = self._finished([*self._late, *in_time], told)
        self._late = [answers[c] for c in clients if fates[c] == "late"]
        row = self._row(report, told, list(answers.values()), time.perf_counter() - started)
        self.history.append(row)
        return row

    def _answered(self, instructions: Instructions, told: Mapping[int, Instructions]) -> Reply:
        client = self.clients[instructions.client]
        reply = client.answer(instructions)
        if self.secure is None or reply.refused:
            return reply
        return mask_reply(reply, self.secure.masks(list(told))[instructions.client], self.secure)

    def _finished(self, replies: Sequence[Reply], told: Mapping[int, Instructions]) -> RoundReport:
        server = self.server
        if self.secure is None or not isinstance(server, BaffleServer):
            return server.finish(replies)
        return self.secure.finish(server, replies, list(told))

    def _row(
        self, report: RoundReport, told: Mapping[int, Instructions], replies: Sequence[Reply], seconds: float
    ) -> Row:
        before = self.history[-1] if self.history else {}
        peaks = [reply.peak_mib for reply in replies if reply.peak_mib is not None]
        row: Row = {
            "round": report.round,
            "clients": len(report.used),
            "left_out": len(told) - len(report.used),
            "grad_norm": report.grad_norm,
            "bytes_up": max((reply.num_bytes for reply in replies), default=0),
            "bytes_down": max(instructions.num_bytes for instructions in told.values()),
            "forward_passes": before.get("forward_passes", 0.0) + sum(reply.forward_passes for reply in replies),
            "client_peak_mib": max(peaks) if peaks else None,
            "seconds": seconds,
        }
        privacy = self.federation.privacy
        if privacy is not None:
            # A client adds its share of the noise; where clients are missing, so is theirs.
            self._multipliers.append(self.noise * (len(report.used) / self.federation.in_a_round) ** 0.5)
            if report.used:
                row["epsilon"] = privacy.spent([m for m in self._multipliers if m])
        if self.evaluation is not None and (report.round % self.evaluate_every == 0 or report.round == self.rounds):
            row.update(self.evaluation("validate", self.server.evaluated()))
        return row

    def test(self) -> dict[str, float]:
        """Return the metrics of the module's test step, with the average of the weights where there is one."""
        if self.evaluation is None:
            raise ValueError("InProcessFederation: evaluate_every=0: give 1 or more, to evaluate at all.")
        return self.evaluation("test", self.server.evaluated())

    # --- checkpoints ---

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all: tensors, numbers and strings alone."""
        state = {
            "server": self.server.state_dict(),
            "federation": self.federation.to_plain(),
            "rounds": self.rounds,
            "history": self.history,
            "multipliers": self._multipliers,
            "late": [vars(reply) for reply in self._late],
        }
        temporary = path.with_name(f"{path.name}.tmp")
        torch.save(state, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Go on where a checkpoint was written; nothing but tensors, numbers and strings is read.

        Raises:
            ValueError: if the checkpoint is of other settings, or more rounds.
        """
        state = torch.load(path, weights_only=True)
        was, now = state["federation"], self.federation.to_plain()
        different = sorted(key for key in now if was.get(key) != now[key])
        if self.federation.privacy is not None and state["rounds"] != self.rounds:
            different.append("rounds")
        if different:
            raise ValueError(
                f"resume={path}: it was made with other settings of {', '.join(different)}: resume with those, or "
                "start anew in another folder."
            )
        self.server.load_state_dict(state["server"])
        self.history, self._multipliers = list(state["history"]), list(state["multipliers"])
        self._late = [Reply(**reply) for reply in state["late"]]
