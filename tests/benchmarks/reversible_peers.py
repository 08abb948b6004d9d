"""Measures reversible stacks beside revlib, revtorch and memcnn: time of a step, memory, and how exact gradients are.

    python -m venv peers
    peers/bin/pip install -c constraints.txt -e '.[recipes]'
    peers/bin/pip install revlib==1.7.2 revtorch==0.2.4 memcnn==1.5.2 --no-deps
    peers/bin/python tests/benchmarks/reversible_peers.py --out docs/results/reversible_peers_benchmarks.json

The peers need an environment of their own: their requirements are those of their time, hence ``--no-deps``; what they
really use comes with ours.

All run the same twelve pairs of branches on an input of 256 channels, split into two streams of 128 and put side by
side again, in one process. Each peer is used as its README shows, and where that saves no memory, or repeats no random
numbers, with the options that it has for this. A peer that fails has its error in its row.
"""

from __future__ import annotations

import importlib.metadata
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from memory import LiveBytes
from reversible_meters import (
    BATCH,
    DEPTH,
    TOKENS,
    WIDTH,
    Row,
    blocks,
    distance,
    gradient,
    measured,
    ratio,
    rounds,
    step,
    tokens,
)
from run import run_parts
from torch import nn

from lightning_bpfree.methods.reversible_recompute.sequential import ReversibleBlock, ReversibleSequential

PEERS = ("revlib", "revtorch", "memcnn")
Blocks = list[ReversibleBlock]


class Net(nn.Module):
    """A stack on a copy of its input: memcnn empties what it is given.

    Args:
        stack: what is measured.
        of: the blocks that it is made of, whose order of parameters is the same for all.
    """

    def __init__(self, stack: nn.Module, of: Blocks) -> None:
        super().__init__()
        self.blocks, self._stack = nn.ModuleList(of), [stack]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._stack[0](x * 1)


class Reseeded(nn.Module):
    """Plain autograd with the random numbers of revtorch, which seeds the global generator before every branch."""

    def __init__(self, of: list[Any]) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.chunk(2, -1)
        for block in self.of:
            torch.manual_seed(block.random_seeds["f"])
            x1 = x1 + block.f_block(x2)
            torch.manual_seed(block.random_seeds["g"])
            x2 = x2 + block.g_block(x1)
        return torch.cat((x1, x2), -1)


# --- contenders: each makes a stack of the blocks ---


def ours(schedule: Any) -> Callable[[Blocks], nn.Module]:
    return lambda of: ReversibleSequential(of, schedule, enter="split")


def revlib_stack(of: Blocks) -> nn.Module:
    import revlib

    return revlib.ReversibleSequential(*(branch for block in of for branch in (block.f, block.g)), split_dim=-1)


def revtorch_stack(seeded: bool) -> Callable[[Blocks], nn.Module]:
    def make(of: Blocks) -> nn.Module:
        from revtorch.revtorch import ReversibleBlock as Theirs
        from revtorch.revtorch import ReversibleSequence

        made = [Theirs(block.f, block.g, split_along_dim=-1, fix_random_seed=seeded) for block in of]
        return ReversibleSequence(nn.ModuleList(made))

    return make


def memcnn_stack(keep: bool) -> Callable[[Blocks], nn.Module]:
    def make(of: Blocks) -> nn.Module:
        from memcnn import AdditiveCoupling, InvertibleModuleWrapper

        couplings = [AdditiveCoupling(block.f, block.g, split_dim=-1) for block in of]
        return nn.Sequential(*(InvertibleModuleWrapper(c, keep_input=keep, preserve_rng_state=True) for c in couplings))

    return make


