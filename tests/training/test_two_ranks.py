"""Two processes on CPUs: ranks stay bit-equal, and two ranks equal one process with the union of their batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import worker
from ranks import outcomes, run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("two_processes")]  # processes that import torch and lightning

K = 4  # directions of every rule of `worker.RULES` that has any
SCALAR_RULES = [rule for rule in worker.RULES if rule != "backprop"]
LIMIT = 240  # seconds; a run takes ten, unless the ranks wait for each other

Outcomes = Callable[[str], list[dict[str, Any]]]  # of the two ranks, by the name of a case


def run(tmp_path_factory: pytest.TempPathFactory, *parts: str) -> dict[str, Outcomes]:
    """Run parts of the worker in one pair of processes; each gives what the two ranks wrote of a case."""
    out = tmp_path_factory.mktemp("ranks")
    run_ranks(worker.__file__, ",".join(parts), out, LIMIT)
    return {part: partial(outcomes, out / part) for part in parts}


def finished(both: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the ranks wrote, if nothing stopped them."""
    for rank, outcome in enumerate(both):
        assert "error" not in outcome, f"rank {rank}: {outcome['error']}"
        assert outcome["world_size"] == 2
    return both


@pytest.fixture(scope="module")
def with_ddp(tmp_path_factory) -> dict[str, Outcomes]:
    return run(tmp_path_factory, "ddp", "local")


@pytest.fixture(scope="module")
def ddp(with_ddp) -> Outcomes:
    return with_ddp["ddp"]


@pytest.fixture(scope="module")
def local(with_ddp) -> Outcomes:
    return with_ddp["local"]


@pytest.fixture(scope="module")
def scalar_sync(tmp_path_factory) -> dict[str, Outcomes]:
    return run(tmp_path_factory, "data", "directions", "evolution", "drift")


@pytest.fixture(scope="module")
def data(scalar_sync) -> Outcomes:
    return scalar_sync["data"]


@pytest.fixture(scope="module")
def directions(scalar_sync) -> Outcomes:
    return scalar_sync["directions"]


@pytest.fixture(scope="module")
def evolution(scalar_sync) -> Outcomes:
    return scalar_sync["evolution"]


@pytest.fixture(scope="module")
def drift(scalar_sync) -> Outcomes:
    return scalar_sync["drift"]


UNDER = [("ddp", rule) for rule in worker.RULES] + [("data", rule) for rule in SCALAR_RULES]
under_all = pytest.mark.parametrize(("strategy", "rule"), UNDER)


@pytest.fixture
def both(strategy: str, request) -> Outcomes:
    return request.getfixturevalue(strategy)


@cache
def alone(case: Callable[..., dict[str, Any]], rule: str, **settings: Any) -> dict[str, Any]:
    """Return what one process makes of the union of the two ranks' data."""
    return case(rule, 0, 1, **settings)


