"""Iterators that a step reads from: every evaluation gets the same elements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from lightning_bpfree.core.replay.object_graph import Place


class Streams(Protocol):
    """Random streams that the source of an iterator may draw from."""

    def save(self) -> Any:
        """Return the present state."""

    def load(self, state: Any) -> None:
        """Put ``state`` back."""


class RepeatedIterator:
    """An iterator that can return to its position at the start of a step.

    An element that is returned again advances the random streams as it did the first time: a loader that shuffles draws
    its order at the first element.

    Args:
        source: the iterator.
        streams: the random streams that elements may draw from.

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
        """Go back to the element of this number, counted from the start of the step."""
        self.place = place

    def settle(self) -> None:
        """Make the current position the start of the next step."""
        del self.drawn[: self.place]
        self.place = 0


class Iterators:
    """The iterators that modules hold, during the evaluations of a step.

    Args:
        places: where the iterators are.
        streams: the random streams that their elements may draw from.
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
        """Return how many elements each has returned since the step began."""
        return [iterator.place for iterator in self.repeated]

    def load(self, state: list[int]) -> None:
        """Go back to these numbers of elements."""
        for iterator, place in zip(self.repeated, state, strict=True):
            iterator.rewind(place)

    def settle(self) -> None:
        """Make this the start of the next step, and restore the module's own iterators where no element is pending."""
        for place, iterator in zip(self.places, self.repeated, strict=True):
            iterator.settle()
            if not iterator.drawn and place.get() is iterator:
                place.put(iterator.source)
