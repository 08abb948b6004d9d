"""A reversible stack as a container, and what it looks for in which of its passes."""

from __future__ import annotations

import pytest
import torch
from reversible_problems import WIDTH, small
from torch import nn

from lightning_bpfree import ReversibleBlock, ReversibleSequential


def test_it_is_indexed_like_a_list():
    net = small(4)
    blocks = list(net)
    assert net[1:3] == blocks[1:3]
    assert net[-1] is blocks[3]
    assert net[::-1] == blocks[::-1]
    with pytest.raises(IndexError):
        net[4]


def test_lazy_modules_are_refused_until_they_are_made():
    net = ReversibleSequential([ReversibleBlock(nn.LazyLinear(WIDTH), nn.Linear(WIDTH, WIDTH))])
    x = torch.randn(3, WIDTH)
    with pytest.raises(RuntimeError, match=r"lazy module.*schedule='autograd'"):
        net(x)
    net.schedule = "autograd"
    net(x)
    net.schedule = "sequential"
    net(x).sum().backward()
    assert net[0].f.weight.grad is not None


def test_lost_gradients_are_looked_for_in_passes_1_2_4_and_8():
    class Closure(nn.Linear):
        factor = 1.0

        def forward(self, x):
            return super().forward(x) * self.factor

    branch = Closure(WIDTH, WIDTH)
    net, found = ReversibleSequential([ReversibleBlock(branch, nn.Linear(WIDTH, WIDTH))]), []
    for number in range(1, 10):
        branch.factor = torch.ones(WIDTH, requires_grad=True)
        try:
            net(torch.randn(3, WIDTH))
        except RuntimeError as error:
            assert "its gradient would be lost" in str(error)  # noqa: PT017
            found.append(number)
    assert found == [1, 2, 4, 8]
