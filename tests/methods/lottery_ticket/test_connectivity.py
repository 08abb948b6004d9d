"""Barriers on functions whose shape is known, and evaluation that leaves the module as it was."""

import pytest
import torch
from torch import nn

from lightning_bpfree.methods.lottery_ticket.connectivity import interpolate, loss_barrier, module_loss


def test_ends_are_exact():
    a, b = {"w": torch.randn(7)}, {"w": torch.randn(7)}
    assert torch.equal(interpolate(a, b, 1.0)["w"], a["w"])
    assert torch.equal(interpolate(a, b, 0.0)["w"], b["w"])
    torch.testing.assert_close(interpolate(a, b, 0.25)["w"], 0.25 * a["w"] + 0.75 * b["w"])


def test_a_convex_loss_has_no_barrier():
    h = torch.logspace(-2, 2, 20, dtype=torch.float64)
    a, b = ({"w": torch.randn(20, dtype=torch.float64)} for _ in range(2))
    found = loss_barrier(lambda p: (h * p["w"].square()).sum(), a, b)
    assert found.barrier <= 0
    assert found.alphas[0] == 0
    assert found.alphas[-1] == 1
    assert len(found.values) == 11


def test_a_double_well_by_hand():
    def well(p):
        return (p["x"] ** 2 - 1) ** 2 + 0.5 * p["x"]

    ends = [{"x": torch.tensor(x, dtype=torch.float64)} for x in (1.0, -1.0)]
    found = loss_barrier(well, *ends, num_points=5)  # at x = -1, -1/2, 0, 1/2, 1
    assert found.values == pytest.approx([-0.5, 0.5625 - 0.25, 1.0, 0.5625 + 0.25, 0.5])
    assert found.barrier == pytest.approx(1.0)  # at 0, where the line between the ends is at 0
    assert found.barrier_from_mean == pytest.approx(1.0)
    tilted = loss_barrier(lambda p: 3 * p["x"], *ends, num_points=3)
    assert tilted.barrier == pytest.approx(0)
    assert tilted.barrier_from_mean == pytest.approx(3.0)


def test_the_loss_of_a_module_leaves_it_as_it_was():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    net[1].eval()
    own = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    batches = [torch.randn(8, 3) for _ in range(3)]
    moved = {name: p.detach() + 0.3 for name, p in net.named_parameters()}
    found = {}
    for batch_statistics in (False, True):
        evaluate = module_loss(net, batches, lambda net, x: net(x).square().mean(), batch_statistics=batch_statistics)
        found[batch_statistics] = evaluate(moved)
        assert evaluate(moved) == found[batch_statistics]
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, own[name])
    assert [part.training for part in net] == [True, False, True]
    net.load_state_dict({**own, **moved})
    for batch_statistics, value in found.items():
        net.train(batch_statistics)
        assert sum(float(net(x).square().mean().detach()) for x in batches) / 3 == pytest.approx(value, rel=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="different names: v, w"):
        interpolate({"w": torch.ones(1)}, {"v": torch.ones(1)}, 0.5)
    with pytest.raises(ValueError, match="num_points=2"):
        loss_barrier(lambda p: 0.0, {}, {}, num_points=2)
    net = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="batches is empty"):
        module_loss(net, [], lambda net, x: net(x).mean())(dict(net.named_parameters()))
