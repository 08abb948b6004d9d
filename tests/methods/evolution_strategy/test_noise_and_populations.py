"""Noise from a table, populations around a mean, and sums of their noise."""

from __future__ import annotations

import pytest
import torch

from lightning_bpfree.methods.evolution_strategy.population.coordinates import Coordinates
from lightning_bpfree.methods.evolution_strategy.population.low_rank_population import LowRankPopulation
from lightning_bpfree.methods.evolution_strategy.population.noise import BLOCK, Noise
from lightning_bpfree.methods.evolution_strategy.population.population import FullRankPopulation

PARAMS = {"w": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), "b": torch.linspace(-1, 1, 7)}
MASKS = {"w": torch.arange(35).view(7, 5) % 3 > 0}


def populations():
    vector = torch.linspace(0.1, 0.9, 42)
    for kind in ("table", "independent"):
        for mirrored in (True, False):
            yield FullRankPopulation(PARAMS, 8, 3, 0.3, mirrored=mirrored, noise=kind)
            yield FullRankPopulation(PARAMS, 8, 3, vector, mirrored=mirrored, noise=kind)
            yield FullRankPopulation(PARAMS, 8, 3, vector[:30], mirrored=mirrored, masks=MASKS, noise=kind)
            yield LowRankPopulation(PARAMS, 8, 3, 0.3, rank=1, mirrored=mirrored, noise=kind)
            yield LowRankPopulation(PARAMS, 8, 3, 0.3, rank=2, mirrored=mirrored, noise=kind)


ALL = list(populations())


@pytest.mark.parametrize("population", ALL, ids=lambda p: type(p).__name__)
def test_stacks_hold_the_members(population):
    stacked = population.stack(range(8))
    for i, member in enumerate(population):
        for name, tensor in member.items():
            assert tensor.shape == PARAMS[name].shape
            torch.testing.assert_close(stacked[name][i], tensor)  # another order of float32 products


@pytest.mark.parametrize("population", ALL, ids=lambda p: type(p).__name__)
def test_members_in_shared_memory_are_the_members(population):
    for i, member in zip([3, 0, 7], population.in_turn([3, 0, 7]), strict=True):
        assert all(torch.equal(tensor, population[i][name]) for name, tensor in member.items())


@pytest.mark.parametrize("population", ALL, ids=lambda p: type(p).__name__)
def test_moments_are_sums_over_members(population):
    weights = torch.randn(8, generator=torch.Generator().manual_seed(1)).double()
    std = population.std
    mean = population.coordinates.flatten(PARAMS)
    noise = torch.stack([(population.coordinates.flatten(member) - mean) / std for member in population])
    first = torch.einsum("n,nd->d", weights.float(), noise)
    # Noise is recovered from float32 members, by a difference divided by std >= 0.1.
    torch.testing.assert_close(population.moments(weights)[0], first, rtol=1e-3, atol=1e-4)
    if isinstance(population, FullRankPopulation):
        second = torch.einsum("n,nd->d", weights.float(), noise.square())
        one, two = population.moments(weights, weights)
        torch.testing.assert_close(one, first, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(two, second, rtol=1e-3, atol=1e-3)
    else:
        with pytest.raises(NotImplementedError, match="one standard deviation"):
            population.moments(weights, weights)


@pytest.mark.parametrize("population", [p for p in ALL if p.mirrored], ids=lambda p: type(p).__name__)
def test_mirrored_members_lie_opposite(population):
    for i in range(4):
        for name, mean in PARAMS.items():
            middle = (population[i][name] + population[i + 4][name]) / 2
            expected = mean * MASKS[name] if population.coordinates.dim == 30 and name == "w" else mean
            torch.testing.assert_close(middle, expected, rtol=1e-5, atol=1e-6)


def test_pruned_coordinates_are_zero_and_have_no_noise():
    population = FullRankPopulation(PARAMS, 4, 0, 0.5, masks=MASKS)
    assert population.noise.dim == int(MASKS["w"].sum()) + 7
    for member in population:
        assert not member["w"][~MASKS["w"]].any()
        assert member["w"][MASKS["w"]].ne(PARAMS["w"][MASKS["w"]]).all()
    found = population.unflatten(population.moments(torch.randn(4))[0])
    assert not found["w"][~MASKS["w"]].any()


def test_a_mask_is_never_inferred_from_zeros():
    params = {"b": torch.zeros(3), "w": torch.zeros(2, 2)}
    assert Coordinates(params).dim == 7
    member = FullRankPopulation(params, 2, 0, 0.1)[0]
    assert member["b"].ne(0).all()


def test_a_mask_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"mask of w has the shape \(2,\), the parameter \(7, 5\)"):
        Coordinates(PARAMS, {"w": torch.ones(2, dtype=torch.bool)})


