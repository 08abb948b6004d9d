"""`bpfree tickets`: what it trains, what it measures of it, and what it says of both."""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_bpfree import Ticket
from lightning_bpfree.cli import main
from lightning_bpfree.cli.common import recipes
from lightning_bpfree.cli.common.configured import Blueprint, silence
from lightning_bpfree.cli.common.records import finite
from lightning_bpfree.cli.compare.results import confidence
from lightning_bpfree.cli.tickets import command as tickets
from lightning_bpfree.cli.tickets import results as tickets_results
from lightning_bpfree.cli.tickets import runs as tickets_runs
from lightning_bpfree.cli.tickets.results import barrier_rows, cells, differences, figures, table_rows, written
from lightning_bpfree.cli.tickets.runs import AGAIN, KINDS, Study, plan_of
from lightning_bpfree.core.params import Params
from lightning_bpfree.demos.modules import MLP, Classifier
from lightning_bpfree.methods.lottery_ticket.connectivity import loss_barrier
from lightning_bpfree.methods.lottery_ticket.pruning import num_kept

pytestmark = pytest.mark.slow  # each trains several levels

DOCS = Path(__file__).parents[2] / "docs"
SPARSITIES = [0.0, 0.3, 0.5]
ES = """
    - class_path: lightning_bpfree.EvolutionStrategy
      init_args:
        algorithm: {class_path: lightning_bpfree.SNES, init_args: {sigma: 0.05}}
        population_size: 4
"""
LEVELS = f"    - {{class_path: lightning_bpfree.LotteryTicket, init_args: {{sparsities: {SPARSITIES}}}}}\n"
PARTS = """
seed_everything: 0
model:
  class_path: lightning_bpfree.demos.modules.Classifier
  init_args:
    net: {class_path: lightning_bpfree.demos.modules.MLP, init_args: {in_features: 4, hidden: [8], num_classes: 3}}
    num_classes: 3
    lr: 1.0
data: {class_path: test_cli_tickets.Blobs}
trainer:
  accelerator: cpu
  logger: false
  callbacks:
"""
BACKPROP = """
model: {init_args: {optimizer: adam, lr: 0.01}}
trainer: {callbacks+: [{class_path: lightning_bpfree.Backprop}]}
"""
ZEROTH = "trainer: {callbacks+: [{class_path: lightning_bpfree.ZerothOrder}]}\n"
POINTS = 5  # on a line, for speed
WEIGHTS = 4 * 8 + 8 * 3


def blobs(seed: int, samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    return torch.eye(4)[labels] + 0.7 * torch.randn(samples, 4, generator=generator), labels


class Blobs(LightningDataModule):
    """Three clouds of points; test batches are equal, so that means over batches are means over samples."""

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*blobs(0, 96)), batch_size=32, shuffle=True)

    def test_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*blobs(1, 200)), batch_size=100)


