"""Measures what the rules cost, as ratios within one run, and writes them as JSON.

    python tests/benchmarks/run.py --out docs/results/benchmarks.json

Times are CPU time of one thread, the smallest of several interleaved repeats: other load on the machine moves them
little. Every row says what it is measured against, and the limit it should keep.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import lightning
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from memory import peak_bytes
from torch import nn
from torch.func import functional_call, jvp
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.core.directions import Directions
from lightning_bpfree.core.replay.batch import BatchCopies
from lightning_bpfree.core.replay.replay import Replay
from lightning_bpfree.core.step import Step
from lightning_bpfree.training.module_state import ModuleState
from lightning_bpfree.training.step_swap import with_injected_gradients


class Classifier(pl.LightningModule):
    """The training step that is measured: forward, cross-entropy, one logged value."""

    def __init__(self, net: nn.Module, lr: float = 0.0) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def mlp(width: int = 1000, depth: int = 2, inputs: int = 784) -> nn.Module:
    """784-1000-1000-10 by default: 1.8 M parameters."""
    layers: list[nn.Module] = [nn.Linear(inputs, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def cnn() -> nn.Module:
    """Two convolutions on 28x28."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip


class Checkpointed(nn.Module):
    """The same stack, whose backward pass recomputes it in sqrt(depth) segments: the rival of every memory claim."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net, self.segments = net, max(2, round(len(net) ** 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint_sequential(self.net, self.segments, x, use_reentrant=False)


class Transformer(nn.Module):
    """Rows of the image as tokens, two layers, no dropout."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True)
        self.embed, self.body, self.head = nn.Linear(28, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x.view(-1, 28, 28))).mean(1))


def batch(size: int, inputs: int = 784) -> list[torch.Tensor]:
    return [torch.randn(size, inputs), torch.randint(0, 10, (size,))]


