"""Trains the three applications of AdjointDPM by several gradients and seeds, and compares the gradients where they begin.

    python tests/benchmarks/diffusion_study.py --model runs/digit_diffusion --out docs/results/adjoint_dpm.json

``--model`` is what ``bpfree fit -c papers/adjoint_dpm_pretrain`` has written. Every run is its recipe with an overlay:
the same steps, the same learning rate, the same noise for all gradients of a seed; ``exact_adjoint`` and ``adjoint``
cost the same. Figures are test metrics before and after, on noise that training does not draw (but for ``noise``, where
the optimised noise itself is judged), and the reward of each training step. Images of seed 0 go to ``--images``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from memory import peak_bytes

from lightning_bpfree.cli.common.configured import ConfigCLI
from lightning_bpfree.cli.common.recipes import with_paths
from lightning_bpfree.methods.diffusion_adjoint.fine_tuning import RewardFineTuning
from lightning_bpfree.methods.diffusion_adjoint.image_grids import image_grid

TASKS = {
    "noise": ("exact_adjoint", "adjoint"),
    "embedding": ("exact_adjoint", "adjoint", "truncated"),
    "weights": ("exact_adjoint", "adjoint", "evolution_strategy"),
}
RULES = ("direct", "exact_adjoint", "adjoint", "checkpoint", "truncated")
SHOWN = 20  # images


class Curve(Callback):
    """The reward of each training step."""

    def __init__(self) -> None:
        self.rewards: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rewards.append(round(float(trainer.callback_metrics["train_reward"]), 5))


def built(task: str, overlay: str, seed: int, model: Path, folder: str) -> ConfigCLI:
    """The recipe's module and Trainer."""
    files = [
        f"papers/adjoint_dpm_{task}",
        *([f"papers/adjoint_dpm_{task}/{overlay}"] if overlay != "exact_adjoint" else []),
    ]
    arguments = [word for file in files for word in ("-c", file)]
    table = "no_class" if task == "embedding" else "embeddings"
    own = {"pipeline": model, "embeddings": model / f"{table}.safetensors", "image_every": 0}
    arguments += ["--seed_everything", str(seed), "--trainer.logger", "false", "--trainer.default_root_dir", folder]
    arguments += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    arguments += ["--trainer.enable_checkpointing", "false", "--trainer.limit_val_batches", "0"]
    for name, value in own.items():
        arguments += [f"--model.init_args.{name}", str(value)]
    return ConfigCLI(with_paths(arguments), run=False)


def one_run(task: str, gradient: str, seed: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Metrics before and after, and the curve."""
    with tempfile.TemporaryDirectory() as folder:
        cli = built(task, gradient, seed, chosen.model, folder)
        module, trainer, curve = cli.model, cli.trainer, Curve()
        trainer.callbacks.append(curve)
        before = trainer.test(module, verbose=False)[0]
        pictures = [show(module)]
        start = time.process_time()
        trainer.fit(module)
        seconds = time.process_time() - start
        after = trainer.test(module, verbose=False)[0]
        pictures.append(show(module))
    if seed == chosen.seeds[0] and chosen.images:
        chosen.images.mkdir(parents=True, exist_ok=True)
        for when, picture in zip(("before", "after"), pictures, strict=True):
            picture.save(chosen.images / f"adjoint_dpm_{task}_{gradient}_{when}.png")
    found = {"task": task, "gradient": gradient, "seed": seed, "before": before, "after": after}
    print(task, gradient, seed, f"{seconds:.0f} s", before, after, flush=True)
    return {**found, "seconds": seconds, "rewards": curve.rewards}


def show(module: RewardFineTuning) -> Any:
    """Some samples of the test."""
    rows = min(SHOWN, module.batch_size) if module.optimize == "noise" else SHOWN
    with torch.no_grad(), module.averaged():
        return image_grid(module(torch.arange(rows), "test"))


def rules_of(task: str, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """The gradients of the first step, compared with autograd's, and what they take."""
    with tempfile.TemporaryDirectory() as folder:
        module = built(task, "exact_adjoint", chosen.seeds[0], chosen.model, folder).model
    module.log = lambda *_, **__: None
    module.prior = None  # beside the reward's gradient
    steps = 10  # as the recipes' callbacks say
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:  # off the point where half of a LoRA has no gradient
        parameter.data += 0.02 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )
    index, true, rows = torch.arange(module.batch_size), torch.zeros(()), []
    base = 0.0
    for rule in RULES:
        if rule == "truncated" and task == "noise":
            continue
        settings = module.sampler.settings._replace(gradient=rule, num_steps=steps)

        def step(settings: Any = settings) -> None:
            with module.sampler.using(settings):
                module.training_step(index, 0).backward()

        module.zero_grad()
        step()
        found = torch.cat([p.grad.flatten() for p in trained])
        true = found if rule == "direct" else true
        seconds = min(timed(step) for _ in range(3))
        base = seconds if rule == "direct" else base
        rows.append(
            {
                "task": task,
                "gradient": rule,
                "cosine": float(torch.cosine_similarity(found.double(), true.double(), 0)),
                "error": float((found - true).norm() / true.norm()),
                "time": seconds / base,
                "peak_mib": peak_bytes(step) / 2**20,
            }
        )
        print(rows[-1], flush=True)
    return rows


def timed(step: Any) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and half width of the 95 % confidence interval of every metric, over seeds."""
    rows = []
    for task, gradient in dict.fromkeys((run["task"], run["gradient"]) for run in runs):
        of = [run for run in runs if (run["task"], run["gradient"]) == (task, gradient)]
        for name in of[0]["after"]:
            for when in ("before", "after"):
                values = [run[when][name] for run in of]
                half = (
                    STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
                    if len(values) > 1
                    else None
                )
                metric = name.removeprefix("test_")
                rows.append(
                    {
                        "task": task,
                        "gradient": gradient,
                        "metric": metric,
                        "when": when,
                        "mean": statistics.mean(values),
                        "ci95": half,
                    }
                )
    return rows


STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; runs that it has are kept")
    parser.add_argument("--images", type=Path, help="folder for images of the first seed")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", choices=list(TASKS), default=list(TASKS))
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    kept = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.out.exists() else {"runs": [], "rules": []}
    runs, rules = list(kept["runs"]), list(kept["rules"])
    for task in chosen.only:
        if not any(row["task"] == task for row in rules):
            rules += rules_of(task, chosen)
        for gradient in TASKS[task]:
            for seed in chosen.seeds:
                if not any((r["task"], r["gradient"], r["seed"]) == (task, gradient, seed) for r in runs):
                    runs.append(one_run(task, gradient, seed, chosen))
                    save(chosen, runs, rules)
    save(chosen, runs, rules)


def save(chosen: argparse.Namespace, runs: list[dict[str, Any]], rules: list[dict[str, Any]]) -> None:
    """Write what there is so far."""
    names = ("torch", "lightning", "diffusers", "peft", "scikit-learn")
    found = {
        "command": "python tests/benchmarks/diffusion_study.py --model runs/digit_diffusion --out docs/results/adjoint_dpm.json",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}},
        "device": "cpu, 1 thread",
        "seeds": chosen.seeds,
        "summary": summary(runs),
        "rules": rules,
        "runs": runs,
    }
    chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
