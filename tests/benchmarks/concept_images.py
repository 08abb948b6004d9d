"""Parts of the study of concept backpropagation whose inputs are images."""

from __future__ import annotations

import time

import lightning.pytorch as pl
import torch
from concept_runs import UP, fit, listed, summary
from torch import nn

import lightning_bpfree as bpf
from lightning_bpfree.demos.concept_tasks import concepts as label
from lightning_bpfree.demos.concept_tasks.autoencoder import Autoencoder
from lightning_bpfree.demos.data import DigitsDataModule, FashionMNISTDataModule
from lightning_bpfree.demos.modules import MLP, Classifier, SmallCNN
from lightning_bpfree.methods.concept_backprop.change import change_concept
from lightning_bpfree.methods.concept_backprop.detection import collect_activations, detect_concepts
from lightning_bpfree.methods.concept_backprop.report import candidates
from lightning_bpfree.methods.concept_backprop.sensitivity import concept_sensitivity


def image_task(name, seed):
    if name == "digits":
        data = DigitsDataModule(batch_size=32, val_fraction=0.3, seed=seed)
        net, concept, epochs, size = SmallCNN((1, 8, 8), [16, 32]), label.closed_loop, 15, (1, 8, 8)
        judge, grid, latent = MLP(64, [64, 64], 2), 4, 16
    else:
        data = FashionMNISTDataModule(batch_size=64, download=False, train_size=6000, seed=seed)
        net, concept, epochs, size = SmallCNN((1, 28, 28), [8, 16, 16]), label.long_sleeves, 3, (1, 28, 28)
        judge, grid, latent = MLP(784, [64, 64], 2), 7, 16
    data.prepare_data()
    data.setup()
    return data, net, concept, epochs, size, judge, grid, latent


def concept_judge(judge, x, labels, seed):
    """Train another network, of another kind, to see the concept in images; return its probability of it."""
    torch.manual_seed(1000 + seed)
    known = ~labels.isnan()
    x, y = x[known], labels[known].long()
    optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3)
    for _ in range(30):
        for rows in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(judge(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return lambda images: judge(images).softmax(1)[:, 1].detach()


def run_images(seed, name):
    pl.seed_everything(seed)
    data, net, truth, epochs, size, judge, grid, latent = image_task(name, seed)
    module = Classifier(net, optimizer="adam", lr=2e-3)
    fit(module, data, epochs)
    x, y = data.dataset("val").tensors  # not trained on
    x, y = x[:1500], y[:1500]
    train_x, train_y = data.dataset("train").tensors
    see = concept_judge(judge, train_x, torch.as_tensor(truth(train_x, train_y)).double(), seed)
    low, high = float(train_x.min()), float(train_x.max())
    concept = bpf.Concept(truth.__name__, truth)
    layers = [*[f"net.{n}" for n, part in net.named_modules() if isinstance(part, nn.ReLU)][-2:], "net.head"]
    samples = collect_activations(module, [(x, y)], layers, [concept], pool="flatten")
    found = detect_concepts(samples, [concept], bpf.ProbeSettings(strength=0.3))
    loose = detect_concepts(samples, [concept], bpf.ProbeSettings(strength=0.01))
    felt = {
        n: concept_sensitivity(module, x[:256], found[concept.name, n], features=samples.features[n]) for n in layers
    }
    scores = {n: found[concept.name, n].score for n in layers}
    layer = max(scores, key=scores.get)
    probe = found[concept.name, layer].probe
    known = ~samples.labels[concept.name].isnan()
    rows = candidates(probe, samples.features[layer], UP, len(x))
    absent = (probe.score(samples.features[layer]) < 0.1) & known & (samples.labels[concept.name] == 0)
    chosen = x[rows[absent[rows]][:48]]
    other = Autoencoder(size, latent=latent, epochs=60 if name == "digits" else 20, seed=seed + 500)
    other.fit(train_x)  # the judge; the one that changes images is another
    usual = float((other(x) - x).square().flatten(1).mean(1).median().detach())
    making = Autoencoder(size, latent=latent, epochs=60 if name == "digits" else 20, seed=seed)
    making.fit(train_x)
    plain, smooth = bpf.AdditiveChange(low, high), bpf.GridChange(grid, low, high)
    decoded, weak = bpf.LatentChange(making, low, high), loose[concept.name, layer].probe
    ways = {
        "additive, 0.9": (plain, probe, 0.9, 0.05),
        "additive, 0.99": (plain, probe, 0.99, 0.05),
        "grid, 0.9": (smooth, probe, 0.9, 0.05),
        "grid, 0.99": (smooth, probe, 0.99, 0.05),
        "latent, 0.9": (decoded, probe, 0.9, 0.05),
        "latent, 0.99": (decoded, probe, 0.99, 0.05),
        "latent, 0.99, rate 0.2": (decoded, probe, 0.99, 0.2),
        "latent, 0.999, rate 0.2": (decoded, probe, 0.999, 0.2),
        "latent, 0.99, weak penalty": (decoded, weak, 0.99, 0.05),
    }
    if name == "fashion":  # a step takes long there, and the lower target changes nothing in what is seen
        ways = {way: how for way, how in ways.items() if way not in ("additive, 0.9", "grid, 0.9")}
    real = x[known & (samples.labels[concept.name] == 1)]
    result = {
        "layer": layer,
        "scores": scores,
        "weak_penalty_score": loose[concept.name, layer].score,
        "controls": {n: found[concept.name, n].control for n in layers},
        "effects": {n: felt[n].effect for n in layers},
        "ratios": {n: felt[n].ratio for n in layers},
        "judge_on_real": {
            "with": float((see(real) > 0.5).float().mean()),
            "without": float((see(chosen) > 0.5).float().mean()),
        },
        "ways": {},
        "pictures": {"before": listed(chosen[:6])},
        "size": size,
    }
    for way, (parameterization, by, target, lr) in ways.items():
        settings = bpf.ChangeSettings(target=target, steps=200, lr=lr)
        start = time.perf_counter()
        change = change_concept(module, chosen, by, settings, parameterization=parameterization)
        seconds = time.perf_counter() - start
        error = (other(change.changed) - change.changed).square().flatten(1).mean(1).median().detach()
        targets = torch.zeros(len(chosen), dtype=torch.int64)  # a top: the rule looks at the picture
        row = summary(
            change, seconds=seconds, true_by_rule=float(torch.as_tensor(truth(change.changed, targets)).float().mean())
        )
        row["seen_by_judge"] = float((see(change.changed) > 0.5).float().mean())
        row["autoencoder_error_ratio"] = float(error) / usual
        row["same_class"] = float((change.outputs_before.argmax(1) == change.outputs_after.argmax(1)).float().mean())
        result["ways"][way] = row
        if way in ("additive, 0.99", "grid, 0.99", "latent, 0.999, rate 0.2"):
            result["pictures"][way] = listed(change.changed[:6])
    return result
