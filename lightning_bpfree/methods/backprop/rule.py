"""Backprop as a rule: the baseline of all comparisons."""

from __future__ import annotations

from typing import ClassVar

from lightning_bpfree.core.step import Estimate, Step
from lightning_bpfree.training.training_rule import BACKPROP_COST, TrainingRule


class Backprop(TrainingRule):
    """Plain backprop through this package's callback: the same bits as a Trainer without it.

    It is the baseline of every comparison. It shows that the callback itself changes nothing.

    Args:
        params: shell-style patterns of the parameters to train; None for all.
        **settings: see :class:`TrainingRule`.

    Examples:
        >>> Backprop(params="head.*").params
        'head.*'

    References:
        D. E. Rumelhart, G. E. Hinton, R. J. Williams, "Learning representations by back-propagating errors", 1986.
    """

    citation: ClassVar[str] = (
        "@article{rumelhart1986learning, title={Learning representations by back-propagating errors}, "
        "author={Rumelhart, David E. and Hinton, Geoffrey E. and Williams, Ronald J.}, "
        "journal={Nature}, volume={323}, year={1986}}"
    )
    reevaluates: bool = False

    def estimate(self, step: Step) -> Estimate:
        """Return the loss with its graph, for autograd to differentiate."""
        return Estimate(step.loss(cost=BACKPROP_COST))

    def describe(self) -> dict[str, str]:
        """Return rows for the banner."""
        return {
            "a step": "1 forward and 1 backward pass (3 forwards)",
            "route": "reverse-mode automatic differentiation",
        }
