"""Evaluating a module several times as if it had been evaluated once."""

from __future__ import annotations

import contextlib
import ctypes
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Recoverable(Protocol):
    """A part of the world that an evaluation moves, and that can be put back."""

    def save(self) -> Any:
        """Return the present state."""

    def load(self, state: Any) -> None:
        """Put ``state`` back."""


class RandomStreams:
    """The global random streams: torch on the CPU and on the devices in use, Python's and, where loaded, NumPy's.

    Args:
        devices: CUDA devices whose streams count.
    """

    def __init__(self, devices: Sequence[torch.device] = ()) -> None:
        self.devices = [device for device in devices if device.type == "cuda"]

    def save(self) -> dict[str, Any]:
        """Return the state of every stream."""
        return {
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(device) for device in self.devices],
            "python": random.getstate(),
            "numpy": _numpy_random().get_state() if _numpy_random() else None,
            "numpy_words": _numpy_words(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Set every stream to ``state``."""
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

    def to_plain(self) -> dict[str, Any]:
        """Return the present state in tensors, lists and numbers, as checkpoints may hold."""
        state = self.save()
        version, words, gauss = state["python"]
        del state["numpy_words"]  # as long as this process runs
        kept = None
        if state["numpy"] is not None:
            kind, key, *rest = state["numpy"]
            kept = [str(kind), key.tolist(), *rest]
        return {**state, "python": [version, list(words), gauss], "numpy": kept}

    def from_plain(self, state: dict[str, Any]) -> None:
        """Set every stream to what :meth:`to_plain` returned; devices that are not there now are left out."""
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


class Attributes:
    """The attributes of modules outside parameters and buffers: hidden states, counters, whatever a step assigns.

    What a step assigns anew (``self.hidden = ...``, ``self.count += 1``) is put back; what it changes in place (a list
    that grows) is not.

    Args:
        modules: the modules whose attributes count.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)

    def save(self) -> list[dict[str, Any]]:
        """Return every module's attributes."""
        return [module.__dict__.copy() for module in self.modules]

    def load(self, state: list[dict[str, Any]]) -> None:
        """Put every module's attributes back."""
        for module, saved in zip(self.modules, state, strict=True):
            own = module.__dict__
            if len(own) != len(saved):
                for key in own.keys() - saved.keys():
                    del own[key]
            own.update(saved)


class Buffers:
    """The buffers of a module: running statistics, counters, power-iteration vectors.

    The recorded evaluation of a step moves the buffers themselves; all others work on copies of what the buffers were
    when the step began. Nothing is copied back, for that would spoil graphs that hold a buffer.

    Examples:
        >>> norm = nn.BatchNorm1d(2)
        >>> buffers = Buffers(norm)
        >>> buffers.remember()
        >>> with buffers.copies():
        ...     _ = norm(torch.randn(8, 2))
        >>> int(norm.num_batches_tracked)
        0
    """

    def __init__(self, module: nn.Module) -> None:
        self.places = [(owner, key) for owner in module.modules() for key in owner._buffers]
        self._values: list[Tensor | None] = []

    def remember(self) -> None:
        """Take the present values as those from which evaluations start."""
        buffers = [owner._buffers[key] for owner, key in self.places]
        self._values = [None if buffer is None else buffer.clone() for buffer in buffers]

    @contextlib.contextmanager
    def copies(self) -> Iterator[None]:
        """Put fresh copies of the remembered values in place of the buffers."""
        own = [owner._buffers[key] for owner, key in self.places]
        for (owner, key), value in zip(self.places, self._values, strict=True):
            owner._buffers[key] = None if value is None else value.clone()
        try:
            yield
        finally:
            for (owner, key), buffer in zip(self.places, own, strict=True):
                owner._buffers[key] = buffer


class Replay:
    """Starts every evaluation from the same state, and ends as if the recorded evaluation had been the only one.

    Args:
        parts: what evaluations move, and what is put back.
        buffers: what evaluations other than the recorded one see copies of.

    Examples:
        >>> replay = Replay([RandomStreams()], Buffers(nn.Identity()))
        >>> draws = []
        >>> for _ in range(2):
        ...     replay.rewind()
        ...     draws.append(torch.rand(()))
        ...     replay.keep()
        >>> draws[0] == draws[1]
        tensor(True)
        >>> replay.finish()
    """

    def __init__(self, parts: Sequence[Recoverable], buffers: Buffers) -> None:
        self.parts, self.buffers = parts, buffers
        self._before: list[Any] | None = None
        self._after: list[Any] | None = None

    def rewind(self) -> None:
        """Go back to the state before the first evaluation (and remember it, at the first call)."""
        if self._before is None:
            self._before = [part.save() for part in self.parts]
            self.buffers.remember()
        else:
            self._load(self._before)

    def keep(self) -> None:
        """Declare the present state to be the one that :meth:`finish` leaves behind."""
        self._after = [part.save() for part in self.parts]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within an evaluation, compute something that moves neither buffers nor anything else."""
        state = [part.save() for part in self.parts]
        try:
            with self.buffers.copies():
                yield
        finally:
            self._load(state)

    def finish(self) -> None:
        """Leave the kept state behind; without one, the state before the first evaluation."""
        state = self._before if self._after is None else self._after
        if state is not None:
            self._load(state)

    def _load(self, states: list[Any]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load(state)
