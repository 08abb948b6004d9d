"""Search algorithms: gradients against closed forms, what deviations learn, and what ranks are blind to."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_bpfree.methods.evolution_strategy.population.population import FullRankPopulation
from lightning_bpfree.methods.evolution_strategy.search.des import DES
from lightning_bpfree.methods.evolution_strategy.search.fitness_shaping import ranked, shaped
from lightning_bpfree.methods.evolution_strategy.search.openai_es import OpenAIES
from lightning_bpfree.methods.evolution_strategy.search.pgpe import PGPE
from lightning_bpfree.methods.evolution_strategy.search.sep_cma_es import SepCMAES
from lightning_bpfree.methods.evolution_strategy.search.snes import SNES

EVERY = {"openai_es": OpenAIES, "pgpe": PGPE, "snes": SNES, "sep_cma_es": SepCMAES, "des": DES}
ADAPTIVE = {name: kind for name, kind in EVERY.items() if name != "openai_es"}


def fitness_of(function, population) -> torch.Tensor:
    return function(population.stack(range(len(population)))["x"])


def searched(algorithm, function, x, generations, size, optimizer=None, transform=lambda f: f, seed=0):
    """Minimize; returns the points and the standard deviations on the way."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.SGD([x], lr=1.0) if optimizer is None else optimizer([x])
    points, stds = [], []
    for generation in range(generations):
        population = algorithm.ask({"x": x.detach()}, size, seed=seed * 100_000 + generation)
        x.grad = algorithm.tell(population, transform(fitness_of(function, population)))["x"]
        algorithm.step()
        optimizer.step()
        points.append(x.detach().clone())
        stds.append(algorithm.std.clone())
    return points, stds


# --- the estimator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.05, 1.0])
def test_mirrored_estimates_are_the_gradient_of_quadratics(sigma):
    """On a quadratic, smoothing adds a constant: the antithetic estimate has the true gradient as its mean."""
    torch.manual_seed(0)
    dim, num = 20, 40_000
    h, x = torch.rand(dim, dtype=torch.float64) + 0.1, torch.randn(dim, dtype=torch.float64)
    algorithm = OpenAIES(sigma=sigma, shaping="raw")
    population = algorithm.ask({"x": x}, num, seed=0, noise="independent")
    estimate = algorithm.tell(population, fitness_of(lambda p: (h * p * p).sum(-1) / 2, population))["x"]
    error = (estimate - h * x).norm() / (h * x).norm()
    # E |ghat - g| / |g| = sqrt((dim + 1) / K) = 0.0324 with K = num / 2 directions; the norm of the error spreads by
    # about 1 / sqrt(2 dim) = 16 % around it: five of these.
    assert float(error) == pytest.approx(math.sqrt((dim + 1) / (num / 2)), rel=0.8)
    along = float((estimate @ (h * x)) / (h * x).square().sum())
    assert along == pytest.approx(1.0, abs=5 * math.sqrt(2 / (num / 2)))  # Var of <z, u>^2 is 2


