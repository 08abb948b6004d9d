"""A warning for objectives that are flat along all directions, from which nothing can be learned."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor


class FlatObjective:
    """Warns at the first batch whose slopes are all zero.

    Args:
        rule: the rule's name.
        cure: a sentence that says how to fix it.
    """

    def __init__(self, rule: str, cure: str) -> None:
        self.rule, self.cure, self._told = rule, cure, False

    def look(self, slopes: Tensor, batch: int) -> None:
        """Warn, only once, if all ``slopes`` are zero.

        Args:
            slopes: the slopes of the batch, equal on all ranks.
            batch: the batch's number, for the message.
        """
        if not self._told and not bool(slopes.any()):
            self._told = True
            rank_zero_warn(
                f"{self.rule}: the loss is flat along all {len(slopes)} directions in batch {batch}: it has the "
                f"same value at all perturbed parameters, so nothing can be learned from it. {self.cure}"
            )
