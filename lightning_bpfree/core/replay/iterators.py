"""Iterators that a step draws from: every evaluation gets the same elements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from lightning_bpfree.core.replay.object_graph import Place


class Streams(Protocol):
    """Random streams, which what stands behind an iterator may draw from."""

    def save(self) -> Any:
        """Return the present state."""

    def load(self, state: Any) -> None:
        """Put ``state`` back."""


class RepeatedIterator:
    """An iterator that can go back to where a step began.

    An element that is handed out again moves the random streams as it did the first time, when it was made: a loader
    that shuffles draws its order at the first element.

    Args:
        source: the iterator.
        streams: what elements may draw from.

    Examples:
        >>> repeated = RepeatedIterator(iter("abc"))
        >>> next(repeated)
        'a'
        >>> repeated.rewind()
        >>> next(repeated), next(repeated)
        ('a', 'b')
    """

    def __init__(self, source: Iterator[Any], streams: Sequence[Streams] = ()) -> None:
        self.source, self.streams = source, list(streams)
        self.drawn: list[tuple[Any, list[Any]]] = []  # elements, and the streams behind them
        self.place = 0

    def __iter__(self) -> RepeatedIterator:
        return self

    def __next__(self) -> Any:
        if self.place == len(self.drawn):
            element = next(self.source)
            self.drawn.append((element, [stream.save() for stream in self.streams]))
        else:
            for stream, state in zip(self.streams, self.drawn[self.place][1], strict=True):
                stream.load(state)
        self.place += 1
        return self.drawn[self.place - 1][0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["source"], name)

    def rewind(self, place: int = 0) -> None:
        """Go back to the element of that number since the step began."""
        self.place = place

    def settle(self) -> None:
        """Let the next step begin here."""
        del self.drawn[: self.place]
        self.place = 0


class Iterators:
    """The iterators that modules hold, as long as a step is evaluated.

    Args:
        places: where the iterators are.
        streams: what their elements may draw from.
    """

    def __init__(self, places: Sequence[Place], streams: Sequence[Streams] = ()) -> None:
        self.repeated: list[RepeatedIterator] = []
        for place in places:
            source = place.get()
            if not isinstance(source, RepeatedIterator):
                source = RepeatedIterator(source, streams)
                place.put(source)
            self.repeated.append(source)
        self.places = list(places)

    def save(self) -> list[int]:
        """Return how many elements each has handed out since the step began."""
        return [iterator.place for iterator in self.repeated]

    def load(self, state: list[int]) -> None:
        """Go back to that many elements."""
        for iterator, place in zip(self.repeated, state, strict=True):
            iterator.rewind(place)

    def settle(self) -> None:
        """Let the next step begin here, and give the module its own iterators back where nothing is left over."""
        for place, iterator in zip(self.places, self.repeated, strict=True):
            iterator.settle()
            if not iterator.drawn and place.get() is iterator:
                place.put(iterator.source)