def assert_bit_equal(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert first["parameters"].keys() == second["parameters"].keys()
    for name, parameter in first["parameters"].items():
        assert torch.equal(parameter, second["parameters"][name]), name


def assert_equal_to_one_process(strategy: str, outcome: dict[str, Any], single: dict[str, Any]) -> None:
    for name, parameter in outcome["parameters"].items():
        if strategy == "ddp":
            # Equal math in float64, added up in another order.
            torch.testing.assert_close(parameter, single["parameters"][name], rtol=1e-10, atol=1e-11)
        else:
            # The slopes cross ranks as float32, with a relative error of 6e-8 each. To first order, an error of that
            # size in every coefficient changes what a parameter moves by as much; the rest is room for momentum and
            # for canceling directions.
            error = (parameter - single["parameters"][name]).abs().max()
            start = start_parameters()[name]
            assert error <= 1e-6 * (single["parameters"][name] - start).abs().max(), name


@cache
def start_parameters() -> dict[str, torch.Tensor]:
    torch.manual_seed(worker.SEED)
    return {name: p.detach().clone() for name, p in worker.Net().double().named_parameters()}


# --- data split over ranks: DDP, and the exchange of coefficients ---


@under_all
@pytest.mark.parametrize("case", ["union", "accumulate", "noisy", "head", "aligned"])
def test_ranks_end_with_equal_bits(case, rule, both):
    ranks = finished(both(f"{case}_{rule}"))
    assert_bit_equal(ranks)
    assert ranks[0]["losses"] != ranks[1]["losses"]  # they did not just do the same


@under_all
@pytest.mark.parametrize("case", ["union", "accumulate"])
def test_two_ranks_equal_one_process_on_the_union_batch(case, strategy, rule, both):
    ranks = finished(both(f"{case}_{rule}"))
    single = alone(worker.union, rule, accumulate=case == "accumulate")
    assert not torch.equal(single["parameters"]["head.weight"], start_parameters()["head.weight"])
    assert_equal_to_one_process(strategy, ranks[0], single)
    assert ranks[0]["record"][0]["batches"] == single["record"][0]["batches"]


@under_all
def test_parameters_outside_of_the_selection_stay_untouched(rule, both):
    for outcome in finished(both(f"head_{rule}")):
        for name, parameter in outcome["parameters"].items():
            assert torch.equal(parameter, outcome["before"][name]) == name.startswith("body"), name


@under_all
def test_alignment_is_the_same_on_all_ranks_and_that_of_one_process(strategy, rule, both):
    first, second = (outcome["cosine"][0] for outcome in finished(both(f"aligned_{rule}")))
    assert first == second
    (measured, cosine) = alone(worker.aligned, rule)["cosine"][0]
    assert first[0] == measured == worker.STEPS
    # float64 under DDP; the parameters have moved by coefficients in float32 under the exchange
    assert first[1] == pytest.approx(cosine, rel=1e-9 if strategy == "ddp" else 1e-5)


@under_all
def test_validation_agrees(rule, both):
    first, second = finished(both(f"noisy_{rule}"))
    assert first["metrics"]["val_loss"] == second["metrics"]["val_loss"]


@under_all
def test_a_resume_goes_on_bit_for_bit_with_the_random_numbers_of_each_rank(rule, both):
    for whole, resumed in zip(finished(both(f"noisy_{rule}")), finished(both(f"resumed_{rule}")), strict=True):
        assert resumed["losses"] == whole["losses"][worker.STEPS :]
        assert all(torch.equal(resumed["parameters"][name], p) for name, p in whole["parameters"].items())


@under_all
def test_default_sampler_gives_each_rank_its_own_rows(rule, both):
    first, second = finished(both(f"noisy_{rule}"))
    assert set(first["batches"]).isdisjoint(second["batches"])


@pytest.mark.parametrize("rule", SCALAR_RULES)
@pytest.mark.parametrize("strategy", ["ddp", "data"])
@pytest.mark.filterwarnings("ignore:.*batch 1 is skipped.*:UserWarning")  # the rule says so, as it should
def test_nan_on_one_rank_skips_the_batch_on_all(strategy, rule, both):
    ranks = finished(both(f"nan_{rule}"))
    assert [outcome["record"][0]["skipped"] for outcome in ranks] == [1, 1]
    assert_bit_equal(ranks)
    assert_equal_to_one_process(strategy, ranks[0], alone(worker.nan_batch, rule))


# --- the exchange of coefficients alone ---


@pytest.mark.parametrize("rule", SCALAR_RULES)
def test_strategy_is_found_by_name(rule, data):
    assert {outcome["strategy"] for outcome in data(f"union_{rule}")} == {"ScalarSyncStrategy"}


@pytest.mark.parametrize("rule", SCALAR_RULES)
def test_bytes_sent_do_not_depend_on_the_model(rule, data):
    small, large = (finished(data(f"width{width}_{rule}")) for width in (8, 80))
    assert sum(p.numel() for p in large[0]["parameters"].values()) > 9 * sum(
        p.numel() for p in small[0]["parameters"].values()
    )
    for outcome in small + large:
        assert outcome["bytes_sent"] == 4 * K * worker.STEPS  # K numbers in float32 a step


@pytest.mark.parametrize("rule", SCALAR_RULES)
def test_buffers_are_equal_after_an_epoch(rule, data, directions):
    for first, second in (finished(data(f"noisy_{rule}")), finished(directions(f"noisy_{rule}"))):
        assert int(first["buffers"]["body.1.num_batches_tracked"]) == 2 * worker.STEPS
        for name, buffer in first["buffers"].items():
            assert torch.equal(buffer, second["buffers"][name]), name


@pytest.mark.parametrize("rule", SCALAR_RULES)
def test_nan_on_one_rank_raises_on_all(rule, data):
    for outcome in data(f"raise_{rule}"):
        assert outcome["error"].startswith("RuntimeError")
        assert "on_nonfinite='skip'" in outcome["error"]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("backprop", "is not a function of a few numbers"),
        ("start_epoch", "has epochs of plain backprop"),
        ("stop_epoch", "has epochs of plain backprop"),
        ("no_rule", "no training rule is among the callbacks"),
    ],
)
def test_what_needs_gradients_between_ranks_is_refused(case, reason, data):
    for outcome in data(f"refused_{case}"):
        assert outcome["error"].startswith("MisconfigurationException")
        assert reason in outcome["error"]
        assert "strategy='ddp'" in outcome["error"]  # the cure