def seconds(runs: dict[str, Callable[[], object]], repeats: int = 15) -> dict[str, float]:
    """CPU seconds of every function: the smallest of interleaved repeats."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats + 2):  # two rounds warm up
        for name, run in runs.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def estimator(rule: bpf.TrainingRule, module: pl.LightningModule, data: list[torch.Tensor]) -> Callable[[], None]:
    """One whole step of the rule as the Trainer runs it: estimate, hand over, backward."""
    state = ModuleState(module, None)

    def step() -> None:
        state.refresh()
        replay, args = (state.replay() if rule.reevaluates else None), (data, 0)
        made = Step(module, module.training_step, state.slots, 7, args=args, replay=replay, quiet=state.quiet)
        loss = with_injected_gradients(made, rule.estimate(made), [])
        made.finish()
        module.zero_grad()
        loss.backward()

    module.log = lambda *a, **k: None  # type: ignore[method-assign]  # there is no Trainer here
    return step


def plain_forward(module: pl.LightningModule, data: list[torch.Tensor]) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            module.training_step(data, 0)

    return forward


def backprop(module: pl.LightningModule, data: list[torch.Tensor]) -> Callable[[], None]:
    def step() -> None:
        module.zero_grad()
        module.training_step(data, 0).backward()

    return step


def row(name: str, what: str, value: float, limit: float | None = None, unit: str = "x") -> dict[str, object]:
    reached = None if limit is None else bool(round(value, 3) <= limit)  # a few scalars beside the tensors do not count
    print(f"{name:<44} {value:8.3f} {unit:<4} limit {limit} {'' if reached is None else 'ok' if reached else 'MISSED'}")
    return {"name": name, "unit": unit, "value": round(value, 4), "limit": limit, "reached": reached, "what": what}


def backprop_overhead() -> list[dict[str, object]]:
    """The callback around plain backprop, per step of a small network in a real Trainer."""
    steps = 400
    data = DataLoader(TensorDataset(torch.randn(steps * 8, 64), torch.randint(0, 10, (steps * 8,))), batch_size=8)

    def fit(*callbacks: pl.Callback) -> Callable[[], object]:
        module = Classifier(mlp(128, 1, 64), lr=0.01)
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=list(callbacks), **options
        )
        return lambda: trainer.fit(module, data)

    best = seconds({"plain": lambda: fit()(), "rule": lambda: fit(bpf.Backprop())()}, repeats=8)
    extra = (best["rule"] - best["plain"]) / steps * 1000
    what = f"milliseconds a step over plain Lightning ({best['plain'] / steps * 1000:.3f} ms a step)"
    return [row("backprop callback, overhead a step", what, extra, 0.2, "ms")]


def guards() -> list[dict[str, object]]:
    """What puts back module and batch between the evaluations of a step, random streams aside, over one forward."""
    module, data = Classifier(mlp()), batch(128)
    module.log = lambda *a, **k: None  # type: ignore[method-assign]  # there is no Trainer here
    state = ModuleState(module, None)

    def guard() -> None:
        state.refresh()
        copies, replay = BatchCopies((data, 0)), Replay([state.held], state.buffers)
        replay.rewind()
        copies.original()
        replay.keep()
        replay.rewind()
        copies.fresh()
        replay.finish()

    best = seconds({"guard": lambda: [guard() for _ in range(20)], "f": plain_forward(module, data)}, repeats=20)
    what = "module and batch are put back once, over one forward of the 1.8 M parameter MLP, batch 128"
    return [row("guards of a step", what, best["guard"] / 20 / best["f"], 0.02)]


def baselines() -> list[dict[str, object]]:
    """What a step takes, in forwards, with backprop and checkpointed backprop beside the rules."""
    module, data = Classifier(mlp(128, 32, 128)), batch(256, 128)
    runs = {
        "forward gradient K=1": estimator(bpf.ForwardGradient(1), module, data),
        "zeroth order K=1": estimator(bpf.ZerothOrder(1), module, data),
        "backprop": backprop(module, data),
        "checkpointed backprop": backprop(Classifier(Checkpointed(module.net)), data),
    }
    best = seconds({"f": plain_forward(module, data), **runs}, repeats=20)
    what = "forwards a step, MLP of 32 hidden layers of 128, batch 256"
    return [row(f"time of a step, {name}", what, best[name] / best["f"], unit="F") for name in runs]


def forward_gradient_one() -> list[dict[str, object]]:
    """One direction against a bare torch.func.jvp that draws its direction and makes its gradient too."""
    rows = []
    for name, net, size in (("mlp", mlp(), 128), ("cnn", cnn(), 64), ("transformer", Transformer(), 64)):
        module, data = Classifier(net), batch(size)
        params = {n: p.detach() for n, p in net.named_parameters()}

        def bare(net: nn.Module = net, data: list[torch.Tensor] = data, params: dict = params) -> None:
            with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                v = {n: torch.randn_like(p) for n, p in params.items()}
                loss = lambda p: F.cross_entropy(functional_call(net, p, (data[0],)), data[1])  # noqa: E731
                _, slope = jvp(loss, (params,), (v,))
                for n, p in net.named_parameters():
                    p.grad = v[n] * slope

        best = seconds(
            {"bare": bare, "rule": estimator(bpf.ForwardGradient(), module, data), "f": plain_forward(module, data)}
        )
        what = f"one direction over a bare torch.func.jvp of the same step ({best['bare'] / best['f']:.2f} forwards), {name}"
        rows.append(row(f"forward gradient K=1, {name}", what, best["rule"] / best["bare"], 1.05))
    return rows


def forward_gradient_many(num: int = 8) -> list[dict[str, object]]:
    rows = []
    for name, net, size in (("mlp", mlp(), 512), ("cnn", cnn(), 64), ("transformer", Transformer(), 64)):
        module, data = Classifier(net), batch(size)
        rule = bpf.ForwardGradient(num)
        params = {n: p.detach() for n, p in module.named_parameters()}
        noise = Directions(params, num, 0)
        best = seconds(
            {
                "f": plain_forward(module, data),
                "rule": estimator(rule, module, data),
                "noise": lambda noise=noise: noise.combine([1.0] * num),
            },
            repeats=8,
        )
        ratio = best["rule"] / best["f"] / (1 + 2 * num)
        without = (best["rule"] - best["noise"]) / best["f"] / (1 + 2 * num)
        what = (
            f"{num} directions over (1 + 2 K) forwards, chunk {rule._chunk_used}, {name}; {without:.2f} without "
            "drawing the directions"
        )
        rows.append(row(f"forward gradient K={num}, {name}", what, ratio, 1.2))
    return rows


def zeroth_order() -> list[dict[str, object]]:
    """Steps against their forwards plus one pass of noise each, on 1.8 M parameters."""
    rows = []
    module, data = Classifier(mlp()), batch(256)
    params = {n: p.detach() for n, p in module.named_parameters()}

    def noise() -> None:
        generator = torch.Generator().manual_seed(0)
        for p in params.values():
            torch.empty_like(p).normal_(generator=generator)

    rules = {
        "central K=1": (bpf.ZerothOrder(1), 3),
        "central K=4": (bpf.ZerothOrder(4), 9),
        "forward K=4": (bpf.ZerothOrder(4, scheme="forward"), 5),
    }
    runs = {name: estimator(rule, module, data) for name, (rule, _) in rules.items()}
    best = seconds({"f": plain_forward(module, data), "noise": noise, **runs}, repeats=10)
    for name, (_, forwards) in rules.items():
        ratio = best[name] / (forwards * (best["f"] + best["noise"]))
        what = f"{forwards} forwards and a pass of noise each (noise: {best['noise'] / best['f']:.2f} forwards), MLP of 1.8 M parameters"
        rows.append(row(f"zeroth order {name}", what, ratio, 1.10))
    return rows


def memory() -> list[dict[str, object]]:
    """Peak of live tensors over inference and one copy of the batch, in copies of the parameters, at three depths."""
    rows = []
    for depth in (2, 8, 32):
        module, data = Classifier(mlp(128, depth, 128)), batch(256, 128)
        size = sum(p.nbytes for p in module.parameters())
        base = peak_bytes(plain_forward(module, data)) + sum(tensor.nbytes for tensor in data)
        module.log = lambda *a, **k: None  # type: ignore[method-assign]

        again = Classifier(Checkpointed(module.net))
        again.log = module.log  # type: ignore[method-assign]

        for name, run in {
            "zeroth order K=1": estimator(bpf.ZerothOrder(1), module, data),
            "zeroth order K=8": estimator(bpf.ZerothOrder(8), module, data),
            "forward gradient K=1": estimator(bpf.ForwardGradient(1), module, data),
            "backprop": backprop(module, data),
            "checkpointed backprop": backprop(again, data),
        }.items():
            module.zero_grad()
            copies = (peak_bytes(run) - base) / size
            limit = 2.0 if name.startswith("zeroth") else None
            what = f"peak of live tensors above inference and one copy of the batch, in copies of the parameters, {depth} hidden layers of 128"
            rows.append(row(f"memory, {name}, depth {depth}", what, copies, limit, "copies"))
    return rows


def cosine() -> list[dict[str, object]]:
    """Mean cosine of the estimate against sqrt(K / (K + d + 1))."""
    rows = []
    for num in (10, 100):
        torch.manual_seed(0)
        module = Classifier(mlp(40, 1, 64))
        d = sum(p.numel() for p in module.parameters())
        data = DataLoader(TensorDataset(torch.randn(3200, 64), torch.randint(0, 10, (3200,))), batch_size=8)
        alignment = bpf.GradientAlignment(every_n_steps=1, per_layer=False)
        trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                             enable_model_summary=False, accelerator="cpu", callbacks=[bpf.ForwardGradient(num), alignment], log_every_n_steps=1)  # fmt: skip
        trainer.fit(module, data)
        theory = (num / (num + d + 1)) ** 0.5
        what = f"distance of the mean cosine ({alignment.mean_cosine:.4f}, 400 steps) from sqrt(K/(K+d+1)) = {theory:.4f}, d = {d}"
        rows.append(row(f"cosine, K={num}", what, abs(alignment.mean_cosine / theory - 1), 0.05, ""))
    return rows


class _Bytes(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.path.write_text(str(trainer.strategy.bytes_sent / trainer.global_step))


def bytes_on_the_wire(num: int = 8) -> list[dict[str, object]]:
    """What a rank sends in a step, for a small and a large network."""
    sent = {}
    for width in (8, 512):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bytes"
            module = Classifier(mlp(width, 1, 64))
            data = DataLoader(TensorDataset(torch.randn(64, 64), torch.randint(0, 10, (64,))), batch_size=8)
            strategy = bpf.ScalarSyncStrategy(start_method="fork")
            pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                       accelerator="cpu", devices=2, strategy=strategy, callbacks=[bpf.ZerothOrder(num), _Bytes(path)]).fit(module, data)  # fmt: skip
            sent[sum(p.numel() for p in module.parameters())] = float(path.read_text())
    (small, few), (large, many) = sent.items()
    what = f"bytes a rank and step, K = {num}, 2 ranks, {large:,} parameters over {small:,} (gradients would be {4 * large:,} bytes)"
    return [
        row("scalar sync, bytes a step", what, many, 4.0 * num, "B"),
        row("scalar sync, large over small network", "bytes a step, must not depend on the network", many / few, 1.0),
    ]


PARTS = {f.__name__: f for f in (bytes_on_the_wire, memory, backprop_overhead, guards, baselines, forward_gradient_one, forward_gradient_many, zeroth_order, cosine)}  # fmt: skip


def write(rows: list[dict[str, object]], command: str, out: Path | None, **versions: str) -> None:
    """Write rows with everything that is needed to measure them again."""
    result = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "seed": 0,
        "device": f"CPU, one thread, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "lightning_bpfree": bpf.__version__,
            **versions,
        },
        "rows": rows,
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def run_parts(
    parts: Mapping[str, Callable[[], list[dict[str, object]]]], command: str, doc: str | None, **versions: str
) -> None:
    """Run the parts of a benchmark that the command line names, write the file, and say which goals were missed."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--only", nargs="*", choices=list(parts), default=list(parts))
    parser.add_argument("--keep", action="store_true", help="rows of the file that no chosen part makes stay in it")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [made for name in chosen.only for made in parts[name]()]
    if chosen.keep and chosen.out is not None and chosen.out.exists():
        before = json.loads(chosen.out.read_text(encoding="utf-8"))["rows"]
        rows = list({str(made["name"]): made for made in [*before, *rows]}.values())
    write(rows, command, chosen.out, **versions)
    missed = [str(made["name"]) for made in rows if made["reached"] is False]
    print(f"missed: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    run_parts(PARTS, "python tests/benchmarks/run.py --out docs/results/benchmarks.json", __doc__)
