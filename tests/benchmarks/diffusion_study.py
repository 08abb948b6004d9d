"""Trains the three applications of AdjointDPM by several gradients and seeds, and compares the gradients where they begin.

    python tests/benchmarks/diffusion_study.py --model runs/digit_diffusion --out docs/results/adjoint_dpm.json

``--model`` is what ``bpfree fit -c papers/adjoint_dpm_pretrain`` has written. Every run is its recipe with an overlay:
the same steps and the same noise for all gradients of a seed; ``exact_adjoint`` and ``adjoint`` cost the same. Each
rule of each task has the learning rate of a grid around the recipe's that reached the highest objective (test reward
less the prior of the last steps, as far as the recipe has one) in half of the steps, in the mean over seeds of its own
(``TUNING_SEEDS``); the grid goes on where the best is at its end. ``noise_30`` is not tuned: all gradients have the
recipe's learning rate. Figures are test metrics before and after, on noise that training does not draw (but for ``noise``, where the optimized noise itself is
judged), and the reward of each training step. Images of the first seed go to ``--images``. ``--part i/n`` runs every
n-th of the missing runs, so that a long study can be made in pieces.
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
from lightning_bpfree.cli.compare.results import confidence
from lightning_bpfree.demos.diffusion_tasks.digit_rewards import digits
from lightning_bpfree.methods.diffusion_adjoint.callback import DiffusionAdjoint
from lightning_bpfree.methods.diffusion_adjoint.fine_tuning import RewardFineTuning
from lightning_bpfree.methods.diffusion_adjoint.image_grids import image_grid

TASKS = {
    "noise": ("exact_adjoint", "adjoint"),
    "embedding": ("exact_adjoint", "adjoint", "truncated"),
    "weights": ("exact_adjoint", "adjoint", "truncated", "evolution_strategy"),
    "noise_30": ("exact_adjoint", "adjoint"),  # by as many steps as the audit in the paper's code
}
GRID, TUNING_SEEDS = (1 / 3, 1.0, 3.0), (100, 101)  # factors of the recipe's learning rate
WIDER = ((1 / 3, 1 / 9), (1 / 9, 1 / 27), (3.0, 9.0), (9.0, 27.0))  # where the best is the first, try the second too
RULES = ("direct", "exact_adjoint", "adjoint", "checkpoint", "truncated")
STEPS, BIAS_STEPS = 10, (10, 20, 50, 100)  # of the recipes' callbacks; where the adjoint is compared
SHOWN, LAST = 20, 5  # images; steps over which a prior is averaged


class Curve(Callback):
    """The reward and the weighted prior of each training step."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.priors: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rewards.append(round(float(trainer.callback_metrics["train_reward"]), 5))
        self.priors.append(pl_module.prior_weight * float(trainer.callback_metrics.get("prior", 0.0)))


def built(task: str, overlay: str, seed: int, model: Path, folder: str, factor: float = 1.0) -> ConfigCLI:
    """The recipe's module and Trainer, with a factor of its learning rate; half as many epochs to tune that."""
    task, _, steps = task.partition("_")
    files = [
        f"papers/adjoint_dpm_{task}",
        *([f"papers/adjoint_dpm_{task}/{overlay}"] if overlay != "exact_adjoint" else []),
    ]
    arguments = [word for file in files for word in ("-c", file)]
    table = "no_class" if task == "embedding" else "embeddings"
    own = {"pipeline": model, "embeddings": model / f"{table}.safetensors", "image_every": 0}
    own |= {"num_steps": int(steps)} if steps else {}
    arguments += ["--seed_everything", str(seed), "--trainer.logger", "false", "--trainer.default_root_dir", folder]
    arguments += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    arguments += ["--trainer.enable_checkpointing", "false", "--trainer.limit_val_batches", "0"]
    for name, value in own.items():
        arguments += [f"--model.init_args.{name}", str(value)]
    cli = ConfigCLI(with_paths(arguments), run=False)
    cli.model.lr *= factor  # read when the fit makes its optimizer
    if steps:
        others = [one for one in cli.trainer.callbacks if not isinstance(one, DiffusionAdjoint)]
        cli.trainer.callbacks = [*others, DiffusionAdjoint(overlay, int(steps), "euler")]
    if seed in TUNING_SEEDS:
        cli.trainer.fit_loop.max_epochs //= 2
    return cli


