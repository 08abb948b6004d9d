"""Measures reversible models on a CUDA device: throughput and memory of every schedule, at batches that double.

    python tests/benchmarks/reversible_gpu.py --out docs/results/reversible_gpu.json    # about 45 minutes
    python tests/benchmarks/reversible_gpu.py --out docs/results/reversible_gpu.json --append --only throughput --models swin --minutes 9
    python tests/benchmarks/reversible_gpu.py --small --out docs/results/reversible_gpu.json    # about two minutes
    python tests/benchmarks/reversible_gpu.py --cpu    # tiny models on the CPU: tests this script, measures nothing

It needs this repository, torch and Lightning. First comes a race test: streams are held up in some blocks, and the
gradients of ``"parallel"`` must be those of ``"sequential"`` bit for bit; the exit status is 1 if they are not, and
nothing is measured.

A step is forward and backward without an optimizer, in training mode, on random data that is on the device. Schedules
take turns; times are CUDA events around blocks of steps, after steps to warm up with an empty cache, and their
median. Memory is the most of such a block, with parameters and gradients. Batches double until all schedules are out of
memory, a step takes ``--longest`` seconds, or ``--minutes`` are over. The models are ViT; Swin without relative
positions and masks of shifted windows, whose stages are reversible stacks with ordinary transitions between them;
RoBERTa, pre-norm, with its head on 15 % of the tokens; all with dropout of 0.1.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package need not be installed

import torch
from reversible_gpu_models import CONFIGS, MODELS, Data, Hold, RaceNet
from reversible_gpu_report import Point, Report, row
from torch import nn

from lightning_bpfree.methods.reversible_recompute.recomputation import SCHEDULES
from lightning_bpfree.methods.reversible_recompute.sequential import ReversibleSequential

PRECISIONS, PARTS = ("fp32", "bf16"), ("race", "errors", "throughput")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "buffers": {"buffer_every": 3, "max_error": 0.01},  # inputs of an odd block are kept, and compared
    "store_last": {"store_last": 2},
}


def set_schedule(net: nn.Module, schedule: Any) -> None:
    """Set the schedule of all reversible stacks of a model."""
    for module in net.modules():
        if isinstance(module, ReversibleSequential):
            module.schedule = schedule


def step(net: nn.Module, data: Data, precision: str) -> None:
    """Forward and backward."""
    net.zero_grad()
    with torch.autocast(data[0].device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = net(*data)
    loss.backward()


# --- is it right? ---


def gradient(net: nn.Module, data: Data, schedule: str, precision: str) -> torch.Tensor:
    """The whole gradient as one vector, always from the same random numbers."""
    set_schedule(net, schedule)
    torch.manual_seed(0)
    step(net, data, precision)
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def race_case(net: nn.Module, data: Data, precision: str, repeats: int) -> str | None:
    """What is wrong with the gradients of ``"parallel"``; None for nothing."""
    try:
        true, again = (gradient(net, data, "sequential", precision) for _ in range(2))
        Hold.on = True
        found = [gradient(net, data, "parallel", precision) for _ in range(repeats)]
    except RuntimeError as error:  # recovered inputs may be found to be wrong
        return str(error).splitlines()[0]
    finally:
        Hold.on = False
    if not torch.equal(true, again):
        return "sequential itself is not reproducible"
    wrong = [not torch.equal(true, one) for one in found]
    return f"{sum(wrong)} of {repeats} gradients differ" if any(wrong) else None


def race(device: torch.device, depths: tuple[int, ...] = (1, 5, 6), repeats: int = 3, batch: int = 16) -> Point:
    """Hold up streams here and there, and compare bits."""
    cases = list(itertools.product(depths, "fg", (0, 1), ("recompute", "gradients"), OPTIONS, PRECISIONS))
    failed = []
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for equal bits; read when CUDA is first used
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    for depth, branch, parity, phase, option, precision in cases:
        torch.manual_seed(0)
        net = RaceNet(depth, branch, parity, phase, **OPTIONS[option]).to(device)
        wrong = race_case(net, net.data(batch, device), precision, repeats)
        if wrong is not None:
            blocks = "odd" if parity else "even"
            failed.append(f"{phase} of {branch} held up in {blocks} of {depth} blocks, {option}, {precision}: {wrong}")
    torch.use_deterministic_algorithms(before)
    print("\n".join([*failed, f"race test: {len(failed)} of {len(cases)} cases failed"]), flush=True)
    what = f"of {len(cases)} cases, {repeats} times each: streams held up in some blocks, gradients of parallel bit-equal to those of sequential"
    return row("race test, failed cases", what, len(failed), 0, "")


def errors(kind: str, size: str, device: torch.device, batch: int) -> list[Point]:
    """How far gradients of a whole model are from autograd's, whose own kernels may sum in any order."""
    rows = []
    torch.manual_seed(0)
    net = MODELS[kind](**CONFIGS[kind][size]).to(device)
    data = net.data(batch, device)
    for precision in PRECISIONS:
        true = gradient(net, data, "autograd", precision)
        off = {}
        for schedule in SCHEDULES:
            found = gradient(net, data, schedule, precision)
            off[schedule] = float(torch.linalg.vector_norm(found - true) / torch.linalg.vector_norm(true))
        each = ", ".join(f"{schedule} {value:.2g}" for schedule, value in off.items())
        what = f"relative L2 distance of the gradient from autograd's, batch {batch}; when run again: {each}"
        rows.append(row(f"gradient error, {kind} {size} {precision}, parallel", what, off["parallel"], unit=""))
    print("\n".join(f"{made['name']}: {made['value']:.2g} ({made['what']})" for made in rows), flush=True)
    return rows


