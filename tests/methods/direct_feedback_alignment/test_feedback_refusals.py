"""Direct feedback alignment: what it refuses, with the cure."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import Problem, fitted, loader
from torch import Tensor, nn

import lightning_bpfree as bpf


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"feedback": "random"}, "feedback='random': choose 'direct' or 'layerwise'"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"scale": float("nan")}, "scale=nan"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, object], said: str):
    with pytest.raises(ValueError, match=said):
        bpf.DirectFeedbackAlignment(**arguments)


class Pair(nn.Sequential):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y, y * 2


class Scalar(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum()


class First(Problem):
    def training_step(self, batch, index):
        out = self.net(batch[0])
        return F.cross_entropy(out[0], batch[1]) if isinstance(out, tuple) else out


class Around(Problem):
    def training_step(self, batch, index):
        x = batch[0]
        for layer in self.net:
            x = layer(x)
        return F.cross_entropy(x, batch[1])


class OnlyNow(Problem):
    def training_step(self, batch, index):
        hidden = self.net[:2](batch[0])
        return F.cross_entropy(self.net(batch[0]), batch[1]) + self.net[2:](hidden).mean()


class Hard(Problem):
    def training_step(self, batch, index):
        return (self.net(batch[0]).argmax(1) == batch[1]).float().mean()


def recurrent() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x[:, None])[0][:, -1]

    return nn.Sequential(nn.Linear(6, 8), Last(), nn.Linear(8, 3))


REFUSED = {
    "two outputs": (lambda: First(Pair(*chain())), {}, "returns 2 tensors of numbers.*network="),
    "a scalar": (lambda: First(Scalar(*chain())), {}, r"returns 1 tensors of numbers \(\(\)\)"),
    "never called": (lambda: Around(chain()), {}, "never called its network"),
    "blocks outside of a call": (lambda: OnlyNow(chain()), {}, "ran outside of a call of the network"),
    "a loss without derivative": (lambda: Hard(chain()), {}, "argmax.*ZerothOrder"),
    "a recurrent layer": (lambda: Problem(recurrent()), {"feedback": "layerwise"}, r"1.lstm \(LSTM\).*'direct'"),
    "padding by name": (
        lambda: Problem(
            nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3, padding="same"), nn.Flatten(), nn.Linear(12, 3))
        ),
        {"feedback": "layerwise"},
        r"1 \(Conv1d\).*number of zeros",
    ),
    "a matrix of another shape": (
        lambda: Problem(chain()),
        {"matrices": lambda name, shape: torch.zeros(2, 2)},
        r"matrices\('0', \(8, 3\)\) returned a tensor of shape \(2, 2\)",
    ),
    "another number of factors": (lambda: Problem(chain()), {"learning_rates": [1.0]}, "one factor for each of the 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_rule_and_cure(case: str):
    make, arguments, said = REFUSED[case]
    with pytest.raises((MisconfigurationException, ValueError), match=said):
        fitted(make(), loader(), bpf.DirectFeedbackAlignment(**arguments))


def test_a_subclass_is_named_in_errors():
    class Mine(bpf.DirectFeedbackAlignment):
        pass

    with pytest.raises(MisconfigurationException, match=r"^Mine: the training step never called"):
        fitted(Around(chain()), loader(), Mine())


def test_samples_come_first():
    class TimeFirst(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[None].expand(5, -1, -1)).mean(0)

    with pytest.raises(MisconfigurationException, match=r"block 0 gives \(5, 16, 8\) and the network \(16, 3\)"):
        fitted(Problem(TimeFirst(*chain())), loader(), bpf.DirectFeedbackAlignment())
