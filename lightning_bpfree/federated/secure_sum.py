"""Secure sums, which reveal no single term: fixed-point integers under masks that cancel.

Every pair of clients agrees on a stream of words that one adds and the other subtracts, and every client adds a private
stream. The sum of all vectors then contains only the private streams. The clients reveal these in a second round,
together with the pairwise streams of clients whose vectors did not arrive. For each client, either its private stream
or its pairwise streams are revealed, never both, so a vector that arrives late stays hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_bpfree.core.arguments import PositiveFloat, PositiveInt, checked

Words = npt.NDArray[np.uint64]
SEED_BYTES = 32


def needed() -> None:
    """Raise ModuleNotFoundError, which names the extra, if `cryptography` is not installed."""
    try:
        import cryptography  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('secure sums need cryptography: pip install "lightning-bpfree[federated]"') from error


class FixedPoint:
    """Numbers as integer multiples of a step, in 64-bit words whose sums wrap around.

    A client rounds to a finer step, so that the error of the sum is at most half of ``step``.

    Args:
        step: rounding step of the sum, > 0.
        num_clients: maximum number of terms in a sum.

    Examples:
        >>> numbers = FixedPoint(2**-20, num_clients=3)
        >>> with np.errstate(over="ignore"):
        ...     total = numbers.encode([0.1, -2.0]) + numbers.encode([0.2, 0.5])
        >>> numbers.decode(total).round(5).tolist()
        [0.3, -1.5]
    """

    @checked
    def __init__(self, step: PositiveFloat = 2.0**-32, num_clients: PositiveInt = 10) -> None:
        self.step, self.num_clients = step, num_clients
        self._fine = step / 2 ** math.ceil(math.log2(num_clients)) if num_clients > 1 else step

    @property
    def largest(self) -> float:
        """The largest absolute number of a client for which no sum can overflow."""
        return self._fine * 2.0**63 / self.num_clients * (1 - 2.0**-50)

    def encode(self, numbers: Any) -> Words:
        """Return numbers as words.

        Raises:
            ValueError: if a number is not finite, or so large that the sum might overflow.
        """
        given = np.asarray(numbers, dtype=np.float64)
        if not (np.abs(given) <= self.largest).all():
            worst = given[np.argmax(np.where(np.isnan(given), np.inf, np.abs(given)))]
            raise ValueError(
                f"secure sum: {worst:g} is beyond {self.largest:g}, the largest of {self.num_clients} clients at "
                f"step={self.step:g}: give a larger step."
            )
        return np.rint(given / self._fine).astype(np.int64).view(np.uint64)

    def decode(self, words: Words) -> npt.NDArray[np.float64]:
        """Return the numbers that a sum of words encodes."""
        return words.view(np.int64).astype(np.float64) * self._fine


def stream(seed: bytes, num: int) -> Words:
    """Return ``num`` words by ChaCha20 from a seed of 32 bytes, which must be used once."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    encryptor = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(8 * num)), dtype="<u8").astype(np.uint64)


def _derived(secret: bytes, purpose: str) -> bytes:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(hashes.SHA256(), SEED_BYTES, salt=None, info=f"lightning-bpfree {purpose}".encode()).derive(secret)


class RefusedSumError(ValueError):
    """A client refuses a request that would reveal its numbers."""


