"""The rules and companions under which the modules of the suite train, in settings that cost little."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl

import lightning_bpfree as bpf

SEED = 11
SIGMA = 1e-3

# Their estimates are checked against the gradient that a plain fit finds.
ESTIMATORS: dict[str, Callable[[], Any]] = {
    "forward_gradient": partial(bpf.ForwardGradient, 2, seed=SEED),
    "one_by_one": partial(bpf.ForwardGradient, 1, chunk_size=1, seed=SEED),
    "zeroth_order": partial(bpf.ZerothOrder, 2, sigma=1e-5, seed=SEED),
    "evolution_strategy": lambda: bpf.EvolutionStrategy(bpf.OpenAIES(SIGMA, "raw"), 4, seed=SEED),
}
# They follow losses of their own, or replace the forward pass.
LOCAL: dict[str, Callable[[], Any]] = {
    "feedback": partial(bpf.DirectFeedbackAlignment, seed=SEED),
    "forward_forward": partial(bpf.ForwardForward, seed=SEED),
    "local_loss": lambda: bpf.ForwardGradient(guess=bpf.LocalLoss(), target="local", seed=SEED),
    "team": partial(bpf.TeamReinforce, seed=SEED, num_samples=2),
}
COMPANIONS: dict[str, Callable[..., pl.Callback]] = {
    "lottery_ticket": partial(bpf.LotteryTicket, "magnitude", levels=2, keep=0.5, scope="layer"),
    "reversible": partial(bpf.ReversibleRecompute, "all"),
}
RULES: dict[str, Callable[[], Any]] = {"backprop": bpf.Backprop, **ESTIMATORS, **LOCAL}
