"""What ensembles say: identities of the pure functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_bpfree.functional import (
    cross_fitted,
    disagreement,
    majority_vote,
    mean_and_variance,
    mean_probability,
    mutual_information,
    stacking_weights,
    vote_shares,
)
from lightning_bpfree.methods.deep_ensemble.combining.aggregation import vote_probabilities
from lightning_bpfree.methods.deep_ensemble.combining.combination import Combination


def members(count: int = 5, rows: int = 400, classes: int = 4, dtype=torch.float64) -> torch.Tensor:
    return (2 * torch.randn(count, rows, classes, dtype=dtype)).softmax(-1)


def test_the_mean_is_at_least_as_likely_as_its_members():
    probabilities, labels = members(), torch.randint(0, 4, (400,))
    ensemble = F.nll_loss(mean_probability(probabilities).log(), labels)
    each = torch.stack([F.nll_loss(own.log(), labels) for own in probabilities])
    assert ensemble < each.mean()


def test_a_tie_goes_to_the_larger_mean_probability():
    # Two votes for class 0, two for class 1; the means are 0.4 and 0.475.
    rows = [[0.5, 0.4, 0.1], [0.5, 0.4, 0.1], [0.3, 0.55, 0.15], [0.3, 0.55, 0.15]]
    assert majority_vote(torch.tensor(rows).unsqueeze(1)).tolist() == [1]


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_votes_as_probabilities_choose_as_the_vote(count):
    probabilities = members(count)
    votes = vote_probabilities(probabilities)
    assert torch.equal(votes.argmax(-1), majority_vote(probabilities))
    assert torch.allclose(votes.sum(-1), torch.ones(400, dtype=votes.dtype), rtol=1e-10)  # float64
    weights = torch.rand(count).softmax(0).tolist()
    weights = [w / sum(weights) for w in weights]
    assert torch.equal(vote_probabilities(probabilities, weights).argmax(-1), majority_vote(probabilities, weights))


def test_one_heavy_vote_decides():
    probabilities = members(3)
    assert torch.equal(majority_vote(probabilities, [0.2, 0.6, 0.2]), probabilities[1].argmax(-1))
    assert torch.equal(vote_shares(probabilities, [0.0, 1.0, 0.0]).argmax(-1), probabilities[1].argmax(-1))


def test_mean_and_variance_is_that_of_the_mixture():
    means, variances, weights = torch.tensor([0.0, 3.0]), torch.tensor([1.0, 4.0]), [0.25, 0.75]
    mean, variance = mean_and_variance(means, variances, weights)
    # E[x] = 2.25; E[x^2] = 0.25 (0 + 1) + 0.75 (9 + 4) = 10; 10 - 2.25^2 = 4.9375
    assert (float(mean), float(variance)) == (2.25, 4.9375)


def test_disagreement_counts_pairs_and_mutual_information_is_zero_where_members_agree():
    votes = F.one_hot(torch.tensor([[0], [0], [1], [2]]), 3).double()
    assert torch.allclose(disagreement(votes), torch.tensor([5 / 6], dtype=torch.float64))  # of 6 pairs, one agrees
    same = members(1).expand(3, -1, -1)
    assert mutual_information(same).max() < 1e-12
    assert disagreement(same).max() == 0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.4], "sum to 0.9, not to 1"),
        ([1.5, -0.5], r"in \[0, 1\]"),
        (torch.tensor([1.5, -0.5]), "between 0 and 1"),
        ([1.0], "1 numbers for 2 members"),
    ],
)
def test_weights_are_checked(weights, message):
    with pytest.raises(ValueError, match=message):
        mean_probability(members(2), weights)


def test_stacking_finds_the_weights_that_made_the_labels():
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([0.7, 0.3, 0.0])
    probabilities = (3 * torch.randn(3, 20_000, 4, generator=generator)).softmax(-1)
    labels = torch.multinomial(mean_probability(probabilities, truth), 1, generator=generator).squeeze(1)
    found = stacking_weights(probabilities, labels)
    assert torch.allclose(found, truth, atol=0.04)  # four standard errors of such a weight: 4 / sqrt(20000) = 0.03
    # No other point of the simplex is more likely: the gradient of the likelihood along every edge points inwards.
    chosen = probabilities.gather(-1, labels.view(1, -1, 1).expand(3, -1, 1)).squeeze(-1)
    slopes = (chosen / (found @ chosen)).mean(1)
    assert slopes.max() < 1 + 1e-3


def test_stacking_of_values_is_least_squares_on_the_simplex():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 500, generator=generator, dtype=torch.float64)
    weights = stacking_weights(values, 0.6 * values[0] + 0.4 * values[2], regression=True)
    assert torch.allclose(weights, torch.tensor([0.6, 0.0, 0.4]), atol=1e-5)
    assert float(weights.sum()) == pytest.approx(1)


def test_cross_fitting_never_uses_a_samples_own_label():
    probabilities, labels = members(3, 40), torch.randint(0, 4, (40,))
    before = cross_fitted(probabilities, labels, folds=40)
    changed = labels.clone()
    changed[7] = (labels[7] + 1) % 4
    after = cross_fitted(probabilities, changed, folds=40)
    assert torch.equal(before[7], after[7])
    assert not torch.equal(before, after)
    with pytest.raises(ValueError, match="folds=41"):
        cross_fitted(probabilities, labels, folds=41)


def test_combined_logits_are_those_of_the_mean_probability():
    logits = torch.randn(3, 6, 4, dtype=torch.float64)
    combined = Combination().combined(list(logits))
    assert torch.allclose(combined.softmax(-1), logits.softmax(-1).mean(0), rtol=1e-10)
    images = torch.randn(3, 6, 4, 2, 2, dtype=torch.float64)
    combined = Combination(class_dim=1).combined(list(images))
    assert torch.allclose(combined.softmax(1), images.softmax(2).mean(0), rtol=1e-10)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_combined_single_logits(shape):
    logits = torch.randn(3, *shape, dtype=torch.float64)
    combined = Combination(task="binary").combined(list(logits))
    assert combined.shape == shape
    assert torch.allclose(combined.sigmoid(), logits.sigmoid().mean(0), rtol=1e-10)
    probabilities = Combination(task="binary", probabilities=True).combined(list(logits.sigmoid()))
    assert torch.allclose(probabilities, logits.sigmoid().mean(0), rtol=1e-10)


def test_several_outputs_keep_their_form():
    outputs = [
        {"loss": torch.tensor(float(m)), "logits": torch.randn(2, 3), "ids": torch.tensor([m])} for m in range(3)
    ]
    combined = Combination().combined(outputs)
    assert float(combined["loss"]) == 1
    assert combined["ids"].tolist() == [0]
    assert torch.allclose(combined["logits"].exp().sum(-1), torch.ones(2))


def test_outputs_that_cannot_be_combined_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        Combination().combined([torch.zeros(2, 3), torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="task='binary'"):
        Combination().combined([torch.zeros(2, 1)] * 2)
    with pytest.raises(ValueError, match="give class_dim=1"):
        Combination().combined([torch.zeros(2, 3, 4)] * 2)
    with pytest.raises(ValueError, match="use task='classification'"):
        Combination(task="binary").combined([torch.zeros(2, 3)] * 2)
    with pytest.raises(ValueError, match="finds no prediction"):
        Combination().combined([{}, {}])
