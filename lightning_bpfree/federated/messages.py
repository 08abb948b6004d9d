"""Messages between server and clients as plain values, and the validation of answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_bpfree.core.params import Params
from lightning_bpfree.federated.settings import Baffle

NUMBER = 8  # bytes of a number on the wire: float64, and words of secure sums


@dataclass(frozen=True)
class Update:
    """A finished round, from which a synchronized client computes the server's weights itself.

    Args:
        seed: seed of the round.
        means: the weighted mean of the clients' numbers, shape ``(local_steps, K)``.
    """

    seed: int
    means: Tensor


@dataclass(frozen=True)
class Instructions:
    """The server's message to a client at the start of a round.

    Args:
        round: number of the round, from 1.
        seed: seed of the round.
        client: number of the client, which determines per-client directions and batches.
        fingerprint: see :meth:`Baffle.fingerprint`.
        weights: the trained parameters; None for a synchronized client.
        optimizer: for a client to be kept synchronized from now on, the tensors of the server's optimizer.
        made: the number of updates that this optimizer has made.
        updates: for a synchronized client, the rounds since its last synchronization.
        base: the last round that the client is expected to have applied, before ``updates``.
        digest: hash of the weights that the client must arrive at; empty for no check.
    """

    round: int
    seed: int
    client: int
    fingerprint: str
    weights: Params | None = None
    optimizer: Params | None = None
    made: int = 0
    updates: Sequence[Update] = ()
    base: int = 0
    digest: str = ""

    @property
    def num_bytes(self) -> int:
        """The size of the message: weights or numbers, two whole numbers and two hashes."""
        tensors = [*(self.weights or {}).values(), *(self.optimizer or {}).values()]
        weights = sum(tensor.nbytes for tensor in tensors)
        return weights + sum(NUMBER * (1 + update.means.numel()) for update in self.updates) + 3 * NUMBER + 64


@dataclass(frozen=True)
class Reply:
    """A client's answer.

    Args:
        client: number of the client.
        round: the round that it answers.
        seed: seed of that round.
        differences: the loss differences, float64 of shape ``(local_steps, K)``: means over the client's samples.
        num_samples: the number of samples in these means.
        forward_passes: the number of the client's forward passes, each over one batch.
        peak_mib: by how much the client's memory rose while it answered; None if not measured.
        refused: the reason, if the client did not answer.
        masked: instead of ``differences``, the masked words of a secure sum.
        weights: instead of ``differences``, a client's weights or gradients from backprop.
    """

    client: int
    round: int
    seed: int
    differences: Tensor | None = None
    num_samples: float = 0
    forward_passes: float = 0.0
    peak_mib: float | None = None
    refused: str = ""
    masked: bytes | None = None
    weights: Params | None = None

    @property
    def num_bytes(self) -> int:
        """The size of the message: the numbers, and four more."""
        numbers = 0 if self.differences is None else self.differences.numel()
        weights = sum(tensor.nbytes for tensor in (self.weights or {}).values())
        return NUMBER * numbers + len(self.masked or b"") + weights + 4 * NUMBER


def fault(reply: Reply, settings: Baffle, number: int, seed: int, largest: float) -> str | None:
    """Return what is wrong with an answer, or None.

    Args:
        reply: the answer.
        settings: the federation's settings.
        number: number of the current round.
        seed: seed of the current round.
        largest: the largest absolute difference that is accepted.

    Examples:
        >>> answer = Reply(0, 3, 7, torch.full((1, 2), math.nan), num_samples=5)
        >>> fault(answer, Baffle(num_directions=2), 3, 7, 100.0)
        'difference 0 is nan'
    """
    if reply.refused:
        return reply.refused
    if (reply.round, reply.seed) != (number, seed):
        return f"it answers round {reply.round} with seed {reply.seed}, and this is round {number} with seed {seed}"
    if reply.masked is not None:
        size = NUMBER * (settings.numbers + 1)
        return None if len(reply.masked) == size else f"it has {len(reply.masked)} masked bytes, and not {size}"
    if not 0 < reply.num_samples < math.inf:
        return f"it has {reply.num_samples} samples"
    return _fault_of(reply.differences, settings, largest)


def _fault_of(differences: Any, settings: Baffle, largest: float) -> str | None:
    shape = (settings.local_steps, settings.num_directions)
    if not isinstance(differences, Tensor) or tuple(differences.shape) != shape:
        given = tuple(differences.shape) if isinstance(differences, Tensor) else type(differences).__name__
        return f"it has {given} differences, and {shape} were asked for"
    bad = ~(differences.abs() <= largest)  # NaN is on no side
    if not bool(bad.any()):
        return None
    index = int(bad.flatten().nonzero()[0])
    value = float(differences.flatten()[index])
    beyond = f", beyond {largest:g}" if math.isfinite(value) else ""
    return f"difference {index} is {value:g}{beyond}"


def stacked(replies: Sequence[Reply]) -> tuple[Tensor, Tensor]:
    """Return the differences of all answers, ``(clients, local_steps, K)``, and sample counts, ``(clients,)``."""
    numbers = torch.stack([reply.differences for reply in replies if reply.differences is not None])
    return numbers, torch.tensor([float(reply.num_samples) for reply in replies], dtype=torch.float64)
