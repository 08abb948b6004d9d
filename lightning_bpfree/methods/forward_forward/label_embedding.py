"""A pattern for every label, in the shape of a network's input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LabelEmbedding(nn.Module):
    """One learned pattern per label, added to inputs, so that every place of an input carries the label.

    Args:
        num_classes: number of labels.
        shape: shape of an input, without the batch.

    Examples:
        >>> embedding = LabelEmbedding(10, (1, 8, 8))
        >>> embedding(torch.zeros(5, 1, 8, 8), torch.zeros(5, dtype=torch.int64)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(self, num_classes: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.patterns = nn.Parameter(torch.randn(num_classes, *shape))  # as large as inputs of mean square 1

    def forward(self, inputs: Tensor, labels: Tensor | None) -> Tensor:
        """Return inputs plus the patterns of labels; None for the neutral label, the mean of all patterns.

        Args:
            inputs: shape ``(B, *shape)``.
            labels: shape ``(B,)``, or None.
        """
        pattern = self.patterns.mean(0) if labels is None else self.patterns[labels]
        return inputs + pattern.to(inputs.dtype)
