"""Cryptographically secure random numbers: a ChaCha20 stream with a key from the operating system."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
_TERMS = 4  # of a normal number


class SecretNumbers:
    """Uniform and normal numbers from ChaCha20.

    torch's CPU generator is a Mersenne Twister whose state depends only on the lowest 32 bits of its seed: an attacker
    who sees the noise can try all of them. Here the key has 256 bits.

    Args:
        key: 32 secret bytes; None takes them from ``os.urandom``.

    Raises:
        ModuleNotFoundError: if `cryptography` is not installed.

    Examples:
        >>> numbers = SecretNumbers(bytes(32)).uniforms(3)
        >>> bool(((numbers > 0) & (numbers < 1)).all())
        True

    References:
        Y. Nir, A. Langley, "ChaCha20 and Poly1305 for IETF Protocols", RFC 8439, 2018.
    """

    def __init__(self, key: bytes | None = None) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'noise of Privacy needs cryptography: pip install "lightning-bpfree[federated]"'
            ) from error
        cipher = Cipher(algorithms.ChaCha20(os.urandom(32) if key is None else key, bytes(16)), mode=None)
        self._encryptor = cipher.encryptor()

    @classmethod
    def of_seed(cls, *numbers: int) -> SecretNumbers:
        """Return the stream of some integers, for reproducible simulations; it is not secret."""
        told = "lightning-bpfree " + " ".join(map(str, numbers))
        return cls(hashlib.sha256(told.encode()).digest())

    def uniforms(self, num: int) -> Numbers:
        """Return ``num`` numbers, uniform in (0, 1), in steps of 2^-52."""
        words = np.frombuffer(self._encryptor.update(bytes(8 * num)), dtype="<u8")
        numbers: Numbers = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
        return numbers

    def normals(self, num: int) -> Numbers:
        """Return ``num`` numbers of mean 0 and variance 1.

        Each is half of the sum of four Box-Muller numbers. With a single one, the set of possible floating-point
        results would leak the number that the noise is added to (N. Holohan, S. Braghin, "Secure Random Sampling in
        Differential Privacy", 2021, arXiv 2107.10138).
        """
        one, other = self.uniforms(2 * _TERMS * num).reshape(2, _TERMS, num)
        terms = np.sqrt(-2 * np.log(one)) * np.cos(2 * np.pi * other)
        summed: Numbers = terms.sum(0) / _TERMS**0.5
        return summed
