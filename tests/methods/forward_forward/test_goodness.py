"""Goodness, its loss, and negative samples: identities of the papers and of the field."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_bpfree.methods.forward_forward.goodness import contrast, goodness, rescaled
from lightning_bpfree.methods.forward_forward.negatives import hard_labels, hybrid_images, overlaid, wrong_labels


def test_the_gradient_is_hintons():
    """-(1 - p) 2 y z for positives and p 2 y z for negatives, over the mean of both."""
    torch.manual_seed(0)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    z = rescaled(torch.randn(6, 4, dtype=torch.float64))
    y = F.relu(z @ weight.T)
    loss = contrast(goodness(y), threshold=5.0, temperature=2.0)
    (found,) = torch.autograd.grad(loss, weight)
    with torch.no_grad():
        p = torch.sigmoid((y.square().sum(1) - 5.0) / 2.0)
        factor = torch.cat([-(1 - p[:3]), p[3:]]) / 2.0 / 6
        expected = (factor[:, None] * 2 * y).T @ z
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_goodness_is_exact_also_at_zero():
    x = torch.tensor([[0.0, 0.0], [3.0, -4.0]], requires_grad=True)
    goodness(x).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[0.0, 0.0], [6.0, -8.0]]))


@pytest.mark.parametrize("length", ["rms", "unit"])
def test_rescaling_takes_the_length_and_nothing_else(length):
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    made = rescaled(x, length)
    torch.testing.assert_close(rescaled(7.3 * x, length), made)  # no length is left to read
    expected = torch.full((4,), 1.0 if length == "rms" else 1 / 15, dtype=torch.float64)
    torch.testing.assert_close(goodness(made, "mean"), expected)
    cosine = F.cosine_similarity(x.flatten(1), made.flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))  # no mean is taken out, unlike LayerNorm
    assert torch.equal(rescaled(torch.zeros(1, 3), length), torch.zeros(1, 3))


def test_at_the_threshold_the_loss_is_log_two_and_swapping_flips_the_slope():
    good = torch.tensor([1.5, 1.5], requires_grad=True)
    loss = contrast(good, threshold=1.5)
    assert math.isclose(float(loss.detach()), math.log(2), rel_tol=1e-6)
    (grad,) = torch.autograd.grad(loss, good)
    assert torch.equal(grad[0], -grad[1])


def test_the_loss_is_finite_far_out():
    good = torch.tensor([0.0, 1e4], requires_grad=True)
    loss = contrast(good, threshold=100.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(good.grad).all()


def test_wrong_labels_are_never_right_and_uniform_over_the_others():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat(4000)
    wrong = wrong_labels(labels, 5, generator)
    assert not (wrong == labels).any()
    counts = torch.bincount((wrong - labels) % 5, minlength=5)[1:].double()
    chi2 = float(((counts - 5000) ** 2 / 5000).sum())
    assert chi2 < 16.3  # 3 degrees of freedom: exceeded once in 1,000 by chance, and the seed is fixed


def test_hard_labels_follow_the_scores_but_never_the_truth():
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([[5.0, 0.0, math.log(3.0)]]).repeat(8000, 1)
    drawn = hard_labels(scores, torch.zeros(8000, dtype=torch.int64), generator)
    assert not (drawn == 0).any()
    share = float((drawn == 2).double().mean())
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 8000)  # four standard errors


def test_the_label_is_written_on_the_samples_own_scale_and_nowhere_else():
    x = torch.randn(4, 3, 5, 5)
    before = x.clone()
    made = overlaid(x, torch.tensor([0, 1, 2, 1]), 3)
    assert torch.equal(x, before)
    flat, was = made.view(4, 3, 25), x.view(4, 3, 25)
    assert torch.equal(flat[:, :, 3:], was[:, :, 3:])
    for row, label in enumerate([0, 1, 2, 1]):
        for place in range(3):
            expected = x[row].max() if place == label else x[row].min()
            assert (flat[row, :, place] == expected).all()
    alone = overlaid(x[2:3], torch.tensor([2]), 3)
    assert torch.equal(alone[0], made[2])  # whatever the batch


def test_the_neutral_label_lies_between():
    made = overlaid(torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.5]]), None, 4 - 1)
    torch.testing.assert_close(made, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 1.0, 0.5]]))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (torch.zeros(2, 3), "3 labels do not fit into inputs of 3 values"),
        (torch.zeros(2, 1, 1, 3), "do not fit"),
        (torch.zeros(2, 4, 4), r"shape \(2, 4, 4\).*embedding"),
        (torch.zeros(2, 9, dtype=torch.int64), "int64"),
    ],
)
def test_inputs_that_cannot_hold_the_label_are_refused(inputs, said):
    with pytest.raises(ValueError, match=said):
        overlaid(inputs, torch.tensor([0, 1]), 3)


def test_hybrids_take_every_pixel_from_one_of_two_samples():
    generator = torch.Generator().manual_seed(0)
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 16, 16)
    made = hybrid_images(x, generator)
    for row in range(6):
        values = set(made[row].unique().tolist())
        assert row in values
        assert len(values) <= 2
    share = float((made == x).double().mean())
    assert 0.3 < share < 0.7  # a symmetric mask of large parts: half, with a wide spread
    flips = (made[:, :, :, 1:] != made[:, :, :, :-1]).double().mean()
    assert float(flips) < 0.25  # parts are large: independent bits would flip at every second pixel
    with pytest.raises(ValueError, match="at least two images"):
        hybrid_images(torch.zeros(1, 1, 4, 4), generator)