@pytest.mark.parametrize("kind", ["table", "independent"])
def test_noise_is_a_function_of_seed_and_index(kind):
    one, two = Noise(50, 6, 9, kind), Noise(50, 6, 9, kind)
    assert torch.equal(one.rows([4, 1]), torch.stack([two.row(4), two.row(1)]))
    assert not torch.equal(one.row(0), Noise(50, 6, 10, kind).row(0))
    assert not torch.equal(one.row(0), one.row(1))
    state = torch.get_rng_state()
    one.row(3)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(IndexError, match="vector 6 of 6"):
        one.row(6)


@pytest.mark.parametrize("kind", ["table", "independent"])
def test_noise_is_standard_normal_and_uncorrelated(kind):
    num = 20_000
    rows = Noise(8, num, 1, kind).rows(range(num))
    covariance = rows.T @ rows / num
    # Entries have a standard deviation of 1/sqrt(num) = 0.007 (twice that, squared, on the diagonal): five of them.
    torch.testing.assert_close(covariance, torch.eye(8), rtol=0, atol=0.05)
    assert float((rows**4).mean()) == pytest.approx(3, abs=0.15)


def test_long_vectors_are_made_of_several_slices():
    noise = Noise(BLOCK + 5, 1, 0)
    row = noise.row(0)
    assert row.shape == (BLOCK + 5,)
    assert not torch.equal(row[-5:], row[:5])


def test_low_rank_noise_has_unit_variance_and_no_correlation():
    params = {"w": torch.zeros(6, 5)}
    for rank in (1, 2):
        population = LowRankPopulation(params, 20_000, 0, 1.0, rank=rank, mirrored=False)
        noise = population.stack(range(20_000))["w"].flatten(1)
        covariance = noise.T @ noise / len(noise)
        # A product of two normals has a fourth moment of 9, so the diagonal's deviation is sqrt(8 / 20000) = 0.02.
        torch.testing.assert_close(covariance, torch.eye(30), rtol=0, atol=0.12)


def test_small_matrices_and_vectors_get_full_noise():
    population = LowRankPopulation(
        {"w": torch.zeros(8, 9), "small": torch.zeros(2, 2), "b": torch.zeros(4)}, 2, 0, 1.0, rank=1
    )
    assert population.factored == {"w"}
    assert population.noise.dim == 17 + 4 + 4


@pytest.mark.parametrize(
    ("size", "mirrored", "message"),
    [(7, True, "population_size=7 is odd.*give 8, or mirrored=False"), (1, False, "at least 2"), (2.5, False, "whole")],
)
def test_bad_sizes_are_errors(size, mirrored, message):
    with pytest.raises(ValueError, match=message):
        FullRankPopulation(PARAMS, size, 0, 0.1, mirrored=mirrored)


def test_double_precision_is_kept():
    params = {name: tensor.double() for name, tensor in PARAMS.items()}
    population = FullRankPopulation(params, 2, 0, 1e-9)
    difference = (population[0]["w"] - population[1]["w"]) / 2e-9
    assert difference.dtype == torch.float64
    assert 0.5 < float(difference.std()) < 1.5  # float32 would have lost it