# --- how fast is it? ---


def timed(run: Callable[[], None], steps: int, warm: int, device: torch.device) -> Point:
    """Seconds a step, and memory in MiB; the latter is None on a CPU."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(warm):
        run()
    if not cuda:
        start = time.perf_counter()
        for _ in range(steps):
            run()
        return {"seconds": (time.perf_counter() - start) / steps, "allocated": None, "reserved": None}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(steps):
        run()
    end.record()
    end.synchronize()
    most = {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    seconds = begin.elapsed_time(end) / 1000 / steps
    return {"seconds": seconds, **{key: size / 2**20 for key, size in most.items()}}


def unless_full(run: Callable[[], Any]) -> Any:
    """What ``run`` returns; None if memory does not suffice."""
    try:
        return run()
    except RuntimeError as error:  # torch.OutOfMemoryError is one; cuBLAS has its own
        if not any(text in str(error) for text in ("out of memory", "ALLOC_FAILED")):
            raise
    gc.collect()  # here the error is gone, whose traceback held tensors
    torch.cuda.empty_cache()
    return None


def attempted(net: nn.Module, data: Data, schedule: str, precision: str, steps: int, warm: int) -> Point | None:
    """What ``timed`` returns; None if memory does not suffice."""
    set_schedule(net, schedule)
    net.zero_grad()
    return unless_full(lambda: timed(lambda: step(net, data, precision), steps, warm, data[0].device))


def at_batch(
    net: nn.Module, data: Data, precision: str, schedules: list[str], blocks: int, seconds: float
) -> dict[str, list[Point] | None]:
    """All schedules at one batch size, in turns; None for what is out of memory."""
    found: dict[str, list[Point] | None] = {}
    steps: dict[str, int] = {}
    for schedule in schedules:
        probe = attempted(net, data, schedule, precision, 1, 1)
        found[schedule] = None if probe is None else []
        steps[schedule] = 0 if probe is None else max(1, min(50, round(seconds / probe["seconds"])))
    for _ in range(blocks):
        for schedule in schedules:
            many = found[schedule]
            if many is not None:
                one = attempted(net, data, schedule, precision, steps[schedule], min(2, steps[schedule]))
                found[schedule] = None if one is None else [*many, one]
    return found


def point(many: list[Point] | None, batch: int) -> Point:
    """The median of the times, and the most of memory."""
    if many is None:
        return {"rate": None}
    times = [one["seconds"] for one in many]
    middle = statistics.median(times)
    most = {key: many[0][key] and round(max(one[key] for one in many), 1) for key in ("allocated", "reserved")}
    spread = round((max(times) - min(times)) / middle, 4)
    return {"rate": round(batch / middle, 3), "seconds": round(middle, 6), "spread": spread, **most}


def growing(kind: str, size: str, precision: str, chosen: argparse.Namespace, device: torch.device) -> list[Point]:
    """All schedules at batches that double."""
    torch.manual_seed(0)
    net = MODELS[kind](**CONFIGS[kind][size]).to(device)
    alive, points = list(chosen.schedules), []
    for doubling in range(chosen.doublings):
        batch = chosen.first_batch * 2**doubling
        if not alive or time.monotonic() > chosen.until:
            break
        data = unless_full(lambda batch=batch: net.data(batch, device))
        found = (
            dict.fromkeys(alive)
            if data is None
            else at_batch(net, data, precision, alive, chosen.blocks, chosen.seconds)
        )
        made = {schedule: point(many, batch) for schedule, many in found.items()}
        for schedule, one in made.items():
            where = {"model": kind, "size": size, "precision": precision, "schedule": schedule, "batch": batch}
            points.append({**where, **one})
            memory = (
                f", {one['allocated']:.0f} MiB allocated, {one['reserved']:.0f} reserved"
                if one.get("allocated")
                else ""
            )
            rate = "out of memory" if one["rate"] is None else f"{one['rate']:.1f} a second{memory}"
            print(f"{kind} {size} {precision} {schedule:<10} batch {batch:<5} {rate}", flush=True)
        alive = [schedule for schedule in alive if made[schedule]["rate"] is not None]
        if max((made[schedule]["seconds"] for schedule in alive), default=0.0) > chosen.longest:
            break
    return points


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument(
        "--append", action="store_true", help="keep what the file has of this device and these versions"
    )
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--sizes", nargs="*", choices=("tiny", "small", "base", "large"), default=("small", "base", "large")
    )
    parser.add_argument("--precisions", nargs="*", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--schedules", nargs="*", choices=SCHEDULES, default=SCHEDULES)
    parser.add_argument("--first-batch", type=int, default=8)
    parser.add_argument("--doublings", type=int, default=16, help="batch sizes at most")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of steps, whose median is taken")
    parser.add_argument("--seconds", type=float, default=0.3, help="a block of steps")
    parser.add_argument("--longest", type=float, default=1.0, help="seconds of a step after which batches do not grow")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no batch size after so many")
    parser.add_argument("--small", action="store_true", help="small models, three batch sizes")
    parser.add_argument("--cpu", action="store_true", help="tiny models on the CPU, to test this script")
    chosen = parser.parse_args()
    if chosen.small:
        chosen.sizes, chosen.first_batch, chosen.doublings = ("small",), 32, 3
    if chosen.cpu:
        chosen.sizes, chosen.first_batch, chosen.doublings, chosen.blocks, chosen.seconds = ("tiny",), 2, 2, 1, 0.0
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device; --cpu tests this script without one")
    chosen.until = time.monotonic() + 60 * chosen.minutes
    return chosen


def main() -> int:
    """Test, measure, and write the file."""
    chosen = options()
    device = torch.device("cpu" if chosen.cpu else "cuda")
    report = Report(chosen.out, device, chosen.append)
    if "race" in chosen.only:
        outcome = race(device, (2,), 1, 1) if chosen.cpu else race(device)
        report.add(checks=[outcome])
        if not outcome["reached"]:
            return 1
    if "errors" in chosen.only:
        for kind in chosen.models:
            report.add(checks=errors(kind, chosen.sizes[0], device, chosen.first_batch))
    if "throughput" in chosen.only:
        for kind, size, precision in itertools.product(chosen.models, chosen.sizes, chosen.precisions):
            report.add(growing(kind, size, precision, chosen, device))
    for made in report.rows():
        kept = {True: "ok", False: "MISSED", None: ""}[made["reached"]]
        print(f"{made['name']:<60} {made['value']:10.4g} {made['unit']} {kept}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
