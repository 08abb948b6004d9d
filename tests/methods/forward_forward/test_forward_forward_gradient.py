"""Blocks of Forward-Forward get the gradient of their own loss, and of no other."""

from __future__ import annotations

import copy

import pytest
import torch
from forward_forward_problems import by_hand, gradients, losses_by_hand, next_label, problem
from problems import Problem

import lightning_bpfree as bpf


@pytest.mark.parametrize("blocks", [[1, 1, 1], [3], [2, 1]])
def test_every_block_gets_the_gradient_of_its_own_loss(blocks):
    """One layer a block: Forward-Forward. Several: backprop on the goodness loss within the block, and no further."""
    module = problem()
    expected = by_hand(module, blocks, temperature=3.0)
    found = gradients(bpf.ForwardForward(blocks, negatives=next_label, temperature=3.0), module)
    assert found.keys() == expected.keys()  # the last layer gets none
    for name, gradient in expected.items():
        # Equal operations on equal numbers, but sums of squares that are taken in another way: float32 rounding.
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_integrated_blocks_of_one_layer_are_forward_forward_bit_for_bit():
    one = gradients(bpf.ForwardForward(1, seed=3))
    other = gradients(
        bpf.ForwardForward([["layers.0", "layers.1"], ["layers.2", "layers.3"], ["layers.4", "layers.5"]], seed=3)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_gradient_crosses_a_block():
    """Whatever later blocks hold, the earlier ones' gradients are the same to the bit."""
    plain = gradients(bpf.ForwardForward(seed=1))
    wild = problem()
    with torch.no_grad():
        wild.net.layers[2].weight.mul_(-50)
    changed = gradients(bpf.ForwardForward(seed=1), wild)
    for name in ("net.layers.0.weight", "net.layers.0.bias"):
        assert torch.equal(plain[name], changed[name])
    assert not torch.equal(plain["net.layers.2.weight"], changed["net.layers.2.weight"])


def test_the_next_block_cannot_read_the_goodness():
    plain = gradients(bpf.ForwardForward(seed=1))
    louder = problem()
    with torch.no_grad():  # twice the activity of the first block, and its direction
        louder.net.layers[0].weight.mul_(2)
        louder.net.layers[0].bias.mul_(2)
    changed = gradients(bpf.ForwardForward(seed=1), louder)
    for name in plain:
        if not name.startswith("net.layers.0"):
            assert torch.equal(plain[name], changed[name])  # a factor of two is exact in floating point


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_small_step_lowers_the_loss_of_its_block_by_the_squared_gradient(block):
    lr, module = 1e-4, problem(lr=1e-4)
    before = [float(loss.detach()) for loss, _ in losses_by_hand(module, [1, 1, 1])]
    alone = [1.0 if index == block else 0.0 for index in range(3)]  # or the block's input would move too
    found = gradients(bpf.ForwardForward(negatives=next_label, learning_rates=alone), module)
    after = [float(loss.detach()) for loss, _ in losses_by_hand(module, [1, 1, 1])]
    squared = sum(float(g.square().sum()) for name, g in found.items() if name.startswith(f"net.layers.{2 * block}."))
    # First order in lr: the curvature of the goodness is the rest, some per cent at this step.
    assert before[block] - after[block] == pytest.approx(lr * squared, rel=0.1)
    assert before[:block] == after[:block]


def test_swapping_positives_and_negatives_turns_the_step_around_at_the_threshold():
    """Where p = 1/2 for all, the gradient of one sample pair is the difference of two: swapping flips its sign."""

    class Swapped(Problem):
        def training_step(self, batch, index):
            x, y = batch
            return super().training_step([x, (y + 1) % 3], index)

    wide = {"temperature": 1e6}  # p is 1/2 to six digits, whatever the goodness
    one = gradients(bpf.ForwardForward(negatives=lambda x, y: (y + 1) % 3, **wide))
    other = gradients(bpf.ForwardForward(negatives=lambda x, y: (y + 2) % 3, labels=lambda b: (b[1] + 1) % 3, **wide))
    assert all(torch.isfinite(g).all() for g in one.values())
    back = gradients(bpf.ForwardForward(negatives=lambda x, y: (y - 1) % 3, labels=lambda b: (b[1] + 1) % 3, **wide))
    for name, gradient in one.items():
        torch.testing.assert_close(back[name], -gradient, rtol=1e-3, atol=1e-11)
        assert not torch.equal(other[name], -gradient) or not gradient.any()


def test_peer_normalization_pulls_on_silent_units_too():
    module = problem(depth=1)
    with torch.no_grad():
        module.net.layers[0].bias[0] = -100.0  # silent on everything
    without = gradients(bpf.ForwardForward(seed=1), copy.deepcopy(module))
    with_peers = gradients(bpf.ForwardForward(seed=1, peer_normalization=0.03), copy.deepcopy(module))
    assert not without["net.layers.0.bias"][0]
    assert float(with_peers["net.layers.0.bias"][0]) < 0  # descent raises it
