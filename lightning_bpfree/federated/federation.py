"""The settings of a federation: clients, their selection, simulated failures, and privacy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from lightning_bpfree.core.arguments import (
    FractionBelowOne,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Seed32,
    checked,
)
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.federated.client import BaffleClient
from lightning_bpfree.federated.fedavg import FedAvg, FedAvgClient, FedAvgServer
from lightning_bpfree.federated.partition import Partition
from lightning_bpfree.federated.privacy import Privacy, PrivateClient
from lightning_bpfree.federated.robust import Robust, RobustName
from lightning_bpfree.federated.server import BaffleServer
from lightning_bpfree.federated.settings import Baffle

_CLIENTS, _DROPOUTS = 0xC11E, 0xD209


class Federation:
    """The clients of a federation, their selection, simulated failures, and privacy.

    Args:
        method: :class:`Baffle`, or :class:`FedAvg` by backprop; None for ``Baffle()``.
        num_clients: number of clients over which the training set is split.
        alpha: None for an even random split, else the inequality of clients: see :func:`dirichlet_partition`.
        fraction: share of the clients in a round, in (0, 1].
        min_clients: minimum number of clients in a round.
        dropout: probability that a client of a round does not answer.
        straggler: probability that an answer arrives one round late, and is then discarded.
        seed: seed of rounds, directions, batches and the choice of clients.
        split_seed: seed of the split of the data.
        batch_size: batch size of the clients; None for the data module's.
        ema: decay of the moving average of the weights that is evaluated; 0 for none.
        ema_every: updates between two steps of the average.
        downlink: ``"weights"`` or ``"numbers"``: see :class:`BaffleServer`.
        secure: sum the clients' numbers under masks; needs the extra ``federated``.
        step: rounding of secure sums.
        privacy: noise on the numbers, and the resulting guarantee.
        robust: a name of :class:`Robust`, for protection against malicious clients.
        largest_difference: an answer with a larger absolute number is left out.

    Raises:
        ValueError: for arguments out of range, or incompatible arguments.

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
                    f"Federation: {name}={getattr(self, name)!r} needs numbers along directions that clients share: "
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
        """The number of clients in a round."""
        return max(1, self.min_clients, round(self.fraction * self.num_clients))

    def chosen(self, number: int) -> list[int]:
        """Return the clients of a round, in ascending order."""
        if self.in_a_round == self.num_clients:
            return list(range(self.num_clients))
        generator = torch.Generator().manual_seed(mix(self.seed, _CLIENTS, number))
        return sorted(torch.randperm(self.num_clients, generator=generator)[: self.in_a_round].tolist())

    def fates(self, number: int, clients: Sequence[int]) -> dict[int, str]:
        """Return the simulated fate of each client's answer: ``""``, ``"lost"`` or ``"late"``."""
        generator = torch.Generator().manual_seed(mix(self.seed, _DROPOUTS, number))
        chance = torch.rand(self.num_clients, 2, generator=generator, dtype=torch.float32).tolist()
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
            module: clients may share it if they answer one after another and receive weights.
            partition: the partition of the training set.
            number: from 0.
            noise: the noise that all clients of a round add together for privacy, in units of ``clip``.
            memory: whether answers report by how much the memory of this process rose.
        """
        data = partition.client(number)
        if isinstance(self.method, FedAvg):
            return FedAvgClient(module, data, self.method, measure_memory=memory)
        if self.privacy is None:
            return BaffleClient(module, data, self.method, number, measure_memory=memory)
        share = noise / self.in_a_round**0.5
        return PrivateClient(
            module, data, self.method, number, privacy=self.privacy, share=share, measure_memory=memory
        )

    def to_plain(self) -> dict[str, Any]:
        """Return the settings as numbers, strings and dicts of them."""
        plain = dict(vars(self))
        plain["method"] = {"name": type(self.method).__name__, **self.method.to_plain()}
        plain["privacy"] = None if self.privacy is None else self.privacy.to_plain()
        return plain
