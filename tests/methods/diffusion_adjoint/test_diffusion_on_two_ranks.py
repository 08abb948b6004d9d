"""Fine-tuning under DDP: ranks agree, and train as one rank does on the union of their batches."""

from __future__ import annotations

import diffusion_worker
import pytest
import torch
from diffusion_worker import CASES, train
from ranks import outcomes, run_ranks


@pytest.mark.slow  # processes that import torch, lightning and diffusers
def test_two_ranks_are_one_with_the_union_batch(tmp_path):
    run_ranks(diffusion_worker.__file__, "ranks", tmp_path, limit=240)
    for case in CASES:
        one, two = outcomes(tmp_path, case)
        assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"]), case
        alone = {name: p.detach() for name, p in train(case, 1).named_parameters() if p.requires_grad}
        assert set(alone) == set(one["weights"])
        for name, parameter in alone.items():
            # Sums in another order, in float64, over four steps of a network that computes times in float32.
            torch.testing.assert_close(one["weights"][name], parameter, rtol=1e-9, atol=1e-11)
