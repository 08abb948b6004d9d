"""Measures gradients through a diffusion sampler: how exact they are, and what they take in memory and time.

    python tests/benchmarks/diffusion.py --out docs/results/diffusion_benchmarks.json

(or part by part, with ``--keep --only PART``). A random UNet with cross attention, DDIM steps, gradients by noise, conditioning and all weights. Memory is the most
bytes of tensors alive in forward and backward, without parameters and the sums of their gradients. Times are CPU time
of one thread: medians of the ratios over rounds that run all gradients. ``torchdiffeq`` is its ``odeint_adjoint`` with
Euler steps, all states kept, as AdjointDPM's released code calls it; ``checkpoint`` is ``torch.utils.checkpoint`` around
each evaluation; ``truncated`` differentiates the last step alone.
"""

from __future__ import annotations

import importlib.metadata
from functools import partial

import torch
from diffusion_cases import KINDS, TextUNet, gradients, sampled, step
from memory import peak_bytes
from reversible_meters import Row, distance, measured, ratio, rounds
from run import run_parts

STEPS, BATCH = (5, 20, 50, 100), 4
MIB = 2**20
ROUNDS = {5: 11, 20: 7, 50: 4, 100: 3}


def exactness() -> list[Row]:
    """Relative errors of the exact adjoint against autograd through the same solver, in float64."""
    rows = []
    net = TextUNet((4, 8), 8).double()
    noise, embeds = net.inputs(2, torch.float64)
    for solver in ("euler", "midpoint", "heun", "rk4", "dpmpp_2m"):
        kinds = {
            kind: gradients(net, noise, embeds, step(net, noise, embeds, kind, 10, solver))
            for kind in ("direct", "exact_adjoint")
        }
        for name, true in kinds["direct"].items():
            what = "relative L2 distance from autograd through the same solver, float64, 10 steps"
            error = distance(kinds["exact_adjoint"][name], true)
            rows.append(measured(f"error of exact_adjoint, {solver}, by {name}", what, error, 1e-10, ""))
    return rows


def bias() -> list[Row]:
    """How far the continuous adjoint is from the gradient of the solver, and its cosine."""
    rows = []
    net = TextUNet((4, 8), 8).double()
    noise, embeds = net.inputs(2, torch.float64)
    for solver in ("euler", "midpoint", "rk4"):
        for steps in (5, 10, 20, 50, 100):
            true, found = (
                gradients(net, noise, embeds, step(net, noise, embeds, kind, steps, solver))
                for kind in ("direct", "adjoint")
            )
            for name in true:
                cosine = float(torch.cosine_similarity(found[name], true[name], 0))
                what = f"relative L2 distance from the gradient of the solver, float64, random weights; cosine {cosine:.5f}"
                rows.append(
                    measured(
                        f"bias of adjoint, {solver}, {steps} steps, by {name}",
                        what,
                        distance(found[name], true[name]),
                        unit="",
                    )
                )
    return rows


def memory() -> list[Row]:
    """Most bytes alive, at every number of steps."""
    rows, most = [], {}
    net = TextUNet()
    noise, embeds = net.inputs(BATCH)
    where = f"most alive in forward and backward, batch {BATCH}, {sum(p.numel() for p in net.parameters()):,} weights"
    for steps in STEPS:
        for kind in KINDS:
            run = step(net, noise, embeds, kind, steps)
            run()  # so that gradients have their tensors
            most[kind, steps] = peak_bytes(run) / MIB
            rows.append(measured(f"memory, {kind}, {steps} steps", where, most[kind, steps], unit="MiB"))
    state = noise.nbytes / MIB
    for kind in KINDS:
        grown = (most[kind, STEPS[-1]] - (STEPS[-1] - STEPS[0]) * state * (kind != "direct")) / most[kind, STEPS[0]]
        what = f"activations must not grow; the states of the solve, {state:.3f} MiB a step, are taken off"
        limit = 1.05 if kind in ("exact_adjoint", "adjoint") else None
        rows.append(
            measured(
                f"memory, {kind}, {STEPS[-1]} over {STEPS[0]} steps", what if limit else "for comparison", grown, limit
            )
        )
    return rows


def times(steps: int) -> list[Row]:
    """Forward and backward over direct backprop."""
    rows = []
    net = TextUNet()
    noise, embeds = net.inputs(BATCH)
    order = ("direct", *(kind for kind in KINDS if kind != "direct"))
    found = rounds({kind: step(net, noise, embeds, kind, steps) for kind in order}, ROUNDS[steps])
    base = f"direct takes {min(found['direct']) * 1000:.0f} ms, batch {BATCH}, {ROUNDS[steps]} rounds"
    for kind in KINDS:
        value, paired = ratio(found, kind, "direct")
        limit = 1.4 if kind in ("exact_adjoint", "adjoint") else None
        what = f"forward and backward over direct ({base}); {paired}"
        rows.append(measured(f"time, {kind}, {steps} steps", what, value, limit))
    return rows


def bound() -> list[Row]:
    """What an exact gradient without stored activations takes at least: every evaluation twice, and a backward pass.

    The last evaluation is made once. Of a small batch, a larger share is Python's, which a backward pass has not.
    """
    net, rows, steps = TextUNet(), list[Row](), 20
    for batch in (BATCH // 2, BATCH):
        noise, embeds = net.inputs(batch)
        forward = torch.no_grad()(sampled(net, noise, embeds, steps))
        kinds = ("direct", "exact_adjoint", "adjoint")
        found = rounds({"forward": forward, **{k: step(net, noise, embeds, k, steps) for k in kinds}}, 7)
        share, paired = ratio(found, "forward", "direct")
        what = f"1 + (1 - 1/N) F / (F + B), F sampling without a graph, F + B direct; {paired}"
        rows.append(measured(f"bound of time, batch {batch}, {steps} steps", what, 1 + share * (1 - 1 / steps)))
        for kind in kinds[1:]:
            value, paired = ratio(found, kind, "direct")
            rows.append(measured(f"beside the bound, {kind}, batch {batch}, {steps} steps", paired, value))
    return rows


def precision() -> list[Row]:
    """Cosines of the gradient under bfloat16 autocast with that in float32."""
    rows = []
    net = TextUNet((4, 8), 8)
    noise, embeds = net.inputs(4)
    run = step(net, noise, embeds, "exact_adjoint", 20)
    true = gradients(net, noise, embeds, run)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(net, noise, embeds, run)
    for name in true:
        away = 1 - float(torch.cosine_similarity(found[name], true[name], 0))
        what = "1 - cosine with float32, exact_adjoint, 20 steps, tiny UNet"
        rows.append(measured(f"bfloat16 autocast, by {name}", what, away, 1e-3, ""))
    return rows


PARTS = {
    **{f.__name__: f for f in (exactness, bias, memory, precision)},
    **{f"times_{steps}": partial(times, steps) for steps in STEPS},
    "bound": bound,
}


if __name__ == "__main__":
    COMMAND = "python tests/benchmarks/diffusion.py --out docs/results/diffusion_benchmarks.json"
    LIBRARIES = ("diffusers", "torchdiffeq")
    run_parts(PARTS, COMMAND, __doc__, **{name: importlib.metadata.version(name) for name in LIBRARIES})
