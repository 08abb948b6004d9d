"""Measures concept backpropagation: cost of a step and of probes, and agreement with captum's TCAV.

    pip install -c constraints.txt -e '.[recipes]'
    pip install --no-deps --target peers captum==0.9.0
    PYTHONPATH=peers python tests/benchmarks/concept_backprop.py --out docs/results/concept_backprop_benchmarks.json

captum goes into a folder of its own, with ``--no-deps``: it asks for an older NumPy, and works with a newer one here.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from run import row, run_parts, seconds
from torch import nn

import lightning_bpfree as bpf
from lightning_bpfree.methods.concept_backprop.change import change_concept
from lightning_bpfree.methods.concept_backprop.detection import collect_activations, detect_concepts
from lightning_bpfree.methods.concept_backprop.probe import LinearProbe
from lightning_bpfree.methods.concept_backprop.sensitivity import tcav

sys.path.insert(0, str(Path(__file__).parent.parent / "methods/concept_backprop"))
from planted import CONCEPTS, planted

REPEATS = 9


def cost_of_a_step() -> list[dict[str, object]]:
    """Steps of the search over as many forward and backward passes of the frozen part up to the layer."""
    torch.manual_seed(0)
    cnn = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    mlp = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return [
        step_over_passes(
            "a step, 3 convolutions", cnn, "5", torch.rand(32, 3, 48, 48), 64 * 24 * 24, "32 images of 48 x 48", 1.1
        ),
        step_over_passes(
            "a step, 2 linear layers",
            mlp,
            "3",
            torch.rand(256, 64),
            256,
            "256 samples of 64; no work for a processor, and the rest shows",
            None,
        ),
    ]


def step_over_passes(
    name: str, net: nn.Module, layer: str, x: torch.Tensor, width: int, what: str, limit: float | None
) -> dict[str, object]:
    probe = LinearProbe("c", layer, "binary", torch.randn(width) / width**0.5, torch.tensor(-1e4))  # is never reached
    more, fewer = 24, 4

    def search(steps: int) -> None:
        change_concept(net, x, probe, bpf.ChangeSettings(steps=steps))

    frozen = net[: int(layer) + 1].eval().requires_grad_(False)
    weight = probe.weight[:, None]

    def passes() -> None:
        for _ in range(more - fewer):
            free = torch.zeros_like(x, requires_grad=True)
            torch.autograd.grad((frozen(x + free).flatten(1) @ weight).sum(), [free])

    ratios = []
    for repeat in range(REPEATS + 1):  # the first warms up
        taken = seconds({"more": lambda: search(more), "fewer": lambda: search(fewer), "passes": passes}, repeats=-1)
        if repeat:
            ratios.append((taken["more"] - taken["fewer"]) / taken["passes"])
    low, middle, high = (sorted(ratios)[round(share * (REPEATS - 1))] for share in (0.25, 0.5, 0.75))
    note = f"over forward and backward of the frozen part up to the layer, penalties and Adam included; {what}"
    return row(name, f"{note}; median of {REPEATS} repeats, middle half {low:.2f} to {high:.2f}", middle, limit)


def passes_over_the_data() -> list[dict[str, object]]:
    """Time of the one pass that feeds the probes of all layers, over a plain pass; and the number of passes."""
    torch.manual_seed(0)
    net = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(256, 256), nn.ReLU())))
    batches = [(torch.randn(256, 256), torch.zeros(256)) for _ in range(8)]
    calls: list[int] = []
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    collect_activations(net, batches, "*")
    handle.remove()

    def plain() -> None:
        with torch.no_grad():
            for inputs, _ in batches:
                net(inputs)

    best = seconds({"plain": plain, "all": lambda: collect_activations(net, batches, "*")})
    what = "12 layers of 256 units, 8 batches of 256; copies of all activations included"
    return [
        row("passes over the data for 12 layers", what, len(calls) / len(batches), 1.0),
        row("features of 12 layers", f"time over a plain forward pass; {what}", best["all"] / best["plain"]),
    ]


def probes() -> list[dict[str, object]]:
    """Time of probes of one concept, with three controls, for each penalty."""
    rows = []
    x = torch.randn(2000, 512, generator=torch.Generator().manual_seed(0))
    for penalty in ("mean_difference", "l2", "l1"):
        settings = bpf.ProbeSettings(penalty, controls=3)
        start = time.process_time()
        bpf_probe = detect_concepts_on(x, settings)
        rows.append(
            row(
                f"{penalty} probe",
                f"CPU seconds of a probe and 3 controls, 2000 x 512; score {bpf_probe:.2f}",
                time.process_time() - start,
                unit="s",
            )
        )
    return rows


def detect_concepts_on(x: torch.Tensor, settings: bpf.ProbeSettings) -> float:
    from lightning_bpfree.methods.concept_backprop.probe import fit_probe

    return fit_probe(x, (x[:, 0] + x[:, 1] > 0).float(), settings).score


def captum_scores() -> list[dict[str, object]]:
    """TCAV scores by captum and by us: of the same vectors, and each with its own classifier; three planted networks."""
    from captum.concept import TCAV, Classifier, Concept

    differences, slopes, own = [], [], []
    for seed in range(3):
        net, x, y = planted(seed, epochs=60)
        samples = collect_activations(net, [(x, y)], ["1", "3"], CONCEPTS[:2])
        found = detect_concepts(samples, CONCEPTS[:2])
        for (name, layer), detection in found.items():
            labels = samples.labels[name] == 1
            sides = [
                Concept(i, f"{name}{i}", torch.utils.data.DataLoader(x[labels == side], batch_size=64))
                for i, side in enumerate((True, False))
            ]
            weight = detection.probe.weight.float()

            class Given(Classifier):  # type: ignore[misc]
                def __init__(self, vector: torch.Tensor = weight) -> None:
                    self.vector = vector

                def train_and_eval(self, dataloader: Any, **kwargs: Any) -> dict[str, Any]:
                    return {"accs": torch.tensor(1.0)}

                def weights(self) -> torch.Tensor:
                    return torch.stack([self.vector, -self.vector])

                def classes(self) -> list[int]:
                    return [0, 1]

            ours = tcav(net, x[:256], detection.probe)
            theirs = []
            for classifier in (Given(), None):
                with tempfile.TemporaryDirectory() as folder:  # captum would read what lies there from an earlier run
                    analysis = TCAV(net, [layer], model_id="planted", classifier=classifier, save_path=folder)
                    made = analysis.interpret(x[:256], [sides], target=0)["0-1"][layer]
                    theirs.append({key: float(value[0]) for key, value in made.items()})
            differences.append(abs(ours["sign_count"] - theirs[0]["sign_count"]))
            size = float(weight.norm())  # captum does not scale vectors, and calls the mean slope the magnitude
            slopes.append(abs(ours["mean_slope"] * size / theirs[0]["magnitude"] - 1))
            own.append(abs(ours["sign_count"] - theirs[1]["sign_count"]))
            print(seed, name, layer, ours, theirs)
    what = "12 pairs (3 networks, planted and decoy, 2 layers), 256 inputs"
    return [
        row("TCAV sign count, the same vectors", f"largest difference to captum; {what}", max(differences), 0.0, ""),
        row(
            "TCAV mean slope, the same vectors",
            f"largest relative difference to captum's magnitude; {what}",
            max(slopes),
            1e-3,
            "",
        ),
        row(
            "TCAV sign count, own classifiers",
            f"median difference to captum, whose classifier is SGD with alpha 0.01; {what}",
            sorted(own)[len(own) // 2],
            None,
            "",
        ),
        row(
            "TCAV sign count, own classifiers, same side",
            f"share of pairs on the same side of 1/2; {what}",
            sum(d < 0.5 for d in own) / len(own),
            None,
            "",
        ),
    ]


PARTS = {f.__name__: f for f in (cost_of_a_step, passes_over_the_data, probes, captum_scores)}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    COMMAND = "python tests/benchmarks/concept_backprop.py --out docs/results/concept_backprop_benchmarks.json"
    run_parts(PARTS, COMMAND, __doc__, captum=importlib.metadata.version("captum"))
