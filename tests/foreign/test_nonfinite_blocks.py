"""A batch with numbers that are not finite moves nothing under rules that differentiate losses of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_problems import Small
from problems import fitted
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf

ROWS, BATCH = 12, 4


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
        )


class Module(Small):
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net() if net is None else net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def data(value: float | None, row: int = 5, rows: int = ROWS) -> DataLoader:
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
    if value is not None:
        x[row] = value
    return DataLoader(TensorDataset(x, torch.arange(rows) % 3), batch_size=BATCH)


def own_reward(_batch: Any, action: Tensor) -> Tensor:
    return (action == 0).float()


RULES: dict[str, Callable[..., bpf.TrainingRule]] = {
    "goodness": lambda **s: bpf.ForwardForward(**s),
    "readout": lambda **s: bpf.ForwardForward(prediction="readout", **s),
    "hard": lambda **s: bpf.ForwardForward(negatives="hard", **s),
    "peers": lambda **s: bpf.ForwardForward(peer_normalization=0.1, **s),
    "embedding": lambda **s: bpf.ForwardForward(label="embedding", **s),
    "team": lambda **s: bpf.TeamReinforce(**s),
    "team_critic": lambda **s: bpf.TeamReinforce(baseline="critic", **s),
    "team_per_layer": lambda **s: bpf.TeamReinforce(baseline="per_layer", **s),
    "team_lateral": lambda **s: bpf.TeamReinforce(exploration="boltzmann", **s),
    "team_recurrent": lambda **s: bpf.TeamReinforce(exploration="recurrent", **s),
    "team_weight_max": lambda **s: bpf.TeamReinforce(credit="weight_max", **s),
    "team_map": lambda **s: bpf.TeamReinforce(credit="map_propagation", unit="gaussian", **s),
    "team_loss": lambda **s: bpf.TeamReinforce(reward="loss", output=None, **s),
    "team_function": lambda **s: bpf.TeamReinforce(reward=own_reward, **s),
    "local": lambda **s: bpf.ForwardGradient(guess=bpf.LocalLoss(), target="local", **s),
    "guess": lambda **s: bpf.ForwardGradient(guess=bpf.LocalLoss(), **s),
}
BAD = {"nan": math.nan, "inf": math.inf}


def everything(module: nn.Module, rule: bpf.TrainingRule) -> dict[str, Tensor]:
    """All that learns: weights, running means, and what the rule keeps beside the module."""
    found = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            found[name] = value.clone()
        elif isinstance(value, dict):
            for key, item in value.items():
                collect(item, f"{name}/{key}")

    collect(rule.rule_state(), "rule")
    return found


def assert_finite(found: dict[str, Tensor]) -> None:
    for name, tensor in found.items():
        assert bool(tensor.isfinite().all()), name


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("name", RULES)
def test_raise_stops_before_anything_is_spoilt(name: str, bad: str) -> None:
    module, rule = Module(), RULES[name](seed=1)
    with pytest.raises(RuntimeError, match=r"in batch 1\. No parameter has changed.*on_nonfinite='skip'"):
        fitted(module, data(BAD[bad]), rule, limit_val_batches=0)
    assert_finite(everything(module, rule))


@pytest.mark.filterwarnings("ignore:.*is skipped")
@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("name", RULES)
def test_skip_leaves_the_batch_out(name: str, bad: str) -> None:
    module, rule = Module(), RULES[name](seed=1, on_nonfinite="skip")
    fitted(module, data(BAD[bad]), rule, limit_val_batches=0)
    assert rule.record.skipped == 1
    assert_finite(everything(module, rule))


@pytest.mark.filterwarnings("ignore:.*is skipped")
@pytest.mark.parametrize("name", RULES)
def test_a_skipped_last_batch_changes_nothing_at_all(name: str) -> None:
    found = []
    for limit, value in ((2, None), (3, math.nan)):
        module, rule = Module(), RULES[name](seed=1, on_nonfinite="skip")
        fitted(module, data(value, row=9), rule, limit_val_batches=0, limit_train_batches=limit)
        found.append(everything(module, rule))
    assert found[0].keys() == found[1].keys()
    for key, tensor in found[0].items():
        assert torch.equal(tensor, found[1][key]), key


@pytest.mark.filterwarnings("ignore:.*is skipped")
def test_traces_forget_the_batch() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    rule = bpf.TeamReinforce(trace_decay=0.5, num_samples=1, baseline="none", on_nonfinite="skip", seed=1)
    module = Module(net)
    fitted(module, data(math.nan), rule, limit_val_batches=0)
    assert_finite(everything(module, rule))
    assert rule.record.skipped == 1


def test_activities_that_overflow_are_found_before_they_are_differentiated() -> None:
    """Not the data alone: these are finite, and what the first layer makes of them is not."""
    module, rule = Module(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))), RULES["team"](seed=1)
    with pytest.raises(RuntimeError, match="No parameter has changed"):
        fitted(module, data(3e38, row=0), rule, limit_val_batches=0)
    assert_finite(everything(module, rule))
