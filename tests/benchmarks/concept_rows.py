"""Parts of the study of concept backpropagation on a table, a board and text."""

from __future__ import annotations

import time

import lightning.pytorch as pl
import torch
from concept_runs import UP, fit, summary

import lightning_bpfree as bpf
from lightning_bpfree.demos.concept_tasks import concepts as label
from lightning_bpfree.demos.concept_tasks import tictactoe
from lightning_bpfree.demos.concept_tasks.next_byte import ByteGRU, NextByteDataModule
from lightning_bpfree.demos.language import LanguageModel
from lightning_bpfree.demos.modules import MLP, Classifier
from lightning_bpfree.demos.tables import ScikitTableDataModule
from lightning_bpfree.methods.concept_backprop.change import change_concept
from lightning_bpfree.methods.concept_backprop.detection import collect_activations, detect_concepts
from lightning_bpfree.methods.concept_backprop.flips import flip_concept, single_changes, token_changes
from lightning_bpfree.methods.concept_backprop.report import candidates
from lightning_bpfree.methods.concept_backprop.sensitivity import concept_sensitivity


def run_table(seed):
    pl.seed_everything(seed)
    data = ScikitTableDataModule("breast_cancer", batch_size=32, seed=seed)
    data.setup()
    module = Classifier(MLP(30, [32, 32], 2), num_classes=2, optimizer="adam", lr=3e-3)
    fit(module, data, 20)
    x = torch.cat([data.dataset(split).tensors[0] for split in ("train", "val", "test")])
    y = torch.cat([data.dataset(split).tensors[1] for split in ("train", "val", "test")])
    names = data.feature_names
    concepts = [
        bpf.Concept(n, label.feature_above_mean(names.index(n)))
        for n in ("mean radius", "mean texture", "mean smoothness", "fractal dimension error")
    ]
    analysis = bpf.ConceptBackprop(
        concepts,
        ["net.layers.1", "net.layers.3"],
        change=bpf.ChangeSettings(target=0.9, distance="l2"),
        max_samples=None,
        change_layer="net.layers.1",
        pictures=False,
    )
    report = analysis.analyze(module, [(x, y)])
    changes = {}
    for name, change in report.changes.items():
        mean = change.delta.mean(0)
        top = mean.abs().argsort(descending=True)[:5].tolist()
        near = torch.cdist(change.changed, x).amin(1).median() / torch.cdist(x[:200], x[200:]).amin(1).median()
        changes[name] = summary(change, top=[[names[i], float(mean[i])] for i in top], neighbour_ratio=float(near))
    return {"scores": report.scores(), "changes": changes, "entanglement": report.entanglement}


def run_board(seed):
    pl.seed_everything(seed)
    data = tictactoe.TicTacToeDataModule(batch_size=64, seed=seed)
    data.setup()
    module = Classifier(MLP(27, [128, 64], 3), num_classes=3, optimizer="adam", lr=2e-3)
    trainer = fit(module, data, 30)
    accuracy = trainer.test(module, datamodule=data, verbose=False)[0]["test_acc"]
    x = torch.cat([data.dataset(split).tensors[0] for split in ("val", "test")])
    y = torch.cat([data.dataset(split).tensors[1] for split in ("val", "test")])
    truths = {
        "win in one": tictactoe.win_in_one,
        "must defend": tictactoe.must_defend,
        "center is mine": tictactoe.center_is_mine,
    }
    concepts = [bpf.Concept(n, f) for n, f in truths.items()]
    layers = ["net.layers.1", "net.layers.3"]
    samples = collect_activations(module, [(x, y)], layers, concepts)
    found = detect_concepts(samples, concepts)
    scores = {}
    for (concept, layer), detection in found.items():
        felt = concept_sensitivity(module, x[:256], detection, features=samples.features[layer])
        scores.setdefault(concept, {})[layer] = {
            "score": detection.score,
            "control": detection.control,
            "ratio": felt.ratio,
        }
    probe = found["win in one", "net.layers.1"].probe
    rows = candidates(probe, samples.features["net.layers.1"], UP, len(x))
    chosen = x[rows]
    chosen = chosen[(probe.score(samples.features["net.layers.1"][rows]) < 0.1) & ~tictactoe.win_in_one(chosen)][:128]
    result = {
        "accuracy": accuracy,
        "scores": scores,
        "ways": {},
        "pictures": {"before": chosen[:6].argmax(1).flatten(1).tolist()},
    }

    def relaxed(steps=300, lr=0.1, hold=1.0, weight=0.0):
        return change_concept(
            module,
            chosen,
            probe,
            bpf.ChangeSettings(target=0.9, distance_weight=0.0, sparsity=0.3, lr=lr, steps=steps),
            parameterization=bpf.CategoryChange(hold=hold),
            legal=tictactoe.legal,
            validity=tictactoe.broken_rules if weight else None,
            validity_weight=weight,
        )

    ways = {
        "greedy": lambda: flip_concept(
            module, chosen, probe, lambda b: single_changes(b, tictactoe.legal), UP, max_flips=6
        ),
        "greedy, any squares": lambda: flip_concept(module, chosen, probe, single_changes, UP, max_flips=6),
        "straight-through": relaxed,
        "straight-through, 600 steps of twice the rate": lambda: relaxed(600, 0.2),
        "straight-through, softer start": lambda: relaxed(hold=0.3),
        "straight-through, penalty 1 for broken rules": lambda: relaxed(weight=1.0),
        "straight-through, penalty 3 for broken rules": lambda: relaxed(weight=3.0),
    }
    for way, make in ways.items():
        start = time.perf_counter()
        change = make()
        row = summary(change, seconds=time.perf_counter() - start)
        good = change.reached
        row["true_by_rule"] = float(tictactoe.win_in_one(change.changed[good]).float().mean())
        row["legal"] = float(tictactoe.legal(change.changed[good]).float().mean())
        row["squares"] = float((change.changed[good] != change.inputs[good]).any(1).flatten(1).sum(1).float().mean())
        row["predicted_win"] = [
            float((o[good].argmax(1) == 2).float().mean()) for o in (change.outputs_before, change.outputs_after)
        ]
        result["ways"][way] = row
        result["pictures"][way] = change.changed[:6].argmax(1).flatten(1).tolist()
    return result


