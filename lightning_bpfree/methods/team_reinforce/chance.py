"""A warning if a team acts no better than chance."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

FEWEST = 2000  # draws, of which one can tell
DEVIATIONS = 2.0


class ChanceCheck:
    """Counts the rewards of the first epoch for classes, and says once what to try if the team has learned nothing.

    Examples:
        >>> import torch
        >>> check = ChanceCheck()
        >>> check.add(torch.ones(4, 500), num_classes=10)
        >>> check.at_chance()
        False
    """

    def __init__(self) -> None:
        self.right: Tensor | None = None
        self.draws = self.num_classes = 0
        self.done = False

    def add(self, rewards: Tensor, num_classes: int) -> None:
        """Count the rewards of a batch, 1 for the right class and -1 for others; no device waits."""
        if self.done:
            return
        total = (rewards + 1).sum() / 2
        self.right = total if self.right is None else self.right + total
        self.draws, self.num_classes = self.draws + rewards.numel(), num_classes

    def at_chance(self) -> bool:
        """Whether actions were right no more often than uniform ones, within two standard deviations."""
        if self.right is None or self.draws < FEWEST:
            return False
        chance = 1 / self.num_classes
        error = (chance * (1 - chance) / self.draws) ** 0.5
        return bool(float(self.right) / self.draws < chance + DEVIATIONS * error)

    def report(self) -> None:
        """Say what to try, at the end of the first epoch in which there were draws enough."""
        if self.done or self.right is None or self.draws < FEWEST:
            return
        self.done = True
        if self.at_chance():
            rank_zero_warn(
                f"TeamReinforce: after an epoch, {float(self.right) / self.draws:.1%} of {self.draws} actions were "
                f"right; chance is {1 / self.num_classes:.1%}. Try another learning rate, more draws of each "
                "input (num_samples=16), fewer layers of units (units='...'), or credit='weight_max', which gives "
                "each unit credit for its own effect."
            )
