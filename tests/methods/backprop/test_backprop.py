"""`Backprop()` as a rule is plain Lightning, bit for bit."""

import pytest
import torch
from conformance import assert_equal, run, state
from problems import Problem, fitted, loader

from lightning_bpfree import Backprop


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 3},
    ],
    ids=str,
)
def test_bit_for_bit(settings):
    plain, one = run(None, max_epochs=2, **settings)
    ruled, two = run(Backprop, max_epochs=2, **settings)
    assert_equal(state(plain), state(ruled))
    assert one.global_step == two.global_step
    for key, value in one.callback_metrics.items():
        assert torch.equal(value, two.callback_metrics[key])
    for a, b in zip(plain.gradients, ruled.gradients, strict=True):
        assert_equal(a, b)


def test_it_evaluates_once_a_batch_and_costs_three_forwards():
    rule = Backprop()
    module, _ = run(lambda: rule)
    assert module.evaluations == 4
    assert rule.record.forward_evals == 12


def test_a_checkpoint_that_is_saved_behind_a_fit_goes_on_as_the_fit_would_have(tmp_path):
    torch.manual_seed(3)
    whole = Problem()
    fitted(whole, loader(shuffle=True), Backprop(), max_epochs=4)
    torch.manual_seed(3)
    fitted(Problem(), loader(shuffle=True), Backprop(), max_epochs=2).save_checkpoint(tmp_path / "two.ckpt")
    torch.manual_seed(99)  # the resumed process starts from another random state
    again = Problem()
    fitted(again, loader(shuffle=True), Backprop(), max_epochs=4, ckpt_path=tmp_path / "two.ckpt")
    assert_equal(state(whole), state(again))  # dropout and the order of the data included