def run_text(seed):
    pl.seed_everything(seed)
    module = LanguageModel(ByteGRU(128, 32, 96), vocab_size=128, optimizer="adamw", lr=5e-3, lr_schedule="cosine")
    data = NextByteDataModule(sequence_length=48, batch_size=64)
    trainer = fit(module, data, 4)
    loss = trainer.test(module, datamodule=data, verbose=False)[0]["test_loss"]
    quoted = NextByteDataModule(sequence_length=48, quoted=True)
    quoted.setup()
    x = torch.cat([quoted.dataset(split).tensors[0] for split in ("train", "val", "test")])
    concept = bpf.Concept("inside a quotation", label.inside_quotation)
    layers = ["net.embed", "net.rnn"]
    settings = bpf.ProbeSettings(strength=0.1, pool="last", controls=5)
    samples = collect_activations(module, [(x, x)], layers, [concept], pool="last")
    found = detect_concepts(samples, [concept], settings)
    probe = found[concept.name, "net.rnn"].probe
    features = samples.features["net.rnn"]
    rows = candidates(probe, features, UP, len(x))
    chosen = x[rows[(probe.score(features[rows]) < 0.1) & ~label.inside_quotation(x[rows])]][:12]
    quotes = ord('"')
    printable = torch.arange(32, 127)
    felt = concept_sensitivity(
        module,
        x[:256],
        found[concept.name, "net.rnn"],
        features=features,
        output_of=lambda out: out.view(-1, 48, 128)[:, -1],
    )
    result = {
        "test_loss": loss,
        "scores": {
            n: {"score": found[concept.name, n].score, "control": found[concept.name, n].control} for n in layers
        },
        "effect": felt.effect,
        "ratio": felt.ratio,
        "ways": {},
    }
    ways = {
        "greedy": lambda: flip_concept(module, chosen, probe, lambda t: token_changes(t, printable), UP, max_flips=3),
        "straight-through": lambda: change_concept(
            module,
            chosen,
            probe,
            bpf.ChangeSettings(target=0.9, distance_weight=0.0, sparsity=0.3, lr=0.1, steps=300),
            parameterization=bpf.TokenChange("net.embed", printable.tolist()),
        ),
    }
    for way, make in ways.items():
        start = time.perf_counter()
        change = make()
        good = change.reached
        new = change.changed != change.inputs
        toggles = (new & ((change.changed == quotes) | (change.inputs == quotes))).sum() / new.sum().clamp_min(1)
        row = summary(change, seconds=time.perf_counter() - start, characters=float(new[good].sum(1).float().mean()))
        row["true_by_rule"] = float(label.inside_quotation(change.changed[good]).float().mean())
        row["changes_that_touch_a_mark"] = float(toggles)
        ends = [
            o.view(-1, 48, 128)[good, -1].softmax(1)[:, quotes].mean()
            for o in (change.outputs_before, change.outputs_after)
        ]
        row["probability_of_a_mark_next"] = [float(p) for p in ends]
        result["ways"][way] = row
        result.setdefault("texts", {"before": [bytes(t).decode() for t in chosen[:5].tolist()]})
        result["texts"][way] = [bytes(t).decode() for t in change.changed[:5].tolist()]
    return result
