"""`bpfree tickets`: one study, and what it trains and measures."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ticket_problems import OUT, SPARSITIES, WEIGHTS, blobs, equal, results, runs, ticket, write_parts
from torch.nn.functional import cross_entropy

from lightning_bpfree import Ticket
from lightning_bpfree.cli import main
from lightning_bpfree.cli.common.configured import Blueprint
from lightning_bpfree.cli.tickets import results as tickets_results
from lightning_bpfree.cli.tickets import runs as tickets_runs
from lightning_bpfree.cli.tickets.runs import AGAIN, Study
from lightning_bpfree.core.params import Params
from lightning_bpfree.demos.modules import MLP, Classifier
from lightning_bpfree.methods.lottery_ticket.connectivity import loss_barrier
from lightning_bpfree.methods.lottery_ticket.pruning import num_kept
from lightning_bpfree.training.quiet_lightning import quiet_lightning

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("study_of_tickets")]  # each trains several levels


POINTS = 5  # on a line, for speed


def classifier() -> Classifier:
    return Classifier(MLP(4, [8], 3), num_classes=3)


def loss_and_accuracy(module: torch.nn.Module) -> tuple[float, float]:
    inputs, labels = blobs(1, 200)
    with torch.no_grad():
        logits = module(inputs)
    return float(cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


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
    with quiet_lightning():
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
    assert main(["tickets", "-c", "base.yaml", *OUT, "out"]) == 130
    found = results()
    assert comparable(found) == comparable(trained)[:1]
    assert found["barriers"] == []
    with Path("out/tickets.csv").open() as file:
        assert [line["level"] for line in csv.DictReader(file)] == ["0"]
    assert not list(Path("out").glob("*.tmp"))
