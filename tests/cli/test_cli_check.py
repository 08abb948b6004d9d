"""`bpfree check`: who can train the module, at what cost, and what stands in the way; nothing is trained or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from shipped import network_rules, shipped_rules
from torch import nn

from lightning_bpfree.cli import main
from lightning_bpfree.cli.check import Cost, Verdict, check
from lightning_bpfree.cli.common.configured import Blueprint

Overlay = Callable[..., str]
HERE = "test_cli_check"
NEED_LAYERS = {f"{kind.__name__}()" for kind in network_rules()}  # one layer has neither blocks nor units


class Linear(LightningModule):
    """Digits by one layer; minds being trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def training_step(self, batch: Any) -> Any:
        x, y = batch
        loss = nn.functional.cross_entropy(self.layer(x.flatten(1)), y)
        self.log("train_loss", loss)
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pytest.fail("check has trained")


class Bag(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 64)

    def training_step(self, batch: Any) -> Any:
        x, y = batch
        return nn.functional.cross_entropy(self.layer(self.bag(x.flatten(1).clamp(0, 19).long())), y)


class Manual(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Accuracy(Linear):
    def training_step(self, batch: Any) -> Any:
        x, y = batch
        return (self.layer(x.flatten(1)).argmax(1) == y).float().mean()


class NeedsFullEpochs(Linear):
    def on_train_batch_end(self, *_: Any) -> None:
        self.ended = True

    def on_train_epoch_end(self) -> None:
        assert self.ended, "an epoch without a batch"


class Faulty(Linear):
    def training_step(self, batch: Any) -> Any:
        raise ZeroDivisionError("in the user's step")


def verdicts(*arguments: str) -> dict[str, Verdict]:
    return {verdict.rule: verdict for verdict in check(Blueprint(arguments), repeats=1)}


def model(name: str) -> str:
    return f"--model={HERE}.{name}"


def cost(verdict: Verdict) -> Cost:
    assert verdict.cost is not None, verdict.obstacle
    return verdict.cost


def test_every_rule_can_train_a_plain_module(base: str) -> None:
    found = verdicts("-c", base)
    assert set(found) == {f"{kind.__name__}()" for kind in shipped_rules()}
    assert all(verdict.obstacle == "" for verdict in found.values())
    assert all(cost(verdict).forward_evals >= 1 and cost(verdict).time_ratio > 1 for verdict in found.values())
    assert cost(found["Backprop()"]).forward_evals == 3


def test_nothing_is_trained_and_nothing_written(digits: str, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    found = verdicts("-c", digits, model("Linear"), "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint")
    assert {name for name, verdict in found.items() if not verdict.cost} == NEED_LAYERS
    assert sorted(folder.rglob("*")) == before


def test_rules_of_the_configuration_keep_their_settings(base: str, overlay: Overlay) -> None:
    rule = overlay("zo.yaml", "ZerothOrder", num_directions=5, scheme="forward", start_epoch=3)
    probe = overlay("probe.yaml", "GradientAlignment", every_n_steps=1)
    found = verdicts("-c", base, "-c", rule, "-c", probe)
    assert cost(found["ZerothOrder as configured"]).forward_evals == 6
    assert cost(found["ZerothOrder()"]).forward_evals == 3
    assert cost(found["Backprop()"]).forward_evals == 3


def test_a_layer_without_forward_derivative_stops_one_rule_with_the_cure(digits: str) -> None:
    found = verdicts("-c", digits, model("Bag"))
    assert found["ForwardGradient()"].cost is None
    assert "bag (EmbeddingBag)" in found["ForwardGradient()"].obstacle
    assert "nn.Embedding" in found["ForwardGradient()"].obstacle
    assert found["ZerothOrder()"].cost
    assert found["Backprop()"].cost


def test_manual_optimization_stops_every_rule(digits: str) -> None:
    found = verdicts("-c", digits, model("Manual"))
    assert all(verdict.cost is None and "automatic_optimization" in verdict.obstacle for verdict in found.values())


def test_a_loss_without_derivative_leaves_zeroth_order(digits: str) -> None:
    found = verdicts("-c", digits, model("Accuracy"))
    assert found["ZerothOrder()"].cost
    assert "does not require grad" in found["Backprop()"].obstacle
    assert "No tangent arrives" in found["ForwardGradient()"].obstacle


def test_the_modules_own_hooks_are_no_obstacle(digits: str) -> None:
    found = verdicts("-c", digits, model("NeedsFullEpochs"))
    assert {name for name, verdict in found.items() if not verdict.cost} == NEED_LAYERS


def test_precision_is_the_configurations(base: str) -> None:
    rule = ["--trainer.callbacks+=ZerothOrder", "--trainer.callbacks.sigma=1e-4"]
    found = verdicts("-c", base, "--trainer.precision=bf16-true", *rule)
    assert "bfloat16" in found["ZerothOrder as configured"].obstacle
    assert found["ZerothOrder()"].cost


def test_the_command_prints_a_table_and_takes_recipes(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "-c", base, "-c", "rules/zeroth_order", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "ZerothOrder as configured" in out
    assert "time a step" in out


def test_obstacles_are_a_report_not_a_failure(digits: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "-c", digits, model("Manual"), "--repeats", "1"]) == 0
    assert capsys.readouterr().out.count("│ no ") == len(shipped_rules())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.init_args.lr=-1"], "lr=-1"),
        (["--data.init_args.train_size=100000"], "train_size is 100000"),
        (["--model.init_args.nonsense=1"], "nonsense"),
        (["--repeats", "0"], "--repeats"),
    ],
)
def test_a_broken_configuration_is_one(
    base: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "-c", base, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_faulty_step_is_told_once(digits: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "-c", digits, model("Faulty")]) == 2
    assert capsys.readouterr().err.count("ZeroDivisionError: in the user's step") == 1
