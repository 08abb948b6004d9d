"""Directions are functions of (seed, k), have unit covariance, and combine without being stored."""

import pytest
import torch

from lightning_bpfree.core.combination import Combination, weights_from_slopes
from lightning_bpfree.core.directions import Directions
from lightning_bpfree.core.params import dot
from lightning_bpfree.core.seeds import mix

LIKE = {"w": torch.zeros(7, 9), "b": torch.zeros(9), "s": torch.zeros(())}


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("num", [1, 5])
def test_remade_bit_for_bit_and_unlike_each_other(distribution, num):
    one = Directions(LIKE, num, 7, distribution)
    two = Directions(LIKE, num, 7, distribution)
    for k in range(num):
        assert all(torch.equal(one[k][n], two[k][n]) for n in LIKE)
        assert all(one[k][n].shape == LIKE[n].shape for n in LIKE)
    assert not torch.equal(one[0]["w"], Directions(LIKE, num, 8, distribution)[0]["w"])
    if num > 1:
        assert not torch.equal(one[0]["w"], one[1]["w"])
    assert not torch.equal(one[0]["w"].flatten()[:9], one[0]["b"])  # tensors of one direction are not copies


def test_the_global_stream_does_not_move():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    Directions(LIKE, 3, 0).stack(range(3))
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_unit_moments(distribution):
    like = {"w": torch.zeros(100, 1000)}
    v = Directions(like, 1, 3, distribution)[0]["w"]
    n = v.numel()
    assert abs(float(v.mean())) < 4 / n**0.5  # four standard errors
    fourth = 3.0 if distribution == "gaussian" else 1.0
    assert abs(float(v.square().mean()) - 1) <= 4 * ((fourth - 1) / n) ** 0.5
    if distribution == "rademacher":
        assert set(v.unique().tolist()) == {-1.0, 1.0}


def test_signs_are_independent_of_their_neighbors():
    v = Directions({"w": torch.zeros(200_003)}, 1, 0, "rademacher")[0]["w"]
    for lag in (1, 2, 8, 63, 64):
        assert abs(float((v[lag:] * v[:-lag]).mean())) < 4 / 200_000**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num", [1, 4])
