"""A warning for objectives that are flat along all directions, from which nothing can be learned."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor


class FlatObjective:
    """Warns at the first batch whose slopes are all zero.

    Args:
        rule: the rule's name.
        cure: what to do about it, a sentence.
    """

    def __init__(self, rule: str, cure: str) -> None:
        self.rule, self.cure, self._told = rule, cure, False

    def look(self, slopes: Tensor, batch: int) -> None:
        """Warn if all ``slopes`` are zero; once only.

        Args:
            slopes: of the batch, equal on all ranks.
            batch: its number, for the message.
        """
        if not self._told and not bool(slopes.any()):
            self._told = True
            rank_zero_warn(
                f"{self.rule}: the loss is flat along all {len(slopes)} directions in batch {batch}: it has the "
                f"same value at all perturbed parameters, so nothing can be learned from it. {self.cure}"
            )