class Masks:
    """A client's side of secure sums: the consecutive rounds of one session.

    Args:
        client: number of the client.
        private: private key from an earlier use in the same session, 32 bytes; None for a new key.
        answered: the last round of the session in which the client masked numbers.
        told: the rounds in which it revealed masks, and for which clients.

    Examples:
        >>> clients = {i: Masks(i) for i in range(3)}
        >>> keys = {i: own.public for i, own in clients.items()}
        >>> words = {i: own.masked(np.array([i], dtype=np.uint64), 1, keys) for i, own in clients.items()}
        >>> told = {i: clients[i].told_masks(1, [0, 1]) for i in (0, 1)}  # client 2 has dropped out
        >>> int(unmasked({0: words[0], 1: words[1]}, told, [0, 1, 2])[0])
        1
    """

    def __init__(
        self, client: int, private: bytes | None = None, *, answered: int = 0, told: Mapping[int, Any] | None = None
    ) -> None:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self.client, self.answered = client, answered
        self._private = X25519PrivateKey.generate() if private is None else X25519PrivateKey.from_private_bytes(private)
        self._told: dict[int, Any] = dict(told or {})
        self._keys: dict[int, bytes] = {}

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes, that the other clients need."""
        return self._private.public_key().public_bytes_raw()

    @property
    def private(self) -> bytes:
        """The private key, which never leaves the client."""
        return self._private.private_bytes_raw()

    def masked(self, words: Words, number: int, keys: Mapping[int, bytes]) -> Words:
        """Return the words of a round under masks.

        Args:
            words: the words to be summed.
            number: number of the round; each round of a session is masked once.
            keys: public keys of all clients of the round, including this one's.

        Raises:
            RefusedSumError: if this round or a later one has been masked already, or the keys are invalid.
        """
        if number <= self.answered:
            raise RefusedSumError(f"round {number} again: one mask over two vectors would show their difference")
        if keys.get(self.client) != self.public or len(keys) < 2:
            raise RefusedSumError(
                f"keys of {len(keys)} clients: they must be two or more, and this client's among them"
            )
        self.answered, self._keys = number, dict(keys)
        total = words + stream(self._own(number), len(words))
        for other in keys:
            if other != self.client:
                mask = stream(self._pair(other, keys[other], number), len(words))
                total = total + mask if self.client < other else total - mask
        return total

    def told_masks(
        self, number: int, survivors: Sequence[int], keys: Mapping[int, bytes] | None = None
    ) -> dict[int, bytes]:
        """Return what the server needs from this client to unmask the sum: seeds by client, including its own.

        Args:
            number: number of the round.
            survivors: clients whose vectors arrived, including this one: more than half of the round's clients, and at
                least two.
            keys: public keys of all clients of the round; None for those of :meth:`masked`.

        Raises:
            RefusedSumError: if there are too few survivors, or they differ from those of an earlier call.
        """
        keys = self._keys if keys is None else dict(keys)
        chosen = sorted(set(survivors))
        if number != self.answered or self.client not in chosen or not set(chosen) <= set(keys):
            raise RefusedSumError(f"round {number} with survivors {chosen}: this client masked round {self.answered}")
        if len(chosen) < 2 or 2 * len(chosen) <= len(keys):
            raise RefusedSumError(
                f"survivors {chosen}: fewer than two, or not more than half of {len(keys)}, would show too much"
            )
        if self._told.setdefault(number, chosen) != chosen:
            raise RefusedSumError(f"round {number}: other survivors than before would show one client's numbers")
        gone = [other for other in keys if other not in chosen]
        seeds = {other: self._pair(other, keys[other], number) for other in gone}
        return {self.client: self._own(number), **seeds}

    def _own(self, number: int) -> bytes:
        return _derived(self.private, f"own mask, round {number}")

    def _pair(self, other: int, key: bytes, number: int) -> bytes:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        low, high = sorted((self.client, other))
        shared = self._private.exchange(X25519PublicKey.from_public_bytes(key))
        return _derived(shared, f"pair {low} {high}, round {number}")


def unmasked(masked: Mapping[int, Words], told: Mapping[int, Mapping[int, bytes]], clients: Sequence[int]) -> Words:
    """Return the sum of the survivors' words.

    Args:
        masked: the survivors' masked words.
        told: the result of :meth:`Masks.told_masks` from each survivor.
        clients: all clients of the round.

    Raises:
        ValueError: if a survivor has not revealed its masks: the sum cannot be computed, and the round is lost.
    """
    gone = set(clients) - set(masked)
    lacking = [own for own in masked if own not in told or set(told[own]) != {own, *gone}]
    if lacking:
        raise ValueError(f"secure sum: clients {lacking} sent numbers, and then not their masks: the round is lost.")
    num = len(next(iter(masked.values())))
    total = np.zeros(num, dtype=np.uint64)
    for own, words in masked.items():
        total = total + words - stream(told[own][own], num)
        for other in gone:
            mask = stream(told[own][other], num)
            total = total - mask if own < other else total + mask
    return total