def test_the_bias_of_smoothing_is_three_sigma_squared_x_plus_sigma_squared():
    """For x^4/4 + x^3/3 the smoothed gradient is x^3 + x^2 + 3 s^2 x + s^2, exactly."""
    x, sigma, num = 1.3, 0.4, 2_000_000
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(num // 2, generator=generator, dtype=torch.float64)
    weights = OpenAIES(sigma=sigma, shaping="raw").weights(
        torch.cat([_quartic(x + sigma * z), _quartic(x - sigma * z)])
    )
    estimate = float((weights.first[: num // 2] - weights.first[num // 2 :]) @ z) / sigma
    # The spread of one pair's term is below 10 at these numbers: 10 / sqrt(1e6) = 0.01, five of them.
    assert estimate - (x**3 + x**2) == pytest.approx(3 * sigma**2 * x + sigma**2, abs=0.05)


def _quartic(x):
    return x**4 / 4 + x**3 / 3


def test_mirroring_removes_the_variance_of_the_fitness_itself():
    """Without a baseline, terms f z / s vary as (f / s)^2; mirrored ones as |g|^2 (d + 1), whatever sigma."""
    torch.manual_seed(0)
    dim, num, offset = 20, 4000, 10.0
    g = torch.randn(dim, dtype=torch.float64)
    variances = {}
    for mirrored in (True, False):
        for sigma in (0.1, 0.01):
            terms = []
            algorithm = OpenAIES(sigma=sigma, shaping="raw")
            for seed in range(200):
                population = algorithm.ask(
                    {"x": torch.zeros(dim, dtype=torch.float64)}, num // 100, seed, mirrored=mirrored
                )
                terms.append(algorithm.tell(population, fitness_of(lambda p: p @ g + offset, population))["x"])
            variances[mirrored, sigma] = float(torch.stack(terms).var(0).sum()) * num / 100
    theory = float(g.square().sum()) * (dim + 1)
    # The sum over 20 coordinates of a variance from 200 draws: a relative spread of sqrt(2 / 200) / sqrt(20), and heavy
    # tails: 20 % is more than five of these. A pair counts as two members, hence the 2.
    assert variances[True, 0.1] == pytest.approx(2 * theory, rel=0.2)
    assert variances[True, 0.01] == pytest.approx(2 * theory, rel=0.2)
    assert variances[False, 0.1] > (offset / 0.1) ** 2 * dim * 0.7
    assert variances[False, 0.01] > 70 * variances[False, 0.1]


def test_low_rank_estimates_point_as_full_rank_ones_do():
    """The cosine to the true gradient of a linear fitness is that of full rank, to theory: sqrt(K / (K + d + 1))."""
    torch.manual_seed(0)
    g, num = torch.randn(20, 30), 600
    cosines = {}
    for rank in (None, 1, 4):
        algorithm, found = OpenAIES(sigma=0.1, shaping="raw"), []
        for seed in range(10):
            population = algorithm.ask({"x": torch.zeros(20, 30)}, num, seed, rank=rank)
            estimate = algorithm.tell(population, (population.stack(range(num))["x"] * g).sum((1, 2)))["x"]
            found.append(torch.nn.functional.cosine_similarity(estimate.flatten(), g.flatten(), 0))
        cosines[rank] = float(torch.stack(found).mean())
    theory = math.sqrt(300 / (300 + 601))
    for cosine in cosines.values():
        # <g, A B^T> has a larger fourth moment, which costs rank 1 a little; a cosine spreads by 1 / sqrt(600) = 0.04,
        # the mean of ten by 0.013.
        assert cosine == pytest.approx(theory, abs=0.065)
    assert cosines[4] <= cosines[None] + 0.05


# --- what deviations learn --------------------------------------------------------------------------------------------


def slope_of_std(algorithm, size, generations, seed=0, optimizer=None):
    """Slope of log(std) over log(curvature) on a separable quadratic."""
    h = torch.logspace(-2, 2, 30)
    x = torch.randn(30, generator=torch.Generator().manual_seed(seed))
    _, stds = searched(algorithm, lambda p: (h * p * p).sum(-1) / 2, x, generations, size, optimizer, seed=seed)
    log_h, log_std = h.log(), stds[-1].log()
    log_h, log_std = log_h - log_h.mean(), log_std - log_std.mean()
    return float((log_h @ log_std) / (log_h @ log_h))


@pytest.mark.parametrize("seed", range(3))
def test_snes_learns_curvature(seed):
    assert slope_of_std(SNES(sigma=0.5), 64, 200, seed) == pytest.approx(-0.5, abs=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_sep_cma_es_learns_curvature(seed):
    assert slope_of_std(SepCMAES(sigma=0.5), 64, 200, seed) == pytest.approx(-0.5, abs=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_pgpe_learns_curvature(seed):
    """A published version has the wrong sign and the wrong pairs here: its slope is positive, or nil."""
    adam = lambda x: torch.optim.Adam(x, lr=0.01)  # noqa: E731
    assert slope_of_std(PGPE(sigma=0.1), 128, 600, seed, adam) == pytest.approx(-0.5, abs=0.1)


def test_des_deviations_fall_where_curvature_is_high():
    assert slope_of_std(DES(sigma=0.5), 64, 200) < -0.05


@pytest.mark.parametrize("name", ["snes", "sep_cma_es"])
def test_steps_follow_the_published_formulas(name):
    """One generation of SNES and of Sep-CMA-ES, against formulas written out over members."""
    torch.manual_seed(0)
    algorithm = EVERY[name](sigma=0.3)
    x, num = torch.randn(5, dtype=torch.float64), 8
    population = algorithm.ask({"x": x}, num, seed=1)
    z = population.noise.rows(range(num))
    fitness = torch.tensor([3.0, 1.0, 7.0, 5.0, 0.0, 2.0, 6.0, 4.0])
    z = z[fitness.argsort()]
    gradient = algorithm.tell(population, fitness)["x"]
    algorithm.step()
    i = torch.arange(1, num + 1, dtype=torch.float64)
    if name == "snes":
        u = (math.log(num / 2 + 1) - i.log()).clamp_min(0)
        u = u / u.sum() - 1 / num
        rate = (3 + math.log(5)) / (5 * math.sqrt(5))
        mean, std = x + 0.3 * u @ z, 0.3 * torch.exp(rate / 2 * (u @ (z * z - 1)))
    else:
        w = (math.log(5) - i[:4].log()) / (math.log(5) - i[:4].log()).sum()
        y, d, mu = w @ z[:4], 5, 1 / float(w.square().sum())
        c_s = (mu + 2) / (d + mu + 3)
        d_s = 1 + 2 * max(0, math.sqrt((mu - 1) / (d + 1)) - 1) + c_s
        c_c, c_1 = 4 / (d + 4), 2 / ((d + 1.3) ** 2 + mu)
        share = min(1.0, (2 * mu - 1) / ((d + 2) ** 2 + mu))
        c_mu = (d + 2) / 3 * (2 / (mu * (d + math.sqrt(2)) ** 2) + (1 - 1 / mu) * share)
        chi = math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d * d))
        p_s = math.sqrt(c_s * (2 - c_s) * mu) * y
        h = float(p_s.norm() / math.sqrt(1 - (1 - c_s) ** 2) < (1.4 + 2 / (d + 1)) * chi)
        p_c = h * math.sqrt(c_c * (2 - c_c) * mu) * y
        c = 1 + c_1 * (1 - h) * c_c * (2 - c_c) - c_1 - c_mu + c_1 * p_c**2 + c_mu * w @ z[:4] ** 2
        mean, std = x + 0.3 * y, 0.3 * math.exp(c_s / d_s * (float(p_s.norm()) / chi - 1)) * c.sqrt()
    torch.testing.assert_close(x - gradient, mean)
    torch.testing.assert_close(algorithm.std, std)


def test_pgpe_gradients_follow_the_pairs():
    algorithm = PGPE(sigma=0.2, shaping="raw")
    x = torch.zeros(4, dtype=torch.float64)
    population = algorithm.ask({"x": x}, 6, seed=0)
    plus, minus = torch.tensor([1.0, 5.0, 2.0]).double(), torch.tensor([4.0, 0.5, 2.5]).double()
    e = 0.2 * population.noise.rows(range(3))
    gradient = algorithm.tell(population, torch.cat([plus, minus]))["x"]
    torch.testing.assert_close(gradient, ((plus - minus)[:, None] / 2 * e).mean(0))
    algorithm.step()
    score = (plus + minus) / 2 - torch.cat([plus, minus]).mean()
    grad_std = (score[:, None] * (e**2 - 0.04) / 0.2).mean(0)
    torch.testing.assert_close(algorithm.std, 0.2 - (0.1 * grad_std).clamp(-0.04, 0.04))


@pytest.mark.parametrize("name", EVERY)
def test_every_algorithm_finds_the_minimum(name):
    torch.manual_seed(0)
    target = torch.randn(10)
    adam = (lambda x: torch.optim.Adam(x, lr=0.05)) if name in ("openai_es", "pgpe") else None
    points, _ = searched(
        EVERY[name](sigma=0.3), lambda p: (p - target).square().sum(-1), torch.zeros(10), 300, 32, adam
    )
    # Where sigma does not fall (OpenAI-ES), the mean is left with a random walk of Adam's step.
    assert float((points[-1] - target).norm()) < 0.25


# --- invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_only_ranks_count(name):
    """f and exp(f) give the same run, bit for bit, same seed."""
    function = lambda p: p.square().sum(-1)  # noqa: E731
    start = torch.ones(4)
    plain, std = searched(EVERY[name](sigma=0.2), function, start, 12, 8)
    mapped, std_mapped = searched(EVERY[name](sigma=0.2), function, start, 12, 8, transform=torch.exp)
    assert all(map(torch.equal, plain, mapped))
    assert all(map(torch.equal, std, std_mapped))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_translation_of_the_landscape_translates_the_run(name):
    shift = torch.tensor([8.0, -4.0, 2.0, 16.0], dtype=torch.float64)  # short in binary: sums round alike
    one, std = searched(EVERY[name](sigma=0.2), lambda p: p.square().sum(-1), torch.ones(4).double(), 10, 8)
    two, std_two = searched(
        EVERY[name](sigma=0.2), lambda p: (p - shift).square().sum(-1), torch.ones(4).double() + shift, 10, 8
    )
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(b - shift, a, rtol=0, atol=1e-12)
    torch.testing.assert_close(std, std_two)


def test_ties_share_their_ranks():
    fitness = torch.tensor([2.0, 1.0, 2.0, 2.0, 0.0])
    weights = ranked(fitness, torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]))
    assert torch.equal(weights, torch.tensor([1.0, 3.0, 1.0, 1.0, 4.0]).double())
    assert torch.equal(shaped(torch.ones(4), "centered_rank"), torch.zeros(4).double())
    assert torch.equal(shaped(torch.ones(4), "z_score"), torch.zeros(4).double())


def test_an_infinite_fitness_is_the_worst_rank():
    one = shaped(torch.tensor([1.0, float("inf"), 0.0]), "centered_rank")
    assert torch.equal(one, shaped(torch.tensor([1.0, 99.0, 0.0]), "centered_rank"))


def test_z_scores_are_blind_to_scale_and_offset():
    fitness = torch.tensor([1.0, 5.0, 2.0, 9.0]).double()
    torch.testing.assert_close(shaped(fitness, "z_score"), shaped(3 * fitness - 7, "z_score"))
    assert float(shaped(fitness, "z_score").std(correction=0)) == pytest.approx(1)


# --- the cycle --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_a_saved_search_goes_on_where_it_was(name):
    function, start = lambda p: p.square().sum(-1), torch.ones(4)
    whole, _ = searched(EVERY[name](sigma=0.2, sigma_decay=0.99), function, start, 8, 8)
    first = EVERY[name](sigma=0.2, sigma_decay=0.99)
    half, _ = searched(first, function, start, 4, 8)
    second = EVERY[name](sigma=0.2, sigma_decay=0.99)
    second.load_state_dict(first.state_dict())
    x = half[-1].clone()
    for generation in range(4, 8):
        population = second.ask({"x": x}, 8, seed=generation)
        x = x - second.tell(population, fitness_of(function, population))["x"]
        second.step()
    assert torch.equal(x, whole[-1])


@pytest.mark.parametrize("name", [name for name in ADAPTIVE if name != "sep_cma_es"])
def test_told_twice_before_a_step_it_learns_from_the_mean(name):
    function, start = lambda p: p.square().sum(-1), {"x": torch.ones(4)}
    once, twice = EVERY[name](sigma=0.2), EVERY[name](sigma=0.2)
    population = once.ask(start, 8, seed=0)
    fitness = fitness_of(function, population)
    once.tell(population, fitness)
    once.step()
    for _ in range(2):
        twice.tell(twice.ask(start, 8, seed=0), fitness)
    twice.step()
    torch.testing.assert_close(once.std, twice.std)
    twice.step()  # nothing was told since
    torch.testing.assert_close(once.std, twice.std)


def test_the_step_size_of_sep_cma_es_stands_still_on_random_fitness_however_many_it_is_told_of():
    """The mean of k populations is shorter by sqrt(k); taken for one, it would let the step size collapse."""
    for told in (1, 4):
        algorithm, generator = SepCMAES(sigma=0.05), torch.Generator().manual_seed(0)
        for generation in range(60):
            for k in range(told):
                population = algorithm.ask({"x": torch.zeros(100)}, 32, seed=generation * told + k)
                algorithm.tell(population, torch.rand(32, generator=generator))
            algorithm.step()
        assert 0.02 < float(algorithm.std.mean()) < 0.1  # 0.0006 in 60 steps if it collapsed


def test_schedules_of_sigma():
    algorithm = OpenAIES(sigma=0.1, sigma_decay=0.5, sigma_min=0.03)
    _, stds = searched(algorithm, lambda p: p.square().sum(-1), torch.ones(2), 4, 4)
    torch.testing.assert_close(torch.stack(stds), torch.tensor([0.05, 0.03, 0.03, 0.03]).double())
    algorithm.restart()
    assert float(algorithm.std) == 0.1
    _, stds = searched(SNES(sigma=0.1, sigma_min=0.09), lambda p: p.square().sum(-1), torch.ones(2), 60, 4)
    assert float(stds[-1].min()) == pytest.approx(0.09)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_what_was_learned_stays_with_its_parameter(name):
    """Unfreezing a layer between two others moves no deviation to another parameter."""
    algorithm = EVERY[name](sigma=0.2)
    a, b, c = torch.ones(3), torch.ones(3), torch.ones(3)
    for generation in range(5):
        population = algorithm.ask({"a": a, "c": c}, 8, seed=generation)
        stacked = population.stack(range(8))
        algorithm.tell(population, (100 * stacked["a"].square() + stacked["c"].square()).sum(1))
        algorithm.step()
    learned = algorithm.std.clone()
    population = algorithm.ask({"a": a, "b": b, "c": c}, 8, seed=9)
    assert torch.equal(algorithm.std, torch.cat([learned[:3], torch.full((3,), 0.2), learned[3:]]))
    population = algorithm.ask({"b": b, "c": c}, 8, seed=9)
    assert torch.equal(algorithm.std, torch.cat([torch.full((3,), 0.2), learned[3:]]))
    algorithm.tell(population, torch.arange(8.0))
    algorithm.step()
    assert algorithm.std.shape == (6,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OpenAIES(sigma=0), "sigma=0: give a positive"),
        (lambda: SNES(sigma_decay=1.5), r"sigma_decay=1\.5"),
        (lambda: PGPE(sigma_min=1.0), r"sigma_min=1\.0.*sigma=0\.05"),
        (lambda: PGPE(max_change=1.0), r"max_change=1\.0"),
        (lambda: OpenAIES(shaping="rank"), "shaping='rank'.*centered_rank"),
        (lambda: SepCMAES(elite_ratio=0), "elite_ratio=0"),
        (lambda: DES(sigma_lr=2), "sigma_lr=2"),
        (lambda: SNES(temperature=-1), "temperature=-1"),
        (lambda: SNES().ask({"x": torch.zeros(3, 9)}, 4, 0, rank=1), "rank with SNES.*Use OpenAIES"),
        (
            lambda: OpenAIES().ask({"x": torch.zeros(2, 2)}, 4, 0, rank=1, masks={"x": torch.eye(2) > 0}),
            "rank with masks",
        ),
        (lambda: OpenAIES().ask({"x": torch.zeros(9, 9)}, 4, 0, rank=0), "rank=0"),
        (lambda: OpenAIES().ask({"x": torch.zeros(9)}, 4, 0, noise="white"), "noise='white'"),
        (lambda: FullRankPopulation({"x": torch.zeros(1)}, 3, 0, 0.1), "population_size=3 is odd"),
    ],
)
def test_bad_arguments_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