@pytest.mark.parametrize("kind", ["push", "last_bit", "flip"])
def test_drift_of_one_rank_is_found_by_all(kind, drift):
    for outcome in drift(f"drift_{kind}"):
        assert "error" in outcome, "nobody has seen that rank 1 has other weights"
        assert outcome["error"].startswith("RuntimeError: Rank 1's parameters differ")
        assert "strategy='ddp'" in outcome["error"]


# --- directions split over ranks ---

# Per step, by hand: a dual forward costs 3, a pass over C directions 1 + 2 C, and a rank that has not evaluated the
# plain loss does that once more. The columns are one process, rank 0 and rank 1.
EVALUATIONS = {
    "loop4": (12, 6, 6),
    "loop3": (9, 6, 3),
    "loop1": (3, 3, 1),
    "vectorized4": (10, 6, 6),
    "vectorized3": (8, 6, 4),
    "zeroth4": (9, 5, 5),
    "zeroth3": (7, 5, 3),
    "zeroth1": (3, 3, 1),
    "forward_scheme3": (4, 3, 2),
}


@cache
def same_batch_alone(name: str) -> dict[str, Any]:
    return worker.same_batch(worker.DIRECTION_RULES[name](), 1)


@pytest.mark.parametrize("name", worker.DIRECTION_RULES)
def test_split_directions_equal_one_process_with_all_of_them(name, directions):
    ranks = finished(directions(f"same_{name}"))
    assert_bit_equal(ranks)
    assert_equal_to_one_process("directions", ranks[0], same_batch_alone(name))


@pytest.mark.parametrize("name", EVALUATIONS)
def test_split_directions_split_the_work(name, directions):
    single, *shares = EVALUATIONS[name]
    assert same_batch_alone(name)["record"][0]["forward_evals"] == single * worker.STEPS
    found = [outcome["record"][0]["forward_evals"] for outcome in finished(directions(f"same_{name}"))]
    assert found == [share * worker.STEPS for share in shares]


