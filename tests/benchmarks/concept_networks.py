"""Parts of the study of concept backpropagation on planted concepts, and on networks of several rules."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from concept_runs import UP, fit, listed, summary

import lightning_bpfree as bpf
from lightning_bpfree.demos.concept_tasks import concepts as label
from lightning_bpfree.demos.data import DigitsDataModule
from lightning_bpfree.demos.modules import MLP, Classifier
from lightning_bpfree.methods.concept_backprop.change import change_concept
from lightning_bpfree.methods.concept_backprop.detection import collect_activations, detect_concepts
from lightning_bpfree.methods.concept_backprop.report import candidates
from lightning_bpfree.methods.concept_backprop.sensitivity import concept_sensitivity, tcav

sys.path.insert(0, str(Path(__file__).parent.parent / "methods/concept_backprop"))
from planted import CONCEPTS as PLANTED
from planted import planted


def run_planted(seed):
    net, x, y = planted(seed, epochs=60)
    samples = collect_activations(net, [(x, y)], ["1", "3"], PLANTED)
    found = detect_concepts(samples, PLANTED, bpf.ProbeSettings(controls=20))
    rows = {}
    for (concept, layer), detection in found.items():
        felt = concept_sensitivity(net, x[:256], detection, features=samples.features[layer], num_random=40)
        row = {"score": detection.score, "controls": detection.controls, "effect": felt.effect, "ratio": felt.ratio}
        row |= {"used": felt.used, "p_value": felt.p_value}
        if detection.probe.kind == "binary":
            row["tcav"] = tcav(net, x[:256], detection.probe)
        rows[f"{concept}/{layer}"] = row
    changes = {}
    for concept, features in (("planted", [0, 3]), ("decoy", [7])):
        probe = found[concept, "1"].probe
        low = x[candidates(probe, samples.features["1"], UP, 200)]
        low = low[probe.score(net[1](net[0](low))).detach() < 0.1]
        for name, settings in (
            ("l2", bpf.ChangeSettings(target=0.9)),
            ("l1", bpf.ChangeSettings(target=0.9, distance="l1")),
            ("paper", bpf.ChangeSettings(target=0.9, loss="bce", distance="mse", distance_weight=0.25, sparsity=0.25)),
        ):
            others = [found[other, "1"].probe for other in ("planted", "decoy")]
            change = change_concept(
                net, low, probe, settings, parameterization=bpf.AdditiveChange(0.0, 1.0), others=others
            )
            mean = change.delta.abs().mean(0)
            moved = {key[0]: float((v[:, 1] - v[:, 0]).mean()) for key, v in change.others.items()}
            scale = float(samples.outputs.std())
            moved["output"] = float((change.outputs_after - change.outputs_before).abs().mean()) / scale
            changes[f"{concept}/{name}"] = summary(
                change, share=float(mean[features].sum() / mean.sum()), delta=mean.tolist(), moved=moved
            )
    return {"detections": rows, "changes": changes}


RULES = {
    "backprop": (lambda: [], "adam", 3e-3),
    "Forward-Forward": (lambda: [bpf.ForwardForward(prediction="readout", temperature=10.0)], "adam", 1e-2),
    "evolution strategy": (lambda: [bpf.EvolutionStrategy("openai_es", population_size=64)], "adam", 1e-2),
    "forward gradient": (
        lambda: [bpf.ForwardGradient(num_directions=64, directions="rademacher", chunk_size=64)],
        "adam",
        1e-2,
    ),
}
RULE_CONCEPTS = [
    bpf.Concept("closed loop", label.closed_loop),
    bpf.Concept("even digit", label.even_digit),
    bpf.Concept("slant", label.slant, kind="continuous"),
    bpf.Concept("ink", label.ink, kind="continuous"),
]


def run_rules(seed, epochs=40):
    result = {}
    layers = ["net.layers.1", "net.layers.3", "net.layers.5"]
    logits, makers = {}, {}
    for rule, (make, optimizer, lr) in RULES.items():
        pl.seed_everything(seed)
        data = DigitsDataModule(batch_size=64, val_fraction=0.5)
        data.setup()
        module = Classifier(MLP(64, [64, 64, 64], 10), optimizer=optimizer, lr=lr, lr_schedule="cosine")
        own = data.dataset("val").tensors
        look = bpf.ConceptBackprop(
            RULE_CONCEPTS, layers, data=[own], every_n_epochs=8, max_samples=None, change=None, pictures=False
        )
        start = time.perf_counter()
        trainer = fit(module, data, epochs, *make(), look)
        accuracy = trainer.test(module, datamodule=data, verbose=False)[0]["test_acc"]
        look.max_samples = None
        samples = collect_activations(module, [own], layers, RULE_CONCEPTS)
        found = detect_concepts(samples, RULE_CONCEPTS)
        test_x, test_y = data.dataset("test").tensors
        seen = collect_activations(module, [(test_x, test_y)], layers)
        logits[rule] = {f"{c}/{n}": d.probe.logit(seen.features[n]).tolist() for (c, n), d in found.items()}
        probe = found["closed loop", layers[1]].probe
        chosen = test_x[~label.closed_loop(test_x)][:6]
        change = change_concept(
            module, chosen, probe, UP, parameterization=bpf.AdditiveChange(float(test_x.min()), float(test_x.max()))
        )
        makers[rule] = {
            "before": listed(chosen),
            "after": listed(change.changed),
            "scores": [change.before.tolist(), change.after.tolist()],
        }
        history = look.history
        result[rule] = {"accuracy": accuracy, "history": history, "seconds": time.perf_counter() - start}
        print(seed, rule, accuracy, round(time.perf_counter() - start, 1), flush=True)
    return {"rules": result, "logits": logits, "pictures": makers}


def agreement(runs):
    """Correlations of what probes say of the same test images, between networks of two rules, and of two seeds."""
    made = {}
    for key in next(iter(runs[0]["logits"].values())):
        for one in RULES:
            for two in RULES:
                values = [
                    float(torch.corrcoef(torch.tensor([a["logits"][one][key], b["logits"][two][key]]))[0, 1])
                    for i, a in enumerate(runs)
                    for j, b in enumerate(runs)
                    if i != j
                ]
                made.setdefault(key, {})[f"{one} | {two}"] = sum(values) / len(values)
    return made
