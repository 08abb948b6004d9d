"""Searches whose answer is known: sizes follow what is planted in the data."""

from __future__ import annotations

import pytest
import torch
from toy_searches import PlantedLag, PlantedRank, found


# The learning rates of the weights during the search are those of the study; the seed is none of its seeds.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "planted", "share"), [(PlantedLag, (3, 10, 20), 0.01), (PlantedRank, (2, 5, 8), 0.1)], ids=["lag", "rank"]
)
def test_sizes_follow_what_is_planted(task, planted, share):
    sizes = []
    for value in planted:
        torch.manual_seed(4)
        made = task(value)
        size, score = found(made, weight=0.001, lr=0.05, share=share)
        assert size >= made.suffices
        assert score > 0.9
        sizes.append(size)
    assert sizes[0] < sizes[1] < sizes[2]
