"""Measures what reversible stacks take in time and memory, and how exact their gradients are, and writes it as JSON.

    python tests/benchmarks/reversible.py --out docs/results/reversible_benchmarks.json

Times are CPU time of one thread, the median over rounds that run all schedules, over plain autograd (``schedule="autograd"``) of
the same blocks in the same run: forward and backward, without an optimizer. On a CPU, ``"parallel"`` runs the operators
of ``"sequential"`` on one stream; what it gains on a GPU is measured by ``reversible_gpu.py``.
"""

from __future__ import annotations

import importlib.metadata
import math
import time
from functools import partial
from typing import Any

import torch
from reversible_meters import (
    BATCH,
    DEPTH,
    HEADS,
    TOKENS,
    WIDTH,
    Row,
    blocks,
    distance,
    gradient,
    measured,
    peak,
    ratio,
    rounds,
    saved_bytes,
    step,
    tokens,
)  # fmt: skip
from reversible_models import converted, training
from run import run_parts
from torch import nn

from lightning_bpfree.methods.reversible_recompute.conversion import convert_to_reversible
from lightning_bpfree.methods.reversible_recompute.layer_stack import buffers_for
from lightning_bpfree.methods.reversible_recompute.recomputation import Schedule
from lightning_bpfree.methods.reversible_recompute.sequential import ReversibleSequential

DEPTHS = (2, 4, 8, 16, 32, 48)
MIB = 2**20


class Backward:
    """A step whose backward pass is timed by itself; ``best`` is the least CPU time of it."""

    def __init__(self, net: nn.Module, x: torch.Tensor) -> None:
        self.net, self.x, self.best = net, x, math.inf

    def __call__(self) -> None:
        self.net.zero_grad()
        loss = self.net(self.x).square().mean()
        start = time.process_time()
        loss.backward()
        self.best = min(self.best, time.process_time() - start)


def times() -> list[Row]:
    """A step of every schedule over plain autograd."""
    rows = []
    for dropout in (0.0, 0.1):
        stack, x = blocks(DEPTH, dropout), tokens()
        nets = {str(s): ReversibleSequential(stack, s) for s in ("autograd", "checkpoint", "sequential", "parallel")}
        nets["sequential, store_last=3"] = ReversibleSequential(stack, "sequential", store_last=3)
        runs = {name: step(net, x) for name, net in nets.items()}
        backward = Backward(nets["autograd"], x)
        forward = torch.no_grad()(partial(nets["autograd"], x))
        found = rounds({"forward": forward, "backward": backward, **runs})
        base = f"{min(found['autograd']) * 1000:.0f} ms, {DEPTH} blocks of width {WIDTH}, {BATCH} x {TOKENS} tokens"
        notes = {
            "checkpoint": "; torch's checkpoint leaves out what comes after the last saved tensor of a block, which "
            "without dropout is a third of its matrix products"
        }
        for name in list(nets)[1:]:
            value, paired = ratio(found, name)
            what = f"forward and backward over plain autograd ({base}); {paired}{notes.get(name, '')}"
            limit = 1.35 if name == "sequential" else None
            rows.append(measured(f"step, {name}, dropout {dropout:g}", what, value, limit))
        over, paired = ratio(found, "sequential", "checkpoint")
        rows.append(measured(f"step, sequential over checkpoint, dropout {dropout:g}", paired, over, 1.0))
        f, b = min(found["forward"]), backward.best
        what = f"(2 F + B) / (F + B) of the same run: forward without a graph {f * 1000:.0f} ms, backward {b * 1000:.0f} ms"
        rows.append(measured(f"step, bound by theory, dropout {dropout:g}", what, (2 * f + b) / (f + b)))
    return rows


