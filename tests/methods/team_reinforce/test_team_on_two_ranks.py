"""A team under ddp: ranks draw for themselves, and stay together in weights, lateral weights and critics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import team_worker
import torch
from ranks import outcomes, run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two_processes")]  # processes that import torch and lightning


@pytest.fixture(scope="module")
def fits(tmp_path_factory) -> Path:
    out: Path = tmp_path_factory.mktemp("fits")
    run_ranks(team_worker.__file__, "fits", out, 240)
    return out


def ranks(out: Path, case: str) -> list[dict[str, Any]]:
    both = outcomes(out, case)
    assert [outcome["world_size"] for outcome in both] == [2, 2]
    return both


def assert_equal_bits(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal_bits(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal_bits(a, b, f"{where}[{index}]")
    else:
        assert one == other, where


@pytest.mark.parametrize("case", team_worker.CASES)
def test_ranks_end_with_equal_bits(case, fits):
    one, two = ranks(fits, case)
    assert_equal_bits(one["parameters"], two["parameters"])
    assert_equal_bits(one["rule"], two["rule"])  # lateral weights, critics, and the moments of their optimizers
    assert not torch.equal(one["own"][0]["net.0.weight"], two["own"][0]["net.0.weight"])  # from different estimates
    settings, _ = team_worker.CASES[case]
    assert len(one["rule"]["lateral"]) == (2 if "exploration" in settings else 0)
    for saved in one["rule"]["lateral"].values():
        assert bool(saved["module"]["weight"].any())
    assert len(one["rule"]["critics"]) == {"per_layer": 3, "critic": 1}.get(settings.get("baseline"), 0)


@pytest.mark.parametrize("case", [name for name in team_worker.CASES if name not in ("accumulated", "weight_max")])
def test_the_optimizer_gets_the_mean_of_the_ranks_own_estimates(case, fits):
    one, two = ranks(fits, case)
    for step in range(2 * team_worker.STEPS):
        for name, given in one["given"][step].items():
            assert torch.equal(given, two["given"][step][name])
            mean = (one["own"][step][name] + two["own"][step][name]) / 2
            torch.testing.assert_close(given, mean, rtol=1e-12, atol=1e-15)  # half of each, added up: float64
            assert bool(given.any())


def test_accumulated_batches_are_averaged_over_ranks_too(fits):
    one, two = ranks(fits, "accumulated")
    assert len(one["given"]) == team_worker.STEPS
    for step, given in enumerate(one["given"]):
        for name, gradient in given.items():
            parts = [rank["own"][batch][name] for rank in (one, two) for batch in (2 * step, 2 * step + 1)]
            torch.testing.assert_close(gradient, sum(parts) / 4, rtol=1e-12, atol=1e-15)  # float64, in another order


def test_lateral_weights_learn_from_the_mean_over_ranks(fits):
    """Adam's first moment after the first step of an epoch-long run is seen in what the moments are in the end."""
    one, two = ranks(fits, "boltzmann")
    for name, saved in one["rule"]["lateral"].items():
        moment = torch.zeros_like(saved["module"]["weight"])
        for mine, theirs in zip(one["lateral"], two["lateral"], strict=True):
            assert not torch.equal(mine[name], theirs[name])
            moment = 0.9 * moment + 0.1 * (mine[name] + theirs[name]) / 2
        torch.testing.assert_close(saved["optimizer"]["state"][0]["exp_avg"], moment, rtol=1e-10, atol=1e-15)


def test_ranks_draw_different_noise(fits):
    one, two = ranks(fits, "same")
    assert_equal_bits(one["parameters"], two["parameters"])
    for step in range(team_worker.STEPS):  # of the same batches, by the same weights
        assert not torch.equal(one["actions"][step], two["actions"][step])
        assert not torch.equal(one["own"][step]["net.0.weight"], two["own"][step]["net.0.weight"])


def assert_skipped_together(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["skipped"] == two["skipped"] == 1
    assert_equal_bits(one["parameters"], two["parameters"])
    assert_equal_bits(one["rule"], two["rule"])


def test_a_reward_that_is_no_number_on_one_rank_skips_the_batch_on_both(fits):
    assert_skipped_together(*ranks(fits, "nan"))


def test_a_batch_that_is_skipped_leaves_nothing_behind(tmp_path):
    run_ranks(team_worker.__file__, "nan", tmp_path, 240)
    assert_skipped_together(*ranks(tmp_path, "nan_lateral"))