def one_run(task: str, gradient: str, seed: int, factor: float, chosen: argparse.Namespace) -> dict[str, Any]:
    """Metrics before and after, and the curve."""
    with tempfile.TemporaryDirectory() as folder:
        cli = built(task, gradient, seed, chosen.model, folder, factor)
        module, trainer, curve = cli.model, cli.trainer, Curve()
        trainer.callbacks.append(curve)
        before = trainer.test(module, verbose=False)[0]
        pictures = [show(module)]
        start = time.process_time()
        trainer.fit(module)
        seconds = time.process_time() - start
        after = trainer.test(module, verbose=False)[0]
        pictures.append(show(module))
    if seed == chosen.seeds[0] and chosen.images:  # those of the tuning are not shown
        chosen.images.mkdir(parents=True, exist_ok=True)
        for when, picture in zip(("before", "after"), pictures, strict=True):
            picture.save(chosen.images / f"adjoint_dpm_{task}_{gradient}_{when}.png")
        if task == "embedding":
            reference = digits("test")[0][[module.reward.index]]
            image_grid(reference).save(chosen.images / f"adjoint_dpm_{task}_reference.png")
    found = {"task": task, "gradient": gradient, "seed": seed, "lr": float(f"{module.lr:.3g}"), "factor": factor}
    print(task, gradient, seed, module.lr, f"{seconds:.0f} s", before, after, flush=True)
    objective = after["test_reward"] - statistics.mean(curve.priors[-LAST:])
    run = {**found, "before": before, "after": after, "objective": objective, "seconds": seconds}
    return {**run, "rewards": curve.rewards}


def best(tuning: list[dict[str, Any]], task: str, gradient: str) -> float:
    """The factor of the learning rate with the highest mean objective of the grid; NaN counts as the lowest."""
    objectives: dict[float, list[float]] = {}
    for row in tuning:
        if (row["task"], row["gradient"]) == (task, gradient):
            value = row["objective"]
            objectives.setdefault(row["factor"], []).append(-math.inf if math.isnan(value) else value)
    if not objectives:
        return 1.0
    return max(objectives, key=lambda factor: statistics.mean(objectives[factor]))


def show(module: RewardFineTuning) -> Any:
    """Some samples of the test."""
    rows = min(SHOWN, module.batch_size) if module.optimize == "noise" else SHOWN
    with torch.no_grad(), module.averaged():
        return image_grid(module(torch.arange(rows), "test"))


def first_step(task: str, chosen: argparse.Namespace) -> tuple[RewardFineTuning, list[Any]]:
    """A recipe's module where training begins, and what it trains."""
    with tempfile.TemporaryDirectory() as folder:
        module = built(task, "exact_adjoint", chosen.seeds[0], chosen.model, folder).model
    module.log = lambda *_, **__: None
    module.prior = None  # beside the reward's gradient
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:  # off the point where half of a LoRA has no gradient
        draws = torch.Generator().manual_seed(parameter.numel())
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=draws)
    return module, trained


def gradient_by(module: RewardFineTuning, trained: list[Any], rule: str, steps: int) -> tuple[Any, torch.Tensor]:
    """A function that makes the gradient of the first step, and that gradient."""
    settings = module.sampler.settings._replace(gradient=rule, num_steps=steps)
    index = torch.arange(module.batch_size)

    def step() -> None:
        with module.sampler.using(settings):
            module.training_step(index, 0).backward()

    module.zero_grad()
    step()
    return step, torch.cat([parameter.grad.flatten() for parameter in trained]).double()


