"""`bpfree tickets`: kinds and overlays, the plan of a study, and mistakes found before it trains."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from ticket_problems import BACKPROP, ES, LEVELS, OUT, SPARSITIES, WEIGHTS, Counted, equal, results, ticket

from lightning_bpfree import Ticket
from lightning_bpfree.cli import main
from lightning_bpfree.cli.common import recipes
from lightning_bpfree.cli.tickets import command as tickets
from lightning_bpfree.cli.tickets.options import parser as options_parser
from lightning_bpfree.cli.tickets.runs import KINDS, Study, plan_of
from lightning_bpfree.core.params import Params
from lightning_bpfree.methods.lottery_ticket.pruning import num_kept

pytestmark = pytest.mark.slow  # each trains several levels


ZEROTH = "trainer: {callbacks+: [{class_path: lightning_bpfree.ZerothOrder}]}\n"


# --- the command -----------------------------------------------------------------------------------------------------


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
    options, overrides = options_parser().parse_known_args([*arguments, "--out", "out"])
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


# --- mistakes --------------------------------------------------------------------------------------------------------

ALONE = "--trainer.callbacks=lightning_bpfree.{}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([ALONE.format("Backprop")], ["no LotteryTicket", "papers/es_lottery_tickets"]),
        ([ALONE.format("LotteryTicket")], ["one training rule", "it contains none"]),
        (["--trainer.callbacks+=lightning_bpfree.Backprop"], ["one training rule", "EvolutionStrategy, Backprop"]),
        (["--transfer", "loggers/csv"], ["overlay csv", "it adds none"]),
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
            ["--model.init_args.net=ticket_problems.Normed", "--out", "out"],
            ["running statistics", "--no-connectivity"],
        ),
        (["--transfer", "wide.yaml", "--out", "out"], ["wide", "other parameters than the base network"]),
        (
            ["--transfer", "EvolutionStrategy.yaml", "--out", "out"],
            ["the rule of the base configuration has the same name"],
        ),
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
        assert main(["tickets", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("bpfree tickets: error: ")
        assert line.endswith("'bpfree tickets --help' shows the options.")