@pytest.mark.parametrize("name", worker.DIRECTION_RULES)
def test_split_directions_send_one_share(name, directions):
    num = int(name[-1])
    for outcome in finished(directions(f"same_{name}")):
        assert outcome["bytes_sent"] == 4 * -(-num // 2) * worker.STEPS


@pytest.mark.parametrize("rule", SCALAR_RULES)
def test_default_sampler_gives_all_ranks_the_same_rows_under_split_directions(rule, directions):
    first, second = finished(directions(f"noisy_{rule}"))
    assert first["batches"] == second["batches"]
    assert first["batches"][: worker.STEPS] != first["batches"][worker.STEPS :]  # and shuffles every epoch
    assert_bit_equal([first, second])


@pytest.mark.parametrize("rule", SCALAR_RULES)
def test_nan_in_one_share_skips_the_batch_on_all(rule, directions):
    ranks = finished(directions(f"nan_{rule}"))
    assert [outcome["record"][0]["skipped"] for outcome in ranks] == [1, 1]
    assert_bit_equal(ranks)


# --- populations ---


@pytest.mark.parametrize("name", worker.EVOLUTION_RULES)
def test_a_split_population_equals_one_process_bit_for_bit(name, evolution):
    """Fitness is float32 on one rank as on many, and a member's does not depend on who measures it in a loop."""
    ranks = finished(evolution(f"split_{name}"))
    assert_bit_equal(ranks)
    single = worker.evolved(worker.EVOLUTION_RULES[name](), devices=1)
    for key, parameter in single["parameters"].items():
        if name == "low_rank":  # chunks of other sizes: products of matrices round otherwise, in float64
            torch.testing.assert_close(ranks[0]["parameters"][key], parameter, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(ranks[0]["parameters"][key], parameter), key
    for outcome in ranks if name not in ("low_rank", "openai_es") else []:
        assert torch.equal(outcome["std"], single["std"])
    num = 9 if name == "sep_cma_es" else 8
    assert ranks[0]["bytes_sent"] == 4 * -(-num // 2) * worker.STEPS  # fitness of a share, and nothing else
    if name != "low_rank":
        shares = [outcome["record"][0]["forward_evals"] / worker.STEPS for outcome in ranks]
        assert shares == [1 + -(-num // 2), 1 + num // 2]


@pytest.mark.parametrize("name", worker.EVOLUTION_RULES)
@pytest.mark.parametrize("case", ["ddp", "ddp_accumulated", "bpfree_scalar_sync", "bpfree_scalar_sync_accumulated"])
def test_populations_on_data_of_each_rank_stay_together(case, name, evolution):
    ranks = finished(evolution(f"{case}_{name}"))
    assert_bit_equal(ranks)
    assert torch.equal(ranks[0]["std"], ranks[1]["std"])  # the search as well as its mean
    assert ranks[0]["batches"] != ranks[1]["batches"]


def test_a_rank_that_learns_nothing_steps_with_the_others(evolution):
    ranks = finished(evolution("flat"))
    assert_bit_equal(ranks)
    assert torch.equal(ranks[0]["std"], ranks[1]["std"])
    assert [outcome["record"][0]["skipped"] for outcome in ranks] == [0, 1]


# --- losses in blocks, under DDP ---


@pytest.mark.parametrize("name", worker.LOCAL_RULES)
def test_losses_in_blocks_equal_one_process_on_the_union_batch(name, local):
    ranks = finished(local(name))
    assert_bit_equal(ranks)
    if name == "guess in weights":
        return  # each rank projects its own gradient on its own guess: a mean of projections, not that of the union
    single = worker.local(name, 0, 1)
    tolerance = {
        "peers": {"rtol": 1e-2, "atol": 1e-3},  # running means are each rank's own: they follow its part of the data
        "embedding": {"rtol": 1e-5, "atol": 1e-6},  # it is in float32
    }.get(name, {"rtol": 1e-10, "atol": 1e-11})
    for key, parameter in single["parameters"].items():
        torch.testing.assert_close(ranks[0]["parameters"][key], parameter, **tolerance)
    if single["own"] is not None:
        for key, tensor in single["own"].items():
            assert torch.equal(ranks[0]["own"][key], ranks[1]["own"][key])
            torch.testing.assert_close(ranks[0]["own"][key], tensor, rtol=1e-4, atol=1e-6)  # it is in float32
