"""A random stream for each member."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lightning_bpfree.core.replay.random_streams import RandomStreams


class MemberStreams:
    """The random streams of the members: torch's on the CPU and the device in use, Python's and NumPy's.

    A member's streams start where ``seed_everything(seed)`` of its seed puts the global ones, so that it draws what it
    would draw alone.

    Args:
        seeds: seeds of the members.
        device: that the module computes on.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.device = device
        self._global = RandomStreams([device])
        self._states: list[Any] = []
        with self._untouched():
            for seed in seeds:
                self._global.seed(seed)
                self._states.append(self._global.save())
        self._generators: list[torch.Generator] | None = None

    @contextlib.contextmanager
    def _untouched(self) -> Iterator[None]:
        before = self._global.save()
        try:
            yield
        finally:
            self._global.load(before)

    @contextlib.contextmanager
    def at_work(self, member: int) -> Iterator[None]:
        """Let everything draw from one member's streams."""
        self._settle()
        with self._untouched():
            self._global.load(self._states[member])
            try:
                yield
            finally:
                self._states[member] = self._global.save()

    def generators(self) -> list[torch.Generator]:
        """Return torch's stream of each member as a generator, for drawing without switching the global one."""
        if self._generators is None:
            self._generators = [torch.Generator(self.device) for _ in self._states]
            for generator, state in zip(self._generators, self._states, strict=True):
                generator.set_state(state["cuda"][0] if state["cuda"] else state["torch"])
        return self._generators

    def _settle(self) -> None:
        """Write back what was drawn by generators."""
        for generator, state in zip(self._generators or [], self._states, strict=False):
            if state["cuda"]:
                state["cuda"] = [generator.get_state()]
            else:
                state["torch"] = generator.get_state()
        self._generators = None

    @contextlib.contextmanager
    def rewound(self) -> Iterator[None]:
        """Restore the streams afterward."""
        self._settle()
        states = [dict(state) for state in self._states]
        try:
            yield
        finally:
            self._generators, self._states = None, states

    def to_plain(self) -> list[dict[str, Any]]:
        """Return the streams in tensors, lists and numbers."""
        self._settle()
        with self._untouched():
            plain = []
            for state in self._states:
                self._global.load(state)
                plain.append(self._global.to_plain())
        return plain

    def from_plain(self, plain: Sequence[dict[str, Any]]) -> None:
        """Restore what :meth:`to_plain` returned."""
        self._generators, self._states = None, []
        with self._untouched():
            for state in plain:
                self._global.from_plain(state)
                self._states.append(self._global.save())
