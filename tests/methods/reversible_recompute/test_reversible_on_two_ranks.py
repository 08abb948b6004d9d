"""Reversible stacks under the three modes of DDP: ranks agree, and train as one rank does on both halves of a batch."""

from __future__ import annotations

import pytest
import reversible_worker
import torch
from ranks import outcomes, run_ranks
from reversible_worker import MODES, SCHEDULES, train


@pytest.mark.slow  # processes that import torch and lightning
@pytest.mark.xdist_group("two_processes")
def test_three_modes_of_ddp_train_as_one_rank_does(tmp_path):
    run_ranks(reversible_worker.__file__, "ranks", tmp_path, limit=240)
    # Samples are dealt out in turns, so a batch of both ranks is a batch of one rank in another order.
    alone = {(schedule, n): train(None, schedule, n) for schedule in SCHEDULES for n in (1, 2)}
    for mode in MODES:
        for schedule in SCHEDULES:
            same = alone[schedule, 1 if mode == "static_graph" else 2]
            one, two = outcomes(tmp_path, f"{mode}.{schedule}")
            assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"]), mode
            for name, parameter in same.named_parameters():
                # Sums in another order: rounding of float64 over eight steps.
                torch.testing.assert_close(one["weights"][name], parameter.detach(), rtol=1e-11, atol=1e-12)
            layers = [int(name.split(".")[2]) for name in one["first step"] if name.startswith("encoder.layers")]
            # Gradients leave the stack block by block from the top, so that communication overlaps with the rest.
            assert layers == sorted(layers, reverse=True), mode
