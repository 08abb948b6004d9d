"""Aggregation that is robust to a few malicious clients, by Flower's own strategies."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import NonNegativeInt, OpenFraction, checked

RobustName = Literal["median", "trimmed_mean", "krum"]


class Robust:
    """Aggregates the clients' vectors of loss differences into one, by a Flower strategy.

    All clients have equal weight, regardless of their numbers of samples. Shared directions and plain numbers are
    required: a secure sum does not reveal the single terms.

    Args:
        name: ``"median"`` or ``"trimmed_mean"`` of each number separately, or ``"krum"``: the vector of the client
            that is nearest to the others.
        trimmed: share of clients that ``"trimmed_mean"`` leaves out at each end, in (0, 0.5).
        liars: number of malicious clients that ``"krum"`` expects.

    Raises:
        ValueError: for arguments out of range.
        ModuleNotFoundError: if Flower is not installed.

    Examples:
        >>> Robust("median").name
        'median'
    """

    @checked
    def __init__(self, name: RobustName, trimmed: OpenFraction = 0.2, liars: NonNegativeInt = 1) -> None:
        if trimmed >= 0.5:
            raise ValueError(f"Robust: trimmed={trimmed}: nothing would be left; give a number in (0, 0.5).")
        self.name, self.trimmed, self.liars = name, trimmed, liars
        self._strategy = _strategy(name, trimmed, liars)

    def __call__(self, numbers: Tensor, weights: Tensor) -> Tensor:
        """Return shape ``(local_steps, K)`` for the clients' ``(clients, local_steps, K)``."""
        from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

        answers = []
        for i, own in enumerate(numbers):
            arrays = ArrayRecord({"differences": Array(own.numpy())})
            counts = MetricRecord({"num-examples": 1.0})
            answers.append(_Answer(RecordDict({"arrays": arrays, "metrics": counts}), i))
        made, _ = self._strategy.aggregate_train(1, answers)
        return torch.from_numpy(made["differences"].numpy().copy())


class _Answer:
    """What Flower's strategies look at in a message: made here, since real ones belong to a run."""

    def __init__(self, content: Any, node: int) -> None:
        self.content, self.metadata = content, _Metadata(node)

    def has_error(self) -> bool:
        return False

    def has_content(self) -> bool:
        return True


class _Metadata:
    def __init__(self, node: int) -> None:
        self.src_node_id = node


def _strategy(name: RobustName, trimmed: float, liars: int) -> Any:
    try:
        from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'Robust({name!r}) needs Flower: pip install "lightning-bpfree[federated]"'
        ) from error
    if name == "median":
        return FedMedian()
    return FedTrimmedAvg(beta=trimmed) if name == "trimmed_mean" else Krum(num_malicious_nodes=liars)
