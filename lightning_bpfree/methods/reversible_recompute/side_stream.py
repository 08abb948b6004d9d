"""Two CUDA streams that take turns, so that one block is recomputed while another is differentiated."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class SideStream:
    """The stream of even blocks, which is the caller's, and that of odd blocks; without a CUDA device, no streams.

    Operators of a backward pass run on the stream on which their forward operators ran, so a block keeps its stream.
    Streams wait for each other by events; the host waits for none.

    Args:
        device: where the blocks are; None, or a device without CUDA, for one stream.

    Examples:
        >>> streams = SideStream(torch.device("cpu"))
        >>> with streams.use(1):
        ...     out = torch.ones(2) + 1
        >>> streams.mark("rebuilt", 1)
    """

    def __init__(self, device: torch.device | None) -> None:
        self.device = device if device is not None and device.type == "cuda" else None
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._events: dict[str, torch.cuda.Event] = {}

    def open(self) -> None:
        """Begin a backward pass on the caller's stream."""
        if self.device is not None:
            self._streams = (torch.cuda.current_stream(self.device), _side(self.device))
        self._events = {}

    @contextlib.contextmanager
    def use(self, index: int, after: str | None = None, tensors: Iterable[Tensor | None] = ()) -> Iterator[None]:
        """Compute on the stream of block ``index``, once the event ``after`` has happened.

        Args:
            index: number of the block.
            after: name of an event that :meth:`mark` has recorded; None for what needs none.
            tensors: what the stream reads of the other's memory, which is not to be reused before it has.
        """
        if self._streams is None:
            yield
            return
        stream = self._streams[index % 2]
        if after is not None and after in self._events:
            stream.wait_event(self._events[after])
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(stream)
        with torch.cuda.stream(stream):
            yield

    def mark(self, event: str, index: int) -> None:
        """Record what the stream of block ``index`` has been given so far, under a name."""
        if self._streams is not None:
            self._events[event] = self._streams[index % 2].record_event()

    def give(self, index: int, tensors: Iterable[Tensor | None]) -> None:
        """Make the caller's stream wait until the stream of block ``index`` has computed ``tensors``."""
        if self._streams is None or self._streams[index % 2] is self._streams[0]:
            return
        self._streams[0].wait_event(self._streams[index % 2].record_event())
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(self._streams[0])


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """Return the second stream of a device: one for good, since memory that is freed stays with its stream."""
    return torch.cuda.Stream(device)
