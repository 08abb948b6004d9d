"""Blocks, and what is measured of them, for the benchmarks of reversible stacks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from memory import peak_bytes
from torch import nn

from lightning_bpfree.methods.reversible_recompute.sequential import ReversibleBlock

Row = dict[str, object]
Run = Callable[[], object]
WIDTH, HEADS, DEPTH, BATCH, TOKENS = 128, 4, 12, 16, 64


def measured(name: str, what: str, value: float, limit: float | None = None, unit: str = "x") -> Row:
    """A row as those of ``run.row``, in four significant digits: errors may be as small as 1e-16."""
    value = float(f"{value:.4g}")
    reached = None if limit is None else bool(value <= limit)
    print(f"{name:<60} {value:10.4g} {unit:<4} limit {limit} {'' if reached is not False else 'MISSED'}", flush=True)
    return {"name": name, "unit": unit, "value": value, "limit": limit, "reached": reached, "what": what}


class Attention(nn.Module):
    """Self-attention of the normalized input, without a skip."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)
        self.attention = nn.MultiheadAttention(width, HEADS, dropout, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.drop(self.attention(x, x, x, need_weights=False)[0])


def feed_forward(width: int = WIDTH, dropout: float = 0.0) -> nn.Sequential:
    """Two linear layers of the normalized input, without a skip."""
    inner = (nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    return nn.Sequential(nn.LayerNorm(width), *inner, nn.Dropout(dropout))


def blocks(depth: int = DEPTH, dropout: float = 0.0, width: int = WIDTH) -> list[ReversibleBlock]:
    """Pre-norm transformer layers as couplings."""
    return [ReversibleBlock(Attention(width, dropout), feed_forward(width, dropout)) for _ in range(depth)]


def tokens(batch: int = BATCH, length: int = TOKENS, width: int = WIDTH, dtype: Any = None) -> torch.Tensor:
    """An input that needs a gradient, as what comes from an embedding does."""
    return torch.randn(batch, length, width, dtype=dtype, requires_grad=True)


def step(net: nn.Module, x: torch.Tensor, keep_gradients: bool = False) -> Run:
    """Forward and backward."""

    def run() -> None:
        for tensor in (x, *net.parameters()):
            if not keep_gradients:
                tensor.grad = None
        net(x).square().mean().backward()

    return run


def rounds(runs: dict[str, Run], repeats: int = 20) -> dict[str, list[float]]:
    """CPU seconds of every function in rounds, each of which runs all of them."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(repeats + 2):  # two rounds warm up
        for name, run in runs.items():
            start = time.process_time()
            run()
            if index > 1:
                found[name].append(time.process_time() - start)
    return found


def ratio(found: dict[str, list[float]], name: str, base: str = "autograd") -> tuple[float, str]:
    """The median of the ratios in each round, which other load moves little, and the ratio of the smallest times."""
    paired = statistics.median(a / b for a, b in zip(found[name], found[base], strict=True))
    return (
        paired,
        f"median of the ratios in each round; of the smallest times {min(found[name]) / min(found[base]):.3f}",
    )


def peak(net: nn.Module, x: torch.Tensor) -> int:
    """Most bytes of tensors alive in a step, without parameters and the sums of their gradients, which are there."""
    run = step(net, x, keep_gradients=True)
    if any(tensor.grad is None for tensor in (x, *net.parameters())):
        run()
    return peak_bytes(run)


def saved_bytes(net: nn.Module, x: torch.Tensor) -> int:
    """Bytes that the forward pass saves for the backward one: each storage once, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(x)
    del out  # until here the graph keeps what was saved, so that no address is used twice
    return sum(found.values())


def gradient(net: nn.Module, x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The gradient of the input and of all parameters as one vector."""
    torch.manual_seed(seed)
    step(net, x)()
    grads = [tensor.grad for tensor in (x, *net.parameters())]
    return torch.cat([grad.flatten().double() for grad in grads if grad is not None])


def distance(vector: torch.Tensor, true: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float(torch.linalg.vector_norm(vector - true) / torch.linalg.vector_norm(true))
