"""Global random streams: torch, Python and NumPy."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch


class RandomStreams:
    """The global random streams: torch's on the CPU and on the devices in use, Python's, and NumPy's if imported.

    Args:
        devices: CUDA devices whose streams are saved.
    """

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        self.devices = [device for device in devices if device.type == "cuda"]
        self._numpy_known: tuple[bytes | None, Any] = (None, None)  # words of NumPy's generator, and its state

    def save(self) -> dict[str, Any]:
        """Return the state of every stream."""
        words = _numpy_words()
        return {
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(device) for device in self.devices],
            "python": random.getstate(),
            "numpy": self._numpy_state(words),
            "numpy_words": words,
        }

    def _numpy_state(self, words: bytes | None) -> Any:
        """Return NumPy's state. Reading it takes 40 times as long as its words, which few training steps move."""
        numpy_random, (known, state) = _numpy_random(), self._numpy_known
        if numpy_random is None:
            return None
        if words is None or words != known or state[3]:  # a kept normal number is used up without a word that moves
            state = numpy_random.get_state()
            self._numpy_known = (words, state)
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Restore every stream from ``state``."""
        torch.set_rng_state(state["torch"])
        for device, cuda_state in zip(self.devices, state["cuda"], strict=True):
            torch.cuda.set_rng_state(cuda_state, device)
        random.setstate(state["python"])
        numpy_random = _numpy_random()
        # Reading NumPy's stream, and setting it, cost up to a tenth of a millisecond, and few training steps move it. A
        # normal number that is kept for the next call can go without a word that moves.
        words, kept = state.get("numpy_words"), state["numpy"]
        if kept is None or not numpy_random or (words is not None and not kept[3] and words == _numpy_words()):
            return
        if not _same_numpy(numpy_random.get_state(), kept):
            numpy_random.set_state(kept)

    def seed(self, seed: int) -> None:
        """Seed every stream with ``seed``, as ``seed_everything`` does; NumPy uses the lower 32 bits.

        ``torch.manual_seed`` would also seed devices that are not among :attr:`devices`.
        """
        torch.default_generator.manual_seed(seed)
        for device in self.devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        numpy_random = _numpy_random()
        if numpy_random is not None:
            numpy_random.seed(seed % (1 << 32))

    def to_plain(self) -> dict[str, Any]:
        """Return the current state in tensors, lists and numbers, for checkpoints."""
        state = self.save()
        version, words, gauss = state["python"]
        del state["numpy_words"]  # as long as this process runs
        kept = None
        if state["numpy"] is not None:
            kind, key, *rest = state["numpy"]
            kept = [str(kind), key.tolist(), *rest]
        return {**state, "python": [version, list(words), gauss], "numpy": kept}

    def from_plain(self, state: dict[str, Any]) -> None:
        """Restore every stream from the result of :meth:`to_plain`; devices that do not exist now are skipped."""
        version, words, gauss = state["python"]
        numpy_state = state["numpy"]
        cuda = state["cuda"] if len(state["cuda"]) == len(self.devices) else self.save()["cuda"]
        self.load({**state, "cuda": cuda, "python": (version, tuple(words), gauss), "numpy": None})
        numpy_random = _numpy_random()
        if numpy_random and numpy_state is not None:
            numpy_random.set_state(tuple(numpy_state))


def _numpy_random() -> Any:
    # If the training step holds a NumPy stream, NumPy is imported already; it is never imported for this.
    return getattr(sys.modules.get("numpy"), "random", None)


_MT19937_BYTES = 4 * 624 + 4  # words of the generator, and how many are used


def _numpy_words() -> bytes | None:
    """Return the memory of NumPy's global generator, or None if that is not known."""
    numpy_random = _numpy_random()
    generator: Any = getattr(numpy_random, "get_bit_generator", lambda: None)()
    if type(generator).__name__ != "MT19937":
        return None
    return ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)


def _same_numpy(now: tuple[Any, ...], then: tuple[Any, ...]) -> bool:
    return bool(now[2] == then[2] and now[3:] == then[3:] and (now[1] == then[1]).all())
