"""Slopes along one direction or many at a time, and the choice between the two."""

from __future__ import annotations

from functools import partial

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_bpfree.core.directions import Directions
from lightning_bpfree.core.forward_ad import directional_derivative, directional_derivatives
from lightning_bpfree.core.params import Params
from lightning_bpfree.core.step import Step
from lightning_bpfree.core.vectorizing import first_line, timed, vectorizes_badly
from lightning_bpfree.methods.forward_gradient.block_passes import DUAL_COST

LARGEST_AUTO_CHUNK = 8  # 2.125 instead of 3 forwards a direction; more chunk saves little and costs memory


def along_one(step: Step, params: Params, direction: Params) -> Tensor:
    """Return the slope along one direction; the first evaluation is the recorded one."""
    loss_fn = partial(step.loss, recorded=True, cost=DUAL_COST)
    return directional_derivative(loss_fn, params, direction)[1]


def along_many(step: Step, params: Params, stacked: Params) -> tuple[Tensor, Tensor]:
    """Return the loss and the slopes along stacked directions; nothing is recorded."""
    step.rewind()
    step.forward_evals += 1 + 2 * len(next(iter(stacked.values())))
    return directional_derivatives(step.loss_under_transform, params, stacked)


def chosen_chunk(step: Step, params: Params, directions: Directions, fastest: bool) -> int:
    """Return the chunk: try a vectorized pass at the first batch, and loop if it fails or changes the dropout mask.

    Args:
        step: the step.
        params: the trained parameters.
        directions: all of a batch.
        fastest: whether to time both ways, unless algorithms have to be deterministic.
    """
    ks = range(min(len(directions), LARGEST_AUTO_CHUNK))
    by_clock = fastest and not torch.are_deterministic_algorithms_enabled()
    if not by_clock and vectorizes_badly(step.module):
        return 1
    counted = step.forward_evals
    loss = step.loss()
    stacked = directions.stack(ks)
    try:
        vectorized, (again, _) = timed(lambda: along_many(step, params, stacked), loss.device, 3 if by_clock else 1)
    except Exception as error:  # of any kind: the loop remains
        rank_zero_info(f"ForwardGradient: directions one by one, since vectorizing fails: {first_line(error)}")
        return 1
    finally:
        step.forward_evals = counted + 1
    if not torch.allclose(again.float(), loss.float(), rtol=1e-3):
        rank_zero_info("ForwardGradient: directions one by one, since vectorizing draws another dropout mask.")
        return 1
    if not by_clock:
        return len(ks)
    loop, _ = timed(lambda: along_one(step, params, directions[0]), loss.device, 3)
    step.forward_evals = counted + 1
    chosen = len(ks) if vectorized < loop * len(ks) else 1
    rank_zero_info(
        f"ForwardGradient: {len(ks)} directions take {vectorized:.3g} s in one pass, {loop * len(ks):.3g} s one by "
        f"one: chunk_size={chosen} from here on."
    )
    return chosen
