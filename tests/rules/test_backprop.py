"""`Backprop()` as a rule is plain Lightning, bit for bit."""

import pytest
import torch
from conformance import assert_equal, run, state

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