def test_stack_combine_and_gram_agree_with_the_directions(dtype, num):
    like = {name: tensor.to(dtype) for name, tensor in LIKE.items()}
    directions = Directions(like, num, 2)
    stacked = directions.stack(range(num))
    for k in range(num):
        assert all(torch.equal(stacked[n][k], directions[k][n]) for n in like)
    weights = [0.5, -2.0, 0.25, 3.0][:num]
    combined = directions.combine(weights, scale=torch.tensor(2.0))
    again = Directions(like, num, 2).combine(weights, scale=torch.tensor(2.0))  # nothing kept from reading
    for n in like:
        explicit = 2 * sum(w * directions[k][n].double() for k, w in enumerate(weights))
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]  # one rounding at the end
        torch.testing.assert_close(combined[n].double(), explicit, rtol=tolerance, atol=tolerance)
        assert combined[n].dtype == dtype
        assert torch.equal(combined[n], again[n])
    gram = directions.gram()
    expected = torch.tensor([[float(dot(directions[i], directions[j])) for j in range(num)] for i in range(num)])
    torch.testing.assert_close(gram, expected.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(directions.squared_norms(), gram.diagonal(), rtol=1e-5, atol=1e-5)


def test_seeds_do_not_collide_or_commute():
    seeds = {mix(a, b) for a in range(200) for b in range(200)}
    assert len(seeds) == 40_000
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def _estimates(num, trials, **how):
    """Estimates of a known gradient by exact slopes, shape (trials, d)."""
    like = {"w": torch.zeros(20, dtype=torch.float64)}
    gradient = torch.arange(1.0, 21.0, dtype=torch.float64)
    made = []
    for seed in range(trials):
        directions = Directions(like, num, seed, how.get("distribution", "gaussian"))
        slopes = torch.stack([v["w"] @ gradient for v in directions])
        weights = weights_from_slopes(slopes, directions, how.get("orthogonal", False), how.get("normalize", False))
        made.append(directions.combine(weights)["w"])
    return gradient, torch.stack(made)


@pytest.mark.slow  # statistical
@pytest.mark.parametrize(
    ("how", "variance"),
    [
        ({}, 21.0),  # d + 1
        ({"normalize": True}, 19.0),  # d - 1, on the sphere
        ({"distribution": "rademacher"}, 19.0),
        ({"orthogonal": True}, 19.0),  # one direction: as on the sphere
    ],
)
def test_unbiased_along_the_gradient_with_the_variance_of_theory(how, variance):
    gradient, made = _estimates(1, 4000, **how)
    norm = gradient.square().sum()
    along = made @ gradient / norm
    assert abs(float(along.mean()) - 1) < 4 * float(along.std()) / 4000**0.5
    total = float((made - gradient).square().sum(1).mean() / norm)
    # The spread of |e|^2 is about its mean; four standard errors over 4,000 draws are below 10 %.
    assert total == pytest.approx(variance, rel=0.1)


def test_orthogonal_directions_project_and_span_everything_at_k_equal_d():
    gradient, made = _estimates(20, 1, orthogonal=True)
    torch.testing.assert_close(made[0], gradient, rtol=1e-8, atol=1e-8)  # a 20 x 20 solve in float64
    gradient, made = _estimates(5, 2000, orthogonal=True)
    cosine = made @ gradient / (made.norm(dim=1) * gradient.norm())
    # The square of the cosine is Beta(K/2, (d-K)/2), of mean K/d and variance 2 K (d-K) / (d^2 (d+2)).
    error = (2 * 5 * 15 / (400 * 22) / 2000) ** 0.5
    assert abs(float(cosine.square().mean()) - 0.25) < 4 * error
    along = made @ gradient / gradient.square().sum()
    assert abs(float(along.mean()) - 1) < 4 * float(along.std()) / 2000**0.5


@pytest.mark.parametrize("how", [{}, {"orthogonal": True}, {"normalize": True}, {"exchanged": True}], ids=str)
def test_adding_up_equals_remaking(how):
    directions = Directions({name: tensor.double() for name, tensor in LIKE.items()}, 4, 2)
    slopes = torch.tensor([0.5, -2.0, 0.25, 3.0], dtype=torch.float64)
    combination = Combination(directions, **how)
    combination.add(slopes[0], directions[0])
    combination.add(slopes[1:], directions.stack([1, 2, 3]))
    orthogonal, normalize = how.get("orthogonal", False), how.get("normalize", False)
    expected = directions.combine(weights_from_slopes(slopes, directions, orthogonal, normalize))
    for name, gradient in combination.gradients(slopes)(torch.tensor(2.0)).items():
        torch.testing.assert_close(gradient, 2 * expected[name], rtol=1e-10, atol=1e-12)  # equal math in float64


def test_bad_arguments():
    for num in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="num="):
            Directions(LIKE, num, 0)
    with pytest.raises(ValueError, match="'gaussian' or 'rademacher'"):
        Directions(LIKE, 1, 0, "uniform")
    with pytest.raises(IndexError, match="direction 3 of 3"):
        Directions(LIKE, 3, 0)[3]
    small = {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match="at most 2 directions"):
        weights_from_slopes(torch.ones(3), Directions(small, 3, 0), orthogonal=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_remade_on_cuda():
    like = {name: tensor.cuda() for name, tensor in LIKE.items()}
    for distribution in ("gaussian", "rademacher"):
        one, two = Directions(like, 3, 7, distribution), Directions(like, 3, 7, distribution)
        assert all(torch.equal(one[2][n], two[2][n]) and one[2][n].is_cuda for n in like)