CONTENDERS: dict[str, tuple[Callable[[Blocks], nn.Module], str]] = {
    "sequential": (ours("sequential"), "ReversibleSequential"),
    "parallel": (ours("parallel"), "ReversibleSequential; on a CPU on one stream"),
    "checkpoint": (ours("checkpoint"), "ReversibleSequential, by torch.utils.checkpoint a block"),
    "revlib": (revlib_stack, "revlib.ReversibleSequential"),
    "revtorch": (revtorch_stack(False), "revtorch.ReversibleSequence"),
    "revtorch, fix_random_seed": (revtorch_stack(True), "it seeds the global generator before every branch"),
    "memcnn": (memcnn_stack(False), "InvertibleModuleWrapper(keep_input=False, preserve_rng_state=True) a block"),
    "memcnn, keep_input": (memcnn_stack(True), "as its README, which keeps the input of every block"),
}


class TrueBytes(LiveBytes):
    """Sees storages shrink, too; ``most`` is the most bytes alive after any operator."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        alive = [storage for ref in self._storages.values() if (storage := ref()) is not None]
        self.most = max(self.most, sum(storage.nbytes() for storage in alive))
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._storages[storage._cdata] = weakref.ref(storage)
        super()._add(storage)


def peak(net: nn.Module, x: torch.Tensor) -> int:
    """Most bytes of tensors alive in a step, without parameters and the sums of their gradients, which are there."""
    with TrueBytes() as live:
        step(net, x, keep_gradients=True)()
    return live.most


def failed(name: str, error: Exception, unit: str) -> Row:
    text = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    print(f"{name:<60} FAILED {text}")
    return {"name": name, "unit": unit, "value": None, "limit": None, "reached": None, "what": f"fails: {text}"}


def compared(dropout: float) -> list[Row]:
    """All contenders on the same blocks: gradients first, then memory, then time."""
    of, x = blocks(DEPTH, dropout), tokens(width=2 * WIDTH)
    end = f", dropout {dropout:g}"
    plain = Net(ours("autograd")(of), of)
    true, most = gradient(plain, x), peak(plain, x)
    rows, runs = [measured(f"peak memory, autograd{end}", "plain autograd", most / 2**20, unit="MiB")], {}
    for name, (make, how) in CONTENDERS.items():
        mine, label = not name.startswith(PEERS), f"gradient error, {name}{end}"
        try:
            net = Net(make(of), of)
            found = gradient(net, x)
            reference = true
            if "fix_random_seed" in name:
                reference = gradient(Net(Reseeded(list(net._stack[0].reversible_blocks)), of), x)
            what = f"relative L2 distance of the whole gradient from plain autograd's with the same random numbers, float32; {how}"
            rows.append(measured(label, what, distance(found, reference), 1e-5 if mine else None, ""))
            what = f"most bytes alive in a step, {most / 2**20:.1f} MiB by plain autograd; {how}"
            rows.append(measured(f"peak memory, {name}{end}", what, peak(net, x) / 2**20, unit="MiB"))
            runs[name] = step(net, x)
        except Exception as error:  # of a peer that does not work with this torch: the result
            if mine:
                raise
            rows.append(failed(label, error, ""))
    times = rounds({"autograd": step(plain, x), **runs}, repeats=8)
    base = f"{min(times['autograd']) * 1000:.0f} ms, {DEPTH} blocks of width {WIDTH}, {BATCH} x {TOKENS} tokens"
    for name in runs:
        value, paired = ratio(times, name)
        what = f"forward and backward over plain autograd in the same process ({base}); {paired}; {CONTENDERS[name][1]}"
        rows.append(measured(f"step, {name}{end}", what, value))
    return rows


def without_dropout() -> list[Row]:
    return compared(0.0)


def with_dropout() -> list[Row]:
    return compared(0.1)


PARTS = {f.__name__: f for f in (without_dropout, with_dropout)}


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # names that the peers use of an older torch
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")
    COMMAND = "python tests/benchmarks/reversible_peers.py --out docs/results/reversible_peers_benchmarks.json"
    run_parts(PARTS, COMMAND, __doc__, **{name: importlib.metadata.version(name) for name in PEERS})