class Normed(torch.nn.Sequential):
    """A network with running statistics."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


def classifier() -> Classifier:
    return Classifier(MLP(4, [8], 3), num_classes=3)


def loss_and_accuracy(module: torch.nn.Module) -> tuple[float, float]:
    inputs, labels = blobs(1, 200)
    with torch.no_grad():
        logits = module(inputs)
    return float(cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


def write_parts() -> None:
    Path("base.yaml").write_text(PARTS + ES + LEVELS)
    Path("bp.yaml").write_text(BACKPROP)


def results(out: str | Path = "out") -> Any:
    return json.loads((Path(out) / "tickets.json").read_text())


def ticket(study: dict[str, Any], kind: str, level: int, rule: str = "EvolutionStrategy") -> Ticket:
    (file,) = [run["file"] for run in runs(study, kind, rule) if run["level"] == level]
    return Ticket.load(file)


def runs(study: dict[str, Any], kind: str, rule: str = "EvolutionStrategy") -> list[dict[str, Any]]:
    return [run for run in study["runs"] if (run["rule"], run["tickets"]) == (rule, kind)]


def equal(one: Params, other: Params) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Bar:
    """Stands in for the progress bar, and counts."""

    total, advanced = 0, 0

    def add_task(self, description: str, total: int) -> int:
        self.total = total
        return 0

    def update(self, task: int, description: str, advance: int) -> None:
        self.advanced += advance

    @classmethod
    @contextlib.contextmanager
    def shown(cls) -> Iterator[Bar]:
        yield cls.last

    last: Bar


OUT = ["--seeds", "3", "--out"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole command, once: two kinds, one transfer, all lines."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Bar.last = Bar()
        patch.setattr(tickets_results, "progress", Bar.shown)
        patch.setattr(tickets_runs, "POINTS", POINTS)
        write_parts()
        out = str(folder / "out")
        kinds = ["--kinds", "snr", "magnitude"]
        assert main(["tickets", "-c", "base.yaml", "--transfer", "bp.yaml", *kinds, *OUT, out]) == 0
    return {**results(folder / "out"), "out": Path(out), "bar": Bar.last}


@pytest.fixture
def parts(folder: Path) -> None:
    """A configuration and an overlay in the current folder."""
    write_parts()


# --- the command ---


def test_everything_is_written(trained: dict[str, Any]) -> None:
    out = trained["out"]
    for name in ("pruning", "transfer", "connectivity"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with (out / "tickets.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [tuple(line) for line in lines[:1]] == [tickets_results.FIELDS]
    assert [(line["rule"], line["tickets"], line["seed"], line["value"]) for line in lines] == [
        (run["rule"], run["tickets"], str(run["seed"]), str(run["value"])) for run in trained["runs"]
    ]
    assert {path.suffix for path in out.iterdir()} == {".png", ".json", ".csv", ""}
    assert (trained["rule"], trained["kinds"]) == ("EvolutionStrategy", ["snr", "magnitude"])
    assert trained["command"][:4] == ["bpfree", "tickets", "-c", "base.yaml"]
    assert set(trained["versions"]) == {"python", "torch", "lightning", "lightning_bpfree"}


def test_all_is_trained_that_was_planned(trained: dict[str, Any]) -> None:
    counts: dict[Any, int] = {}
    for run in trained["runs"]:
        counts[run["rule"], run["tickets"]] = counts.get((run["rule"], run["tickets"]), 0) + 1
    assert counts == {
        ("EvolutionStrategy", "snr"): 3,
        ("EvolutionStrategy", "magnitude"): 3,
        ("bp", "magnitude"): 3,
        ("bp", "random"): 3,
        ("bp", "snr_of_EvolutionStrategy"): 2,
        ("EvolutionStrategy", "snr_again"): 3,
        ("bp", "magnitude_again"): 3,
    }
    assert trained["bar"].total == trained["bar"].advanced == sum(counts.values())
    lines = [(entry["rule"], entry["tickets"], entry["between"], entry["level"]) for entry in trained["barriers"]]
    assert lines == [
        (*of, between, level)
        for of in (("EvolutionStrategy", "snr"), ("bp", "magnitude"))
        for between, levels in (("levels", (1, 2)), ("seeds", (0, 1, 2)))
        for level in levels
    ]
    for run in trained["runs"]:
        assert run["kept"] == num_kept(WEIGHTS, SPARSITIES[run["level"]])
        assert run["weights_left"] == run["kept"] / WEIGHTS


class Counted:
    """Stands in for a rule, and trains nothing."""

    def __init__(self, rule: str, levels: int) -> None:
        self.rule, self.num_levels = rule, levels

    def levels(self, kind: str, seed: int) -> Iterator[dict[str, Any]]:
        for level in range(self.num_levels):
            yield {"rule": self.rule, "tickets": kind, "seed": seed, "level": level, "weights_left": 1.0, "file": "no"}

    def again(self, ticket: Path, name: str, seed: int) -> dict[str, Any]:
        return {"rule": self.rule, "tickets": name, "seed": seed, "level": 0, "weights_left": 1.0, "file": str(ticket)}

    def barriers(self, one: Path, other: Path) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
@pytest.mark.parametrize("targets", [0, 1, 2])
@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize("kinds", [["snr"], ["snr", "magnitude", "random"]])
def test_the_bar_knows_the_end(kinds: list[str], levels: int, targets: int, seeds: list[int], lines: bool) -> None:
    options = argparse.Namespace(kinds=kinds, seeds=seeds, no_connectivity=not lines)
    others = [Counted(f"target_{i}", levels) for i in range(targets)]
    found = [kind for kind, _ in tickets.parts(Counted("base", levels), others, options)]
    assert found.count("run") == plan_of(kinds, seeds, levels, targets, connectivity=lines)
    assert found.count("barrier") == lines * len(seeds) * (1 + targets) * (2 * levels - 1)


def test_values_are_those_of_the_trained_tickets(trained: dict[str, Any]) -> None:
    for run in trained["runs"]:
        found = Ticket.load(run["file"])
        module = classifier()
        found.apply_to(module, "mean")
        loss, accuracy = loss_and_accuracy(module)
        assert run["value"] == pytest.approx(accuracy, rel=1e-6)  # float32
        assert run["metrics"] == {"test_acc": run["value"], "test_loss": pytest.approx(loss, rel=1e-5)}
        assert run["kept"] == found.masks.kept
        assert not equal(found.mean, found.init)
        assert all(not found.mean[name][~mask].any() for name, mask in found.masks.items())
    assert len({run["metrics"]["test_loss"] for run in trained["runs"]}) > 10  # they are different networks


def test_transfer_trains_the_first_kinds_tickets(trained: dict[str, Any]) -> None:
    for level in (1, 2):
        source, moved = (
            ticket(trained, "snr", level),
            ticket(trained, "snr_of_EvolutionStrategy", level, "bp"),
        )
        assert moved.masks == source.masks
        assert equal(moved.init, source.init)
        assert moved.info["rule"] == "Backprop"
        assert all(not moved.mean[name][~mask].any() for name, mask in moved.masks.items())
    by_rule = [ticket(trained, "magnitude", 1, rule) for rule in ("EvolutionStrategy", "bp")]
    assert by_rule[0].masks != by_rule[1].masks  # each rule finds its own
    assert equal(by_rule[0].init, by_rule[1].init)  # from the same start


def test_a_transferred_ticket_starts_from_its_first_weights(trained: dict[str, Any], parts: None) -> None:
    """With hardly any learning rate, what is trained is where it started."""
    source = ticket(trained, "snr", 1)
    overlay = ["--trainer.callbacks=lightning_bpfree.LotteryTicket", "--trainer.callbacks+=lightning_bpfree.Backprop"]
    still = Blueprint(["-c", "base.yaml", "--model.init_args.lr=1e-9", *overlay])
    (file,) = [run["file"] for run in runs(trained, "snr") if run["level"] == 1]
    with silence():
        result = Study(still, "still", Path("tickets"), "test_acc").again(Path(file), "snr_of_es", 5)
    module = classifier()
    source.apply_to(module, "init")
    start = {name: parameter.detach() for name, parameter in module.named_parameters()}
    moved = Ticket.load(result["file"])
    assert result["level"] == 1
    assert all(torch.allclose(moved.mean[name], start[name], rtol=0, atol=1e-7) for name in start)
    assert not any(torch.allclose(source.mean[name], start[name], rtol=0, atol=1e-5) for name in source.masks)


def test_a_second_training_has_another_seed_and_the_same_ticket(trained: dict[str, Any]) -> None:
    for kind, rule in (("snr", "EvolutionStrategy"), ("magnitude", "bp")):
        assert {run["seed"] for run in runs(trained, f"{kind}_again", rule)} == {3 + AGAIN}
        for level in range(3):
            one, other = ticket(trained, kind, level, rule), ticket(trained, f"{kind}_again", level, rule)
            assert (one.info["seed"], other.info["seed"]) == (3, 3 + AGAIN)
            assert one.masks == other.masks
            assert equal(one.init, other.init)
            assert not equal(one.mean, other.mean)


def test_barriers_are_those_of_the_trained_weights(trained: dict[str, Any]) -> None:
    module = classifier()
    for entry in trained["barriers"]:
        kind, rule, level = entry["tickets"], entry["rule"], entry["level"]
        ends = (kind, level - 1), (kind, level)
        if entry["between"] == "seeds":
            ends = (kind, level), (f"{kind}_again", level)
        a, b = (ticket(trained, *end, rule) for end in ends)
        for name, place, sign in (("loss", 0, 1), ("metric", 1, -1)):

            def evaluate(params: Params, place: int = place, sign: int = sign) -> float:
                module.load_state_dict(params, strict=False)
                return sign * loss_and_accuracy(module)[place]

            by_hand = loss_barrier(evaluate, a.mean, b.mean, POINTS)
            assert entry[name]["alphas"] == by_hand.alphas
            assert entry[name]["values"] == pytest.approx(by_hand.values, rel=1e-5)
            assert entry[name]["barrier"] == pytest.approx(by_hand.barrier, abs=1e-5)
            assert entry[name]["barrier_from_mean"] == pytest.approx(by_hand.barrier_from_mean, abs=1e-5)
        assert entry["weights_left"] == b.masks.weights_left


def comparable(study: dict[str, Any], **of: Any) -> list[dict[str, Any]]:
    """Runs and barriers without what differs between two runs of the same."""
    entries = [entry for entry in study["runs"] + study["barriers"] if of.items() <= entry.items()]
    return [{key: value for key, value in entry.items() if key not in ("file", "seconds")} for entry in entries]


def test_the_same_again_gives_the_same(trained: dict[str, Any], parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets_runs, "POINTS", POINTS)
    arguments = ["-c", "base.yaml", "--kinds", "snr", "snr", "--trainer.callbacks.permute_masks", "true"]
    assert main(["tickets", *arguments, "--metric", "test_acc", *OUT, "out"]) == 0
    found = [entry for entry in comparable(trained, rule="EvolutionStrategy") if entry["tickets"] != "magnitude"]
    assert comparable(results()) == found  # whatever else is trained beside it
    assert len(found) == 11


def test_what_is_known_is_on_disk(parts: None, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated, calls = tickets_runs.evaluated, []

    def once(*arguments: Any) -> dict[str, float]:
        calls.append(arguments)
        if len(calls) == 3:  # the first is the check before all, the second the first level
            raise KeyboardInterrupt
        return evaluated(*arguments)

    monkeypatch.setattr(tickets_runs, "evaluated", once)
    with pytest.raises(KeyboardInterrupt):
        main(["tickets", "-c", "base.yaml", *OUT, "out"])
    found = results()
    assert comparable(found) == comparable(trained)[:1]
    assert found["barriers"] == []
    with Path("out/tickets.csv").open() as file:
        assert [line["level"] for line in csv.DictReader(file)] == ["0"]
    assert not list(Path("out").glob("*.tmp"))


def test_every_kind_is_what_it_says(parts: None) -> None:
    arguments = ["-c", "base.yaml", "--kinds", *KINDS, "--no-connectivity"]
    assert main(["tickets", *arguments, *OUT, "out"]) == 0
    study = results()
    assert [run["tickets"] for run in study["runs"]] == [kind for kind in KINDS for _ in SPARSITIES]
    assert study["barriers"] == []
    assert {path.name for path in Path("out").glob("*.png")} == {"pruning.png"}
    dense = {kind: ticket(study, kind, 0) for kind in KINDS}
    assert all(equal(found.mean, dense["snr"].mean) for found in dense.values())  # nothing is pruned yet
    found = {kind: ticket(study, kind, 1) for kind in KINDS}
    for kind, arguments_of in KINDS.items():
        assert arguments_of.items() <= found[kind].info.items()
        assert found[kind].info["permute_masks"] == (kind == "permuted_masks")
        assert equal(found[kind].init, dense["snr"].init)
    names = list(found["snr"].masks)
    mean, std = dense["snr"].mean, dense["snr"].std
    for kind in ("magnitude", "fresh", "permuted"):
        assert kept(found[kind], names) == best({name: mean[name].abs() for name in names})
    assert kept(found["snr"], names) == best({name: mean[name].abs() / std[name] for name in names})
    assert found["permuted_masks"].masks.counts == found["magnitude"].masks.counts
    different = {tuple(kept(found[kind], names)) for kind in ("snr", "magnitude", "permuted_masks", "random", "snip")}
    assert len(different) == 5
    assert not equal(found["magnitude"].mean, found["fresh"].mean)
    assert not equal(found["magnitude"].mean, found["permuted"].mean)


def kept(found: Ticket, names: list[str]) -> list[int]:
    return torch.cat([found.masks[name].flatten() for name in names]).nonzero().flatten().tolist()


def best(scores: Params) -> list[int]:
    flat = torch.cat([score.flatten() for score in scores.values()])
    return sorted(flat.argsort(descending=True)[: num_kept(WEIGHTS, SPARSITIES[1])].tolist())


def test_whatever_callbacks_there_are_the_rule_names_the_results(parts: None) -> None:
    Path("more.yaml").write_text("trainer:\n  callbacks:\n    - lightning_bpfree.GradientAlignment\n" + ES + LEVELS)
    base, targets = studies(["-c", "base.yaml", "-c", "more.yaml"])
    assert (base.rule, targets) == ("EvolutionStrategy", [])


def test_every_overlay_is_a_target_once(parts: None) -> None:
    Path("more").mkdir()
    Path("more/zo.yaml").write_text(ZEROTH)
    Path("zo.yaml").write_text(ZEROTH)
    _, targets = studies(["-c", "base.yaml", "--transfer", "z*.yaml", "bp.yaml", "more/zo.yaml"])
    assert [target.rule for target in targets] == ["bp", "zo", "zo-2"]
    for target in targets:
        rules = [callback.class_path.rpartition(".")[2] for callback in target.blueprint.callbacks]
        assert rules == ["LotteryTicket", "Backprop" if target.rule == "bp" else "ZerothOrder"]


def studies(arguments: list[str]) -> tuple[Study, list[Study]]:
    options, overrides = tickets._parser().parse_known_args([*arguments, "--out", "out"])
    return tickets._studies(options, overrides)


def test_the_recipe_and_its_overlays_go_together() -> None:
    recipe = "papers/es_lottery_tickets"
    for overlay, data, epochs in ((None, "Digits", 80), ("fashion_mnist", "FashionMNIST", 4)):
        more = [] if overlay is None else ["-c", f"{recipe}/{overlay}"]
        base, (target,) = studies(["-c", recipe, *more, "--transfer", f"{recipe}/gradient_descent"])
        assert (base.rule, target.rule) == ("EvolutionStrategy", "gradient_descent")
        for study in (base, target):
            config = study.blueprint.config
            assert config.data.class_path.endswith(f".{data}DataModule")
            assert (study.num_levels, study.arguments["epochs_per_level"]) == (9, epochs)
            assert config.trainer.max_epochs == 9 * epochs
        assert [part.blueprint.config.model.init_args.optimizer for part in (base, target)] == ["sgd", "adam"]
    assert (recipes.folder() / f"{recipe}/gradient_descent.yaml").exists()


# --- mistakes ---

ALONE = "--trainer.callbacks=lightning_bpfree.{}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([ALONE.format("Backprop")], ["no LotteryTicket", "papers/es_lottery_tickets"]),
        ([ALONE.format("LotteryTicket")], ["one training rule", "it has none"]),
        (["--trainer.callbacks+=lightning_bpfree.Backprop"], ["one training rule", "EvolutionStrategy, Backprop"]),
        (["--transfer", "loggers/csv"], ["overlay csv", "it brings none"]),
        (["--transfer", "rules/backprp"], ["rules/backprop"]),
        (["--trainer.callbacks.sparsities=[0.3, 0.5]"], ["kind snr", "0.0"]),
        (["--trainer.callbacks.sparsities=[0.5, 0.3]"], ["sparsities=[0.5, 0.3]"]),
        (["--kinds", "random", "snr"], ["snr, magnitude, snip", "--no-connectivity"]),
        (["--kinds", "fresh", "--no-connectivity", "--transfer", "bp.yaml"], ["snr, magnitude, snip first"]),
        (["--trainer.nonsense=1"], ["nonsense"]),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    parts: None, arguments: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tickets", "-c", "base.yaml", "--out", "out", *arguments]) == 2
    message = capsys.readouterr().err
    assert all(words in message for words in said), message
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metric", "test_f1", "--out", "out"], ["test_f1", "test_acc, test_loss"]),
        (["--out", "base.yaml/out"], ["cannot write", "base.yaml/out", "--out"]),
        (
            ["--model.init_args.net=test_cli_tickets.Normed", "--out", "out"],
            ["running statistics", "--no-connectivity"],
        ),
        (["--transfer", "wide.yaml", "--out", "out"], ["wide", "other parameters than the base's"]),
        (["--transfer", "EvolutionStrategy.yaml", "--out", "out"], ["the base's rule has this name"]),
    ],
)
def test_nothing_is_trained_in_vain(
    parts: None,
    arguments: list[str],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Study, "levels", lambda *_: pytest.fail("training began"))
    Path("EvolutionStrategy.yaml").write_text(BACKPROP)
    Path("wide.yaml").write_text(BACKPROP.replace("optimizer: adam", "net: {init_args: {hidden: [9]}}"))
    assert main(["tickets", "-c", "base.yaml", *arguments]) == 2
    message = capsys.readouterr().err
    assert all(words in message for words in said), message


def test_a_layer_without_weights_stops_a_study_in_one_line(parts: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-c", "base.yaml", "--kinds", "magnitude", *OUT, "out"]
    assert main(["tickets", *arguments, "--trainer.callbacks.sparsities=[0, 0.99]"]) == 2
    message = capsys.readouterr().err
    assert "EvolutionStrategy, magnitude, seed 3: LotteryTicket, level 1 of 2" in message
    assert "scope='layer'" in message


def test_a_rule_without_deviations_has_no_snr(parts: None, capsys: pytest.CaptureFixture[str]) -> None:
    Path("zo.yaml").write_text("trainer:\n  callbacks:\n    - lightning_bpfree.ZerothOrder\n" + LEVELS)
    assert main(["tickets", "-c", "base.yaml", "-c", "zo.yaml", *OUT, "out"]) == 2
    assert "score='magnitude'" in capsys.readouterr().err


def test_files_and_kinds_must_be_given_and_known(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--out", "out"], ["-c", "base.yaml"], ["-c", "base.yaml", "--out", "o", "--kinds", "best"]):
        with pytest.raises(SystemExit) as stopped:
            main(["tickets", *arguments])
        assert stopped.value.code == 2
        assert "usage: bpfree tickets" in capsys.readouterr().err


# --- statistics, by hand ---

VALUES = {  # (rule, tickets, level): one a seed
    ("ES", "snr", 0): [0.9, 0.8, 0.7],
    ("ES", "snr", 1): [0.8, 0.7, 0.9],
    ("ES", "random", 0): [0.9, 0.8, 0.7],
    ("ES", "random", 1): [0.5, 0.6, 0.7],
    ("ES", "snr_again", 1): [0.1, 0.1, 0.1],
    ("bp", "magnitude", 0): [1.0, 1.0, 1.0],
    ("bp", "magnitude", 1): [0.5, 0.6, 0.7],
    ("bp", "snr_of_ES", 1): [0.6, 0.6, 0.6],
}
LEFT = [1.0, 0.25]


def by_hand() -> dict[str, Any]:
    """A study of two levels and three seeds, whose statistics are easy to calculate."""
    entries = [
        {
            "rule": rule,
            "tickets": kind,
            "seed": seed,
            "level": level,
            "weights_left": LEFT[level],
            "kept": 100 * LEFT[level],
            "value": values[seed],
            "forward_evals": 10.0,
            "seconds": 1.0,
        }
        for seed in range(3)
        for (rule, kind, level), values in VALUES.items()
    ]
    lines = [
        {
            "rule": "ES",
            "tickets": "snr",
            "between": between,
            "seed": seed,
            "level": level,
            "weights_left": LEFT[level],
            "metric": {"barrier": 0.01 * seed + 0.1 * level},
            "loss": {"barrier": 0.5},
        }
        for seed in range(3)
        for between, level in (("levels", 1), ("seeds", 0), ("seeds", 1))
    ]
    settings = {"metric": "test_acc", "seeds": [0, 1, 2], "rule": "ES", "kinds": ["snr", "random"]}
    where = {"command": ["bpfree", "tickets"], "date": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.13.0"}}
    return {**settings, **where, "machine": {"threads": 1}, "runs": entries, "barriers": lines}


def test_statistics_by_hand() -> None:
    study = by_hand()
    found = cells(study)
    assert list(found) == [("ES", "snr"), ("ES", "random"), ("bp", "magnitude"), ("bp", "snr_of_ES")]
    assert found["ES", "snr"] == {1.0: [0.9, 0.8, 0.7], 0.25: [0.8, 0.7, 0.9]}
    # 0.8-0.5, 0.7-0.6, 0.9-0.7: mean 0.2, standard deviation 0.1, t = 4.303: 4.303 * 0.1 / sqrt(3) = 0.248
    assert differences(study) == {
        ("ES", "snr - random"): {1.0: [0.0] * 3, 0.25: pytest.approx([0.3, 0.1, 0.2])},
        ("bp", "snr_of_ES - magnitude"): {0.25: pytest.approx([0.1, 0.0, -0.1])},
    }
    heads, rows = table_rows(study)
    assert heads == ["rule", "tickets", "100 %", "25 %"]
    assert rows == [
        ["ES", "snr", "0.800 ± 0.248", "0.800 ± 0.248"],
        ["ES", "random", "0.800 ± 0.248", "0.600 ± 0.248"],
        ["bp", "magnitude", "1.000 ± 0.000", "0.600 ± 0.248"],
        ["bp", "snr_of_ES", "-", "0.600 ± 0.000"],
        ["ES", "snr - random", "+0.000 ± 0.000", "+0.200 ± 0.248"],
        ["bp", "snr_of_ES - magnitude", "-", "+0.000 ± 0.248"],
    ]
    assert barrier_rows(study) == (
        ["rule", "between", "100 %", "25 %"],
        [["ES", "levels", "-", "0.110 ± 0.025"], ["ES", "seeds", "0.010 ± 0.025", "0.110 ± 0.025"]],
    )
    assert barrier_rows(study, "loss")[1][0] == ["ES", "levels", "-", "0.500 ± 0.000"]


def test_differences_are_paired_by_seed_whatever_the_order() -> None:
    study = by_hand()
    study["runs"] = [run for run in reversed(study["runs"]) if (run["tickets"], run["seed"]) != ("random", 1)]
    assert {level: sorted(values) for level, values in differences(study)["ES", "snr - random"].items()} == {
        1.0: [0.0, 0.0],
        0.25: pytest.approx([0.2, 0.3]),
    }


def test_written_values() -> None:
    values = [0.9, 0.92, 0.97]
    assert written(values) == f"{statistics.fmean(values):.3f} ± {confidence(values):.3f}"
    assert written([0.5]) == "0.500"
    assert written([-0.5], signed=True) == "-0.500"
    assert written([0.5, None, None]) == "0.500 (2 failed)"
    assert written([None, 0.5, 0.5]) == "0.500 ± 0.000 (1 failed)"
    assert written([None]) == "failed"


def test_what_is_not_finite_is_told_and_left_out(tmp_path: Path) -> None:
    study = by_hand()
    for run in study["runs"]:
        if (run["tickets"], run["level"]) == ("random", 1) and run["seed"] > 0:
            run["value"] = float("nan")
        if run["tickets"] == "snr_of_ES":
            run["value"] = float("inf")
    study = finite(study)
    tickets_results.write(study, tmp_path)
    assert results(tmp_path) == study
    rows = {row[1]: row[2:] for row in table_rows(study)[1]}
    assert rows["random"] == ["0.800 ± 0.248", "0.500 (2 failed)"]
    assert rows["snr_of_ES"] == ["-", "failed"]
    assert rows["snr - random"] == ["+0.000 ± 0.000", "+0.300 (2 failed)"]
    assert len(tickets_results.plots(study, tmp_path)) == 3


def test_a_line_with_a_point_that_is_not_finite_has_no_barrier() -> None:
    class Broken(Counted):
        def barriers(self, one: Path, other: Path) -> dict[str, Any]:
            losses = iter([0.0, float("nan"), 1.0])
            return {"metric": loss_barrier(lambda _: next(losses), {}, {}, 3)}

    options = argparse.Namespace(kinds=["snr"], seeds=[0], no_connectivity=False)
    entries = [entry for kind, entry in tickets.parts(Broken("ES", 2), [], options) if kind == "barrier"]
    assert [entry["metric"]["values"] for entry in entries] == [[0.0, None, 1.0]] * 3
    assert [entry["metric"]["barrier"] for entry in entries] == [None] * 3
    json.dumps(entries, allow_nan=False)


def test_both_tables_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    study = by_hand()
    tickets_results.show(study)
    shown = capsys.readouterr().out
    assert "test_acc of trained tickets" in shown
    assert "snr - random" in shown
    assert "barriers of test_acc" in shown
    assert "over 3 seed(s)" in shown
    tickets_results.show({**study, "barriers": []})
    assert "barriers" not in capsys.readouterr().out


# --- plots and pages ---


def test_plots_have_labelled_axes() -> None:
    found = dict(figures(by_hand()))
    assert list(found) == ["pruning", "transfer", "connectivity"]
    for name, lines in {"pruning": ["snr", "random"], "transfer": ["magnitude", "snr of ES"]}.items():
        (axes,) = found[name].axes
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("weights left, %", "test_acc")
        assert axes.get_title() == f"tickets trained by {'ES' if name == 'pruning' else 'bp'}"
        assert [text.get_text() for text in axes.get_legend().get_texts()] == lines
    left, right = found["connectivity"].axes
    for axes in (left, right):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("weights left, %", "barrier of test_acc")
        assert axes.xaxis_inverted()
        assert [label.get_text() for label in axes.get_xticklabels()] == ["100", "25"]
    assert (left.get_title(), right.get_title()) == (
        "between neighbouring levels",
        "between two trainings of a ticket",
    )
    line = found["pruning"].axes[0].lines[0]
    assert list(line.get_ydata()) == pytest.approx([0.8, 0.8])
    assert list(line.get_xdata()) == pytest.approx([100, 25], rel=0.02)  # a little aside


def test_ticks_are_levels_with_room_between_them(tmp_path: Path) -> None:
    left = [0.8**level for level in range(20)]
    study = by_hand()
    study["runs"] = [
        {**study["runs"][0], "level": level, "weights_left": share, "seed": seed}
        for level, share in enumerate(left)
        for seed in range(3)
    ]
    figure = dict(figures(study))["pruning"]
    figure.savefig(tmp_path / "plot.png")  # places the labels
    labels = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert [label.get_text() for label in labels][:3] == ["100", "64", "41"]
    boxes = [label.get_window_extent() for label in labels]
    assert all(one.x1 + 3 < other.x0 for one, other in itertools.pairwise(boxes))


def test_a_study_of_one_level_has_no_lines_between_levels(tmp_path: Path) -> None:
    study = by_hand()
    for key in ("runs", "barriers"):
        study[key] = [entry for entry in study[key] if entry["level"] == 0]
    tickets_results.plots(study, tmp_path)  # and no warning
    (axes,) = dict(figures(study))["connectivity"].axes
    assert axes.get_title() == "between two trainings of a ticket"


def pages() -> Any:
    specification = importlib.util.spec_from_file_location("make_results", DOCS / "make_results.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_pages_show_what_a_study_has_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, docs = pages(), tmp_path / "docs"
    for name, folder in {"DOCS": docs, "RESULTS": docs / "results", "IMAGES": docs / "img"}.items():
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(made, name, folder)
    (tmp_path / "README.md").write_text("<!-- results:es_study -->\n<!-- /results -->\n")
    (docs / "results/es_study.json").write_text(json.dumps(by_hand()))
    assert made.main(["--check"]) == 1
    assert made.main([]) == 0
    assert made.main(["--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "**`test_acc` of trained tickets, by weights left**" in text
    assert "| rule | tickets | 100 % | 25 % |" in text
    assert "| ES | snr - random | +0.000 ± 0.000 | +0.200 ± 0.248 |" in text
    assert "**Barriers of `test_acc`" in text
    assert "**Barriers of `test_loss`" in text
    assert "| ES | levels | - | 0.500 ± 0.000 |" in text
    assert "3 seeds, mean" in text
    for name in ("pruning", "transfer", "connectivity"):
        assert f"(docs/img/es_study_{name}.png)" in text
        assert (docs / f"img/es_study_{name}.png").read_bytes().startswith(b"\x89PNG")
    (docs / "results/es_study.json").write_text(json.dumps({**by_hand(), "seeds": [0, 1]}))
    assert made.main(["--check"]) == 1


@pytest.mark.parametrize("change", ["none", "two targets", "no target", "no lines", "a metric without a loss"])
def test_images_are_named_as_they_are_drawn(change: str) -> None:
    study = by_hand()
    if change == "two targets":
        study["runs"] += [{**run, "rule": "another_one"} for run in study["runs"] if run["rule"] == "bp"]
    if change == "no target":
        study["runs"] = [run for run in study["runs"] if run["rule"] == "ES"]
    if change == "no lines":
        study["barriers"] = []
    if change == "a metric without a loss":
        for entry in study["barriers"]:
            del entry["loss"]
    made = pages()
    path = Path("es_study.json")
    captions = made.images(path, study)
    assert sorted(captions) == sorted(name for name, _ in importlib.import_module("studies").drawings(path, study))
    assert all("weights left" in caption for caption in captions.values())
    tables = made.study_tables(study, made.table)
    assert len(tables) == {"no lines": 2, "a metric without a loss": 4}.get(change, 6)
