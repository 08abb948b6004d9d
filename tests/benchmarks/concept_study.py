"""The study of concept backpropagation: planted concepts, images, a table, a board, text, and networks of several rules.

    python tests/benchmarks/concept_study.py --out docs/results/concept_backprop_concepts.json [--parts planted rules]

Parts that are not run are kept from the file. Every part has three seeds, of the network and its training.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
import sys
import time
import warnings
from pathlib import Path

import lightning
import lightning.pytorch as pl
import torch
from torch import nn

import lightning_bpfree as bpf
from lightning_bpfree.demos.concept_tasks import concepts as label
from lightning_bpfree.demos.concept_tasks import tictactoe
from lightning_bpfree.demos.concept_tasks.autoencoder import Autoencoder
from lightning_bpfree.demos.concept_tasks.in_memory_tables import InMemoryTableDataModule
from lightning_bpfree.demos.concept_tasks.next_byte import ByteGRU, NextByteDataModule
from lightning_bpfree.demos.data import DigitsDataModule, FashionMNISTDataModule
from lightning_bpfree.demos.language import LanguageModel
from lightning_bpfree.demos.modules import MLP, Classifier, SmallCNN
from lightning_bpfree.methods.concept_backprop.change import change_concept
from lightning_bpfree.methods.concept_backprop.detection import collect_activations, detect_concepts
from lightning_bpfree.methods.concept_backprop.flips import flip_concept, single_changes, token_changes
from lightning_bpfree.methods.concept_backprop.report import candidates
from lightning_bpfree.methods.concept_backprop.sensitivity import concept_sensitivity, tcav

sys.path.insert(0, str(Path(__file__).parent.parent / "methods/concept_backprop"))
from planted import CONCEPTS as PLANTED
from planted import planted

SEEDS = (0, 1, 2)
UP = bpf.ChangeSettings(target=0.9)


def fit(module, data, epochs, *callbacks, seed=0):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=data)
    return trainer


def summary(change, **more):
    """The numbers of changed inputs that every part reports."""
    absent = change.before < 0.1
    found = {
        "inputs": int(absent.sum()),
        "before": float(change.before[absent].mean()),
        "after": float(change.after[absent].mean()),
        "reached": float(change.reached[absent].float().mean()),
        **{name: float(value[absent].mean()) for name, value in change.distance.items()},
    }
    return {**found, **more}


def listed(tensor, digits=2):
    return [[round(v, digits) for v in row.flatten().tolist()] for row in tensor.float()]


# --- planted concepts ---


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


# --- images ---


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
    chosen = x[rows[absent[rows]][:96]]
    other = Autoencoder(size, latent=latent, epochs=60 if name == "digits" else 20, seed=seed + 500)
    other.fit(train_x)  # the judge; the one that changes images is another
    usual = float((other(x) - x).square().flatten(1).mean(1).median().detach())
    making = Autoencoder(size, latent=latent, epochs=60 if name == "digits" else 20, seed=seed)
    making.fit(train_x)
    plain, smooth = bpf.AdditiveChange(low, high), bpf.GridChange(grid, low, high)
    decoded, weak = bpf.LatentChange(making, low, high), loose[concept.name, layer].probe
    ways = {
        "additive, 0.9": (plain, probe, 0.9),
        "additive, 0.99": (plain, probe, 0.99),
        "grid, 0.9": (smooth, probe, 0.9),
        "grid, 0.99": (smooth, probe, 0.99),
        "latent, 0.9": (decoded, probe, 0.9),
        "latent, 0.99": (decoded, probe, 0.99),
        "latent, 0.99, weak penalty": (decoded, weak, 0.99),
    }
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
    for way, (parameterization, by, target) in ways.items():
        settings = bpf.ChangeSettings(target=target, steps=200, lr=0.05)
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
        if way in ("additive, 0.99", "grid, 0.99", "latent, 0.99"):
            result["pictures"][way] = listed(change.changed[:6])
    return result


# --- a table ---


def run_table(seed):
    pl.seed_everything(seed)
    data = InMemoryTableDataModule("breast_cancer", batch_size=32, seed=seed)
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


# --- a board ---


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
    ways = {
        "greedy": lambda: flip_concept(
            module, chosen, probe, lambda b: single_changes(b, tictactoe.legal), UP, max_flips=6
        ),
        "greedy, any squares": lambda: flip_concept(module, chosen, probe, single_changes, UP, max_flips=6),
        "straight-through": lambda: change_concept(
            module,
            chosen,
            probe,
            bpf.ChangeSettings(target=0.9, distance_weight=0.0, sparsity=0.3, lr=0.1, steps=300),
            parameterization=bpf.CategoryChange(),
            legal=tictactoe.legal,
        ),
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


# --- text ---


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


# --- rules ---

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


PARTS = {
    "planted": run_planted,
    "digits": lambda seed: run_images(seed, "digits"),
    "fashion": lambda seed: run_images(seed, "fashion"),
    "table": run_table,
    "board": run_board,
    "text": run_text,
    "rules": run_rules,
}


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


def rounded(value):
    """The value with four digits behind the point, which is more than three seeds can tell."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/results/concept_backprop_concepts.json")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = Path(args.out)
    found = json.loads(path.read_text()) if path.exists() else {}
    for part in args.parts:
        start = time.perf_counter()
        runs = []
        for seed in args.seeds:
            runs.append(PARTS[part](seed))
            print(part, seed, round(time.perf_counter() - start, 1), "s", flush=True)
        if part == "rules":
            found["agreement"] = rounded(agreement(runs))
            for run in runs:
                del run["logits"]
        for run in runs[1:]:
            run.pop("pictures", None)  # one seed's are enough
        found[part] = rounded(runs)
        found |= {
            "command": "python tests/benchmarks/concept_study.py",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seeds": args.seeds,
            "machine": {"threads": 1, "processor": platform.machine()},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "lightning": lightning.__version__,
            },
        }
        path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