def memory() -> list[Row]:
    """Saved bytes, and most bytes alive, at every depth."""
    kinds: dict[str, tuple[Schedule, int | None]] = {
        "autograd": ("autograd", None),
        "checkpoint": ("checkpoint", None),
        "sequential": ("sequential", None),
        "parallel": ("parallel", None),
        "sequential, buffer_every=8": ("sequential", 8),
    }
    rows, saved, most = [], {}, {}
    where = f"blocks of width {WIDTH}, {BATCH} x {TOKENS} tokens, no dropout"
    for depth in DEPTHS:
        stack, x = blocks(depth), tokens()
        for kind, (schedule, every) in kinds.items():
            net = ReversibleSequential(stack, schedule, buffer_every=every)
            saved[kind, depth], most[kind, depth] = saved_bytes(net, x), peak(net, x)
            what = f"saved by the forward pass for the backward one, without parameters, {where}"
            rows.append(
                measured(f"saved memory, {kind}, depth {depth}", what, saved[kind, depth] / MIB, unit="MiB")
            )  # fmt: skip
            what = f"most alive in a step, without parameters and the sums of their gradients, {where}"
            rows.append(measured(f"peak memory, {kind}, depth {depth}", what, most[kind, depth] / MIB, unit="MiB"))
    low, high = DEPTHS[0], DEPTHS[-1]
    for kind in kinds:
        limit = 1.0 if kind in ("sequential", "parallel") else None
        grown = saved[kind, high] / saved[kind, low]
        name = f"saved memory, {kind}, depth {high} over depth {low}"
        rows.append(measured(name, "must not grow with depth" if limit else "for comparison", grown, limit))
        grown = most[kind, high] / most[kind, low]
        rows.append(measured(f"peak memory, {kind}, depth {high} over depth {low}", "for comparison", grown))
    what = f"bytes of the CPU's random state, kept before each branch that draws (two a block); a CUDA device's takes 16; {where[:-12]}"
    return [*rows, measured("random state, a branch with dropout", what, torch.get_rng_state().nbytes, unit="B")]


def gradients() -> list[Row]:
    """How far gradients are from plain autograd's, with dropout."""
    rows = []
    limits = {"float64": 1e-12, "float32": 1e-5, "bfloat16 autocast": 5e-2}
    for depth in DEPTHS:
        for kind, limit in limits.items():
            dtype = torch.float64 if kind == "float64" else torch.float32
            stack = [block.to(dtype) for block in blocks(depth, 0.1)]
            x = tokens(2, 32, dtype=dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=kind.startswith("bfloat16")):
                true, *others = (
                    gradient(ReversibleSequential(stack, schedule), x)
                    for schedule in ("autograd", "sequential", "parallel")
                )
            what = f"relative L2 distance of the whole gradient from plain autograd's, dropout 0.1, width {WIDTH}, 2 x 32 tokens"
            same = "" if torch.equal(*others) else "; NOT bit-equal to parallel"
            rows.append(measured(f"gradient error, {kind}, depth {depth}", what + same, distance(others[0], true), limit, ""))  # fmt: skip
    for depth in DEPTHS:
        # What float32 takes from a gradient in any case: the yardstick of the errors above.
        stack, x = blocks(depth), tokens(2, 32)
        low = gradient(ReversibleSequential(stack, "autograd"), x)
        double = [block.double() for block in stack]
        high = gradient(ReversibleSequential(double, "autograd"), x.detach().double().requires_grad_())
        what = "plain autograd in float32 from plain autograd in float64, no dropout: the yardstick"
        rows.append(measured(f"rounding of autograd, float32, depth {depth}", what, distance(low, high), unit=""))
    return rows


def scaled() -> list[Row]:
    """How far recovered inputs are from the true ones where skips are scaled, with and without buffers."""
    rows = []
    for scale in (1.0, 0.5, 0.1):
        every = buffers_for((scale, scale))
        for depth in (2, 4, 6, 12):
            for name, buffer_every in {"no buffers": None, f"a buffer every {every} blocks": every}.items():
                if every is None and name != "no buffers":
                    continue
                torch.manual_seed(0)
                layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, batch_first=True)
                net, x = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), tokens(2, 32)
                options: dict[str, Any] = {"rewire": "scaled", "scale": scale, "max_error": math.inf, "warn": False}
                conversion = convert_to_reversible(net, "layers", buffer_every=buffer_every, **options)
                found = gradient(net, x)
                error = conversion.stacks[0].reconstruction_error or 0.0
                conversion.stacks[0].schedule = "autograd"
                off = distance(found, gradient(net, x))
                what = f"relative error of recovered inputs, float32, whole sublayers as branches; gradient off by {off:.2g}"
                label = f"reconstruction error, scale {scale:g}, depth {depth}, {name}"
                rows.append(measured(label, what, error, 0.01 if buffer_every else None, ""))
    return rows


PARTS = {f.__name__: f for f in (times, memory, gradients, converted, training, scaled)}


if __name__ == "__main__":
    COMMAND = "python tests/benchmarks/reversible.py --out docs/results/reversible_benchmarks.json"
    LIBRARIES = ("transformers", "scikit-learn")
    run_parts(
        PARTS, COMMAND, __doc__, **{name.replace("-", "_"): importlib.metadata.version(name) for name in LIBRARIES}
    )