def rules_of(task: str, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """The gradients of the first step, compared with autograd's, and what they take."""
    module, trained = first_step(task, chosen)
    true, rows, base = torch.zeros(()), list[dict[str, Any]](), 0.0
    for rule in RULES:
        if rule == "truncated" and task == "noise":
            continue
        step, found = gradient_by(module, trained, rule, STEPS)
        true = found if rule == "direct" else true
        seconds = min(timed(step) for _ in range(3))
        base = seconds if rule == "direct" else base
        costs = {"time": seconds / base, "peak_mib": peak_bytes(step) / 2**20}
        rows.append({"task": task, "gradient": rule, **compared(found, true), **costs})
        print(rows[-1], flush=True)
    return rows


def bias_of(task: str, steps: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """The continuous adjoint of the first step, compared with the exact one, at a number of steps of the sampler."""
    module, trained = first_step(task, chosen)
    found, true = (gradient_by(module, trained, rule, steps)[1] for rule in ("adjoint", "exact_adjoint"))
    print(row := {"task": task, "steps": steps, **compared(found, true)}, flush=True)
    return row


def compared(found: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
    """Cosine and relative error."""
    cosine = float(torch.cosine_similarity(found, true, 0))
    return {"cosine": cosine, "error": float((found - true).norm() / true.norm())}


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
                half = confidence(values)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; runs that it has are kept")
    parser.add_argument("--images", type=Path, help="folder for images of the first seed")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--part", default="1/1", help="i/n: every n-th of the runs that are missing")
    parser.add_argument(
        "--no-tuning", action="store_true", help="learning rates of the recipes, where none is tuned yet"
    )
    parser.add_argument("--no-gradients", action="store_true", help="compare no gradients of first steps")
    parser.add_argument("--no-runs", action="store_true", help="compare gradients alone")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    kept = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.out.exists() else {}
    found = {name: list(kept.get(name, [])) for name in ("tuning", "rules", "bias", "runs")}
    for task in [] if chosen.no_gradients else [one for one in chosen.only if "_" not in one]:
        if not any(row["task"] == task for row in found["rules"]):
            found["rules"] += rules_of(task, chosen)
        for steps in BIAS_STEPS:
            if not any((row["task"], row["steps"]) == (task, steps) for row in found["bias"]):
                found["bias"].append(bias_of(task, steps, chosen))
                save(chosen, found)
    part, parts = map(int, chosen.part.split("/"))
    pairs = [(task, gradient) for task in chosen.only for gradient in TASKS[task]]
    for task, gradient in [] if chosen.no_runs else pairs[part - 1 :: parts]:
        train(task, gradient, found, chosen)


def train(task: str, gradient: str, found: dict[str, list[dict[str, Any]]], chosen: argparse.Namespace) -> None:
    """Tune the learning rate of a gradient, then run the seeds; what is there already is kept."""

    def missing(rows: list[dict[str, Any]], **wanted: float) -> bool:
        return not any({"task": task, "gradient": gradient, **wanted}.items() <= row.items() for row in rows)

    def tune(factor: float) -> None:
        for seed in TUNING_SEEDS:
            if missing(found["tuning"], factor=factor, seed=seed):
                run = one_run(task, gradient, seed, factor, chosen)
                names = ("task", "gradient", "seed", "lr", "factor", "objective")
                found["tuning"].append({**{name: run[name] for name in names}, "reward": run["after"]["test_reward"]})
                save(chosen, found)

    tuned = not chosen.no_tuning and "_" not in task
    for factor in GRID if tuned else ():
        tune(factor)
    for end, beyond in WIDER if tuned else ():
        if best(found["tuning"], task, gradient) == end:
            tune(beyond)
    factor = best(found["tuning"], task, gradient)
    kept = [row for row in found["runs"] if (row["task"], row["gradient"]) != (task, gradient)]
    found["runs"] = [*kept, *(row for row in found["runs"] if row not in kept and row["factor"] == factor)]
    for seed in chosen.seeds:
        if missing(found["runs"], seed=seed):
            found["runs"].append(one_run(task, gradient, seed, factor, chosen))
            save(chosen, found)


def save(chosen: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    """Write what there is so far."""
    names = ("torch", "lightning", "diffusers", "peft", "scikit-learn")
    about = {
        "command": "python tests/benchmarks/diffusion_study.py --model runs/digit_diffusion --out docs/results/adjoint_dpm.json",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}},
        "device": "cpu, 1 thread",
        "seeds": chosen.seeds,
        "summary": summary(found["runs"]),
    }
    chosen.out.write_text(json.dumps({**about, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
