"""Two streams without a GPU: operators carry vector clocks, so that a read that is not ordered after its write is seen.

A simulated stream counts its operators. An event is a copy of a stream's clock; who waits for it knows of all that came
before. An operator that reads memory which another stream has written, and does not know of the write, is a race. So is
memory that is freed while another stream, not told by `record_stream`, may still read it.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import types
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_bpfree import ReversibleBlock, ReversibleSequential
from lightning_bpfree.methods.reversible_recompute import side_stream

WIDTH = 4


class Stream:
    def __init__(self, device=None):
        self.clock = collections.Counter()

    def record_event(self):
        return dict(self.clock)

    def wait_event(self, event):
        for stream, count in event.items():
            self.clock[stream] = max(self.clock[stream], count)


class Watch(TorchDispatchMode):
    """Runs each operator on the current stream, and notes races."""

    def __init__(self):
        super().__init__()
        self.main = Stream()
        self.stack, self.memory, self.races = [self.main], {}, collections.Counter()

    @contextlib.contextmanager
    def stream(self, stream):
        self.stack.append(stream)
        try:
            yield
        finally:
            self.stack.pop()

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        now = self.stack[-1]
        now.clock[now] += 1
        out = func(*args, **(kwargs or {}))
        inputs = [leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for storage in inputs:
            found = self.memory.get(storage._cdata)
            if found is not None:
                writer, count = found["write"]
                self.races["read"] += now.clock[writer] < count
                found["readers"][now] = now.clock[now]
        known = {storage._cdata for storage in inputs}
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._written(leaf.untyped_storage(), known, func._schema.is_mutable, now)
        return out

    def _written(self, storage, known, mutable, now):
        key = storage._cdata
        if key in self.memory:
            if key in known and mutable:
                self.memory[key]["write"] = (now, now.clock[now])
        elif key not in known:
            self.memory[key] = {"write": (now, now.clock[now]), "owner": now, "readers": {}, "told": set()}
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key):
        found = self.memory.pop(key, None)
        for reader, count in (found or {"readers": {}})["readers"].items():
            told = reader in found["told"] or reader is found["owner"]
            self.races["free"] += not told and found["owner"].clock[reader] < count

    def told(self, tensor, stream):
        found = self.memory.get(tensor.untyped_storage()._cdata)
        if found is not None:
            found["told"].add(stream)


@pytest.fixture
def watch(monkeypatch):
    watch = Watch()
    cuda = types.SimpleNamespace(Stream=Stream, current_stream=lambda device: watch.stack[-1], stream=watch.stream)
    monkeypatch.setattr(side_stream, "torch", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(side_stream, "_side", functools.cache(lambda device: Stream()))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: watch.told(tensor, stream))
    plain = side_stream.SideStream.__init__

    def everywhere(self, device):
        plain(self, device)
        self.device = device

    monkeypatch.setattr(side_stream.SideStream, "__init__", everywhere)
    return watch


def races(watch, depth, **settings):
    """Count the races of two training steps."""

    def branch():
        return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1))

    net = ReversibleSequential([ReversibleBlock(branch(), branch()) for _ in range(depth)], "parallel", **settings)
    stem, head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
    with watch:
        for _ in range(2):
            head(net(stem(torch.randn(3, WIDTH)))).square().sum().backward()
            for parameter in (*net.parameters(), *stem.parameters(), *head.parameters()):
                parameter.grad = None
    return sum(watch.races.values())


SETTINGS = [{}, {"buffer_every": 2}, {"buffer_every": 3, "max_error": 0.1}, {"max_error": 0.1}, {"store_last": 2}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("depth", [1, 2, 5, 6])
def test_no_stream_reads_what_it_does_not_know_to_be_written(depth, settings, watch):
    assert races(watch, depth, **settings) == 0
    if depth > settings.get("store_last", 0) + 1:
        assert len({stream for stream in watch.main.clock if watch.main.clock[stream]}) == 2  # both were used


def nothing(*args, **kwargs):
    return None


@pytest.mark.parametrize("what", ["wait_event", "give", "mark", "record_stream"])
def test_the_watch_sees_what_is_left_out(what, watch, monkeypatch):
    if what == "record_stream":
        monkeypatch.setattr(torch.Tensor, "record_stream", nothing)
    else:
        monkeypatch.setattr(Stream if what == "wait_event" else side_stream.SideStream, what, nothing)
    assert races(watch, 6) > 0
