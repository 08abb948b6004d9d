"""A round in which the server sees only the sum of the clients' numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_bpfree.federated.messages import Reply, fault
from lightning_bpfree.federated.secure_sum import FixedPoint, Masks, RefusedSumError, Words, needed, unmasked
from lightning_bpfree.federated.server import BaffleServer, RoundReport
from lightning_bpfree.federated.settings import Baffle, round_seed


def words_of(reply: Reply, numbers: FixedPoint) -> Words:
    """Return a client's answer as words: its differences times its number of samples, and that number.

    Args:
        reply: an answer with differences.
        numbers: the fixed-point format.
    """
    assert reply.differences is not None
    weighted = (reply.differences.double() * reply.num_samples).flatten().tolist()
    return numbers.encode([*weighted, reply.num_samples])


def masked_reply(reply: Reply, words: Words) -> Reply:
    """Return an answer that holds masked words instead of numbers."""
    return replace(reply, differences=None, num_samples=0, masked=words.astype("<u8").tobytes())


def mean_of(total: Words, numbers: FixedPoint, settings: Baffle) -> Tensor:
    """Return the weighted mean ``(local_steps, K)`` that a sum of words encodes."""
    *sums, samples = numbers.decode(total).tolist()
    if samples <= 0:
        raise ValueError(f"secure sum: {samples:g} samples: the round is lost.")
    shape = (settings.local_steps, settings.num_directions)
    mean: Tensor = torch.tensor(sums, dtype=torch.float64).view(shape) / samples
    return mean


class SecureRound:
    """Both sides of secure sums within one process.

    Args:
        settings: the federation's settings.
        step: the rounding step of sums.
    """

    def __init__(self, settings: Baffle, step: float) -> None:
        needed()
        self.settings, self.step = settings, step
        self._masks: dict[int, Masks] = {}
        self._clients: list[int] = []

    def numbers(self, clients: Sequence[int]) -> FixedPoint:
        """Return the fixed-point format for a round of these clients."""
        return FixedPoint(self.step, len(clients))

    def masks(self, clients: Sequence[int]) -> dict[int, Masks]:
        """Return the clients' sides of a round."""
        self._clients = list(clients)
        for client in clients:
            if client not in self._masks:
                self._masks[client] = Masks(client)
        return {client: self._masks[client] for client in clients}

    @property
    def keys(self) -> dict[int, bytes]:
        """Public keys of the clients of the round."""
        return {client: self._masks[client].public for client in self._clients}

    def finish(self, server: BaffleServer, replies: Sequence[Reply], clients: Sequence[int]) -> RoundReport:
        """Validate the answers, unmask their sum and apply the update; without a sum, nothing changes."""
        fit, left_out = judged(server, replies)
        told: dict[int, Mapping[int, bytes]] = {}
        for client in fit:
            try:
                told[client] = self._masks[client].told_masks(server.round, list(fit), self.keys)
            except RefusedSumError as error:
                left_out[client] = str(error)
        return concluded(server, fit, told, clients, self.numbers(clients), left_out)


def judged(server: BaffleServer, replies: Sequence[Reply]) -> tuple[dict[int, Words], dict[int, str]]:
    """Return the masked words of valid answers by client, and what is wrong with the others."""
    seed = round_seed(server.seed, server.round)
    fit: dict[int, Words] = {}
    left_out: dict[int, str] = {}
    for reply in replies:
        wrong = fault(reply, server.settings, server.round, seed, server.largest_difference)
        if wrong is None and reply.masked is None:
            wrong = "its numbers are not masked"
        if wrong is None:
            fit[reply.client] = np.frombuffer(reply.masked or b"", dtype="<u8").astype(np.uint64)
        else:
            left_out[reply.client] = wrong
            rank_zero_warn(f"round {server.round}: client {reply.client} is left out: {wrong}.")
    return fit, left_out


def concluded(
    server: BaffleServer,
    fit: Mapping[int, Words],
    told: Mapping[int, Mapping[int, bytes]],
    clients: Sequence[int],
    numbers: FixedPoint,
    left_out: dict[int, str],
) -> RoundReport:
    """Unmask the sum and apply the update of the round; without a plausible sum, nothing changes."""
    try:
        if not fit:
            raise ValueError("secure sum: no client has answered: the round is lost.")
        mean = mean_of(unmasked(fit, told, clients), numbers, server.settings)
        if not float(mean.abs().max()) <= server.largest_difference:
            raise ValueError(
                f"secure sum: a mean is {float(mean.abs().max()):g}, beyond {server.largest_difference:g}: "
                "a client has lied, and nobody knows which: the round is lost."
            )
    except ValueError as error:
        rank_zero_warn(f"round {server.round}: {error}")
        return server.conclude({}, [], {**left_out, **dict.fromkeys(fit, "the round is lost")})
    return server.conclude({None: (1.0, mean)}, list(fit), left_out)


def mask_reply(reply: Reply, masks: Masks, secure: SecureRound) -> Reply:
    """Return a client's answer under masks, or the reason why it cannot be masked."""
    try:
        words = words_of(reply, secure.numbers(list(secure.keys)))
        return masked_reply(reply, masks.masked(words, reply.round, secure.keys))
    except ValueError as error:
        return Reply(reply.client, reply.round, reply.seed, refused=str(error))
