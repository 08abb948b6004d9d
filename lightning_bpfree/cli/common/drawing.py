"""Shared parts of figures: one color per rule, and intervals that stay within the range of the values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

GRAY = "0.25"
OTHERS = tuple(f"C{index}" for index in range(10) if index != 7)  # which is gray, as the baseline is
_RESAMPLES = 2000

# A rule has the same color in every figure. Labels are those of the recipes and the studies.
COLORS = {
    # exact gradients
    **dict.fromkeys(("backprop", "Backprop", "plain", "gradient_descent", "gradient descent"), GRAY),
    **dict.fromkeys(("direct solver", "one", "autograd"), "0.55"),
    "plain_pre_norm": "#8c564b",
    "checkpoint": "#e6550d",
    # gradients through a sampler
    "exact_adjoint": "#1f77b4",
    "adjoint": "#c51b7d",
    "torchdiffeq": "#de77ae",
    "truncated": "#4d9221",
    "sequential": "#3b4cc0",
    "parallel": "#1b9e77",
    # estimates of the gradient
    **dict.fromkeys(("forward_gradient", "forward gradient", "one_direction"), "#1f77b4"),
    "zeroth_order": "#17becf",
    **dict.fromkeys(("evolution_strategy", "EvolutionStrategy", "evolution strategy"), "#ff7f0e"),
    # local guesses: one hue for each kind of guess
    **dict.fromkeys(("random_global_activations", "random_local_activations"), "#1f77b4"),
    **dict.fromkeys(("random_global_weights", "random_local_weights"), "#9ecae1"),
    **dict.fromkeys(("local_global_activations", "local_local"), "#c51b7d"),
    "local_global_weights": "#f1b6da",
    "reset_global_activations": "#4d9221",
    "reset_global_weights": "#b8e186",
    "freeze_global_activations": "#7f3b08",
    "freeze_global_weights": "#e08214",
    # local losses
    **dict.fromkeys(("forward_forward", "Forward-Forward", "one_layer"), "#2ca02c"),
    "integrated": "#d6a200",
    "one_layer_readout": "#98df8a",
    "integrated_readout": "#f5dd8a",
    # feedback
    **dict.fromkeys(("direct_feedback", "direct"), "#8c564b"),
    **dict.fromkeys(("layerwise_feedback", "layerwise"), "#d4a373"),
    # teams of agents
    "reinforce": "#9467bd",
    "boltzmann": "#d62728",
    "boltzmann_network": "#ff9896",
    "boltzmann_per_layer": "#7f0000",
    "recurrent": "#bcbd22",
    "weight_max": "#1b9e77",
    "map_propagation": "#e377c2",
    "ste": "#3b4cc0",
    "pathwise": "#a6761d",
    # lottery tickets, by their score
    **dict.fromkeys(("snr", "snr_of_EvolutionStrategy", "snr of EvolutionStrategy"), "#d62728"),
    "magnitude": "#3b4cc0",
    "random": "0.6",
}


def colors(labels: Sequence[str]) -> dict[str, str]:
    """Return a color for each label: from the table, else an unused one as long as there are any.

    Args:
        labels: the labels of a figure; the first one is the baseline.

    Examples:
        >>> colors(["backprop", "zeroth_order", "mine"])
        {'backprop': '0.25', 'zeroth_order': '#17becf', 'mine': 'C0'}
        >>> colors(["other", "mine"])
        {'other': '0.25', 'mine': 'C0'}
    """
    found = {label: COLORS[label] for label in labels if label in COLORS}
    unknown = [label for label in labels if label not in found]
    if labels and labels[0] in unknown and GRAY not in found.values():
        found[unknown.pop(0)] = GRAY
    for place, label in enumerate(unknown):
        found[label] = OTHERS[place % len(OTHERS)]
    return {label: found[label] for label in labels}


def interval(values: Any) -> tuple[Any, Any] | None:
    """Return the ends of the 95 % interval of the mean over the first axis; None for fewer than two values.

    It is a bootstrap percentile interval, so it never leaves the range of the values: an accuracy stays below 1. Equal
    values give equal intervals.

    Args:
        values: a number, or a row of numbers, for each seed.

    Examples:
        >>> low, high = interval([0.0, 1.0, 1.0, 1.0])
        >>> (float(low), float(high))
        (0.25, 1.0)
    """
    import numpy as np

    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return None
    picks = np.random.default_rng(0).integers(0, len(array), (_RESAMPLES, len(array)))
    low, high = np.quantile(array[picks].mean(1), [0.025, 0.975], axis=0)
    return low, high
