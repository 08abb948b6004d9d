"""Measures what an update of a team of agents costs, beside MAP propagation written in NumPy, backprop, and a forward.

    python tests/benchmarks/team.py --out docs/results/team_benchmarks.json

The network is that of the 5-bit multiplexer: 37 inputs, 64 and 32 units, two actions, batches of 128.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from run import Checkpointed, Classifier, backprop, plain_forward, row, run_parts, seconds
from torch import nn

import lightning_bpfree as bpf
from lightning_bpfree.core.step import Step
from lightning_bpfree.training.module_state import ModuleState
from lightning_bpfree.training.step_swap import with_injected_gradients

BATCH, WIDTHS, VARIANCES, RATES, STEPS = 128, (37, 64, 32, 2), (0.3, 1.0), (0.04, 4e-5, 4e-6), 20


class NumpyMap:
    """MAP propagation as Chung (2020) gives it, in plain NumPy: whole batches, softplus means, Adam, 20 steps."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        pairs = list(pairwise(WIDTHS))
        self.weights = [self.rng.uniform(-1, 1, pair) * np.sqrt(6 / sum(pair)) for pair in pairs]
        self.biases = [np.zeros(width) for width in WIDTHS[1:]]
        self.moments = [[np.zeros_like(p), np.zeros_like(p)] for p in [*self.weights, *self.biases]]
        self.time = 0

    def forward(self, hidden: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Potentials and means of all layers, given the values below them."""
        potentials = [h @ w + b for h, w, b in zip(hidden, self.weights, self.biases, strict=True)]
        means = [np.log1p(np.exp(-np.abs(p))) + np.maximum(p, 0) for p in potentials[:-1]]
        scores = np.exp(potentials[-1] - potentials[-1].max(1, keepdims=True))
        return potentials, [*means, scores / scores.sum(1, keepdims=True)]

    def sampled(self, x: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Values of the hidden layers, with the input before them, and a one-hot action."""
        values = [x]
        for layer, variance in enumerate(VARIANCES):
            potential = values[-1] @ self.weights[layer] + self.biases[layer]
            mean = np.log1p(np.exp(-np.abs(potential))) + np.maximum(potential, 0)
            values.append(mean + np.sqrt(variance) * self.rng.standard_normal(mean.shape))
        potential = values[-1] @ self.weights[-1] + self.biases[-1]
        chance = np.exp(potential - potential.max(1, keepdims=True))
        chance /= chance.sum(1, keepdims=True)
        action = (self.rng.random(len(x)) > chance[:, 0]).astype(int)
        return values, np.eye(2)[action]

    def update(self, x: np.ndarray, y: np.ndarray) -> None:
        """One batch: act, be rewarded, climb, learn."""
        values, action = self.sampled(x)
        reward = np.where(action.argmax(1) == y, 1.0, -1.0)
        potentials, means = self.forward(values)
        for _ in range(STEPS):
            slope = 1 / (1 + np.exp(-potentials[1]))
            up = [
                (values[2] - means[1]) * slope / VARIANCES[1] @ self.weights[1].T,
                (action - means[2]) @ self.weights[2].T,
            ]
            for layer, variance in enumerate(VARIANCES):
                own = (means[layer] - values[layer + 1]) / variance
                values[layer + 1] = values[layer + 1] + 0.5 * variance * (own + up[layer])
            potentials, means = self.forward(values)
        self.time += 1
        for layer in range(3):
            if layer < 2:
                slope = 1 / (1 + np.exp(-potentials[layer]))
                score = (values[layer + 1] - means[layer]) * slope / VARIANCES[layer]
            else:
                score = action - means[layer]
            signal = score * reward[:, None] / len(x)
            self.adam(layer, self.weights[layer], values[layer].T @ signal, RATES[layer])
            self.adam(layer + 3, self.biases[layer], signal.sum(0), RATES[layer])

    def adam(self, place: int, parameter: np.ndarray, gradient: np.ndarray, rate: float) -> None:
        """One step of Adam uphill, in place."""
        first, second = self.moments[place]
        first += 0.1 * (gradient - first)
        second += 0.001 * (gradient**2 - second)
        scaled = first / (1 - 0.9**self.time)
        parameter += rate * scaled / (np.sqrt(second / (1 - 0.999**self.time)) + 1e-9)


def network() -> nn.Sequential:
    """37-64-32-2."""
    layers: list[nn.Module] = []
    for a, b in pairwise(WIDTHS):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


RULES: dict[str, dict[str, Any]] = {
    "REINFORCE": {},
    "Weight Maximization": {"credit": "weight_max"},
    "exact Weight Maximization": {"credit": bpf.WeightMax(exact=True)},
    "straight-through": {"credit": "ste"},
    "Boltzmann": {"exploration": "boltzmann", "baseline": "critic"},
    "Boltzmann, whole network": {"exploration": bpf.Boltzmann(whole_network=True), "baseline": "critic"},
    "recurrent": {"exploration": "recurrent", "negative_phase": True},
    "MAP propagation, 20 steps": {"credit": "map_propagation", "unit": [bpf.Gaussian(v) for v in VARIANCES]},
}
GOAL = 0.2  # of the NumPy loop


def estimator(rule: bpf.TeamReinforce, module: Classifier, data: list[torch.Tensor]) -> Callable[[], None]:
    """One whole step of the rule as the Trainer runs it, which replays nothing unless the rule runs parts again."""
    state = ModuleState(module, None)
    module.log = lambda *a, **k: None  # type: ignore[method-assign]  # there is no Trainer here

    def step() -> None:
        state.refresh()
        replay, args = (state.replay() if rule.reevaluates else None), (data, 0)
        made = Step(module, module.training_step, state.slots, 7, args=args, replay=replay, quiet=state.quiet)
        loss = with_injected_gradients(made, rule.estimate(made), [])
        made.finish()
        rule.on_batch_settled(True)
        module.zero_grad()
        loss.backward()

    return step


def ruled(settings: dict[str, Any], data: list[torch.Tensor]) -> Callable[[], None]:
    """An update by the rule, with Adam, on a module of its own."""
    module = Classifier(network())
    rule = bpf.TeamReinforce(num_samples=1, **{"baseline": "none", **settings})
    rule.record.seed = 0
    rule.install(module)
    step, optimizer = estimator(rule, module, data), torch.optim.Adam(module.parameters(), lr=1e-3)

    def update() -> None:
        step()
        optimizer.step()
        for own in (rule._lateral, rule._baselines.own):
            own.step()

    return update


def updates() -> list[dict[str, object]]:
    """An update of the 5-bit multiplexer's network over the NumPy loop's, optimizers included."""
    data = [torch.randint(0, 2, (BATCH, WIDTHS[0])) * 2.0 - 1, torch.randint(0, 2, (BATCH,))]
    loop, x, y = NumpyMap(), data[0].numpy().astype(float), data[1].numpy()
    bare, checkpointed = Classifier(network()), Classifier(Checkpointed(network()))
    bare.log = checkpointed.log = lambda *a, **k: None  # type: ignore[method-assign]  # there is no Trainer here
    others = {"backprop": backprop(bare, data), "checkpointed backprop": backprop(checkpointed, data)}
    runs = {name: ruled(settings, data) for name, settings in RULES.items()}
    best = seconds({"numpy": lambda: loop.update(x, y), "f": plain_forward(bare, data), **others, **runs}, repeats=60)
    what = f"update of 37-64-32-2, batch {BATCH}, over a NumPy loop of MAP propagation ({best['numpy'] * 1000:.2f} ms)"
    rows = [row(f"update, {name}", what, best[name] / best["numpy"], GOAL) for name in runs]
    over = f"gradients alone, over the same ({best['f'] * 1000:.2f} ms a forward)"
    return rows + [row(f"update, {name}", over, best[name] / best["numpy"]) for name in others]


def wide() -> list[dict[str, object]]:
    """What a draw costs where matrix products count: 784-1000-1000-10, in forward passes."""
    data = [torch.randn(BATCH, 784), torch.randint(0, 10, (BATCH,))]

    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))

    def gradients(settings: dict[str, Any]) -> Callable[[], None]:
        module = Classifier(net())
        rule = bpf.TeamReinforce(num_samples=1, **{"baseline": "none", **settings})
        rule.record.seed = 0
        rule.install(module)
        return estimator(rule, module, data)

    bare, checkpointed = Classifier(net()), Classifier(Checkpointed(net()))
    bare.log = checkpointed.log = lambda *a, **k: None  # type: ignore[method-assign]  # there is no Trainer here
    runs = {
        "REINFORCE": gradients({}),
        "Weight Maximization": gradients({"credit": "weight_max"}),
        "Boltzmann, 4 sweeps": gradients({"exploration": "boltzmann", "baseline": "critic"}),
        "backprop": backprop(bare, data),
        "checkpointed backprop": backprop(checkpointed, data),
    }
    best = seconds({"f": plain_forward(bare, data), **runs}, repeats=10)
    what = f"gradients of 784-1000-1000-10, batch {BATCH}, one draw, in forward passes ({best['f'] * 1000:.2f} ms)"
    return [row(f"wide, {name}", what, best[name] / best["f"], unit="F") for name in runs]


PARTS = {f.__name__: f for f in (updates, wide)}


if __name__ == "__main__":
    run_parts(
        PARTS, "python tests/benchmarks/team.py --out docs/results/team_benchmarks.json", __doc__, numpy=np.__version__
    )
