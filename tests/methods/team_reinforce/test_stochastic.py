"""Stochastic units against autograd, against torch.distributions, and by their frequencies."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import distributions as d

import lightning_bpfree as bpf
from lightning_bpfree.methods.team_reinforce.units.stochastic import unit_named

EXACT = 1e-12  # float64, a handful of operations on numbers of size 1
ERRORS = 5.0  # standard errors: 6e-7 for a normal number, and a test looks at a few dozen of them
DRAWS = 100_000

MAKE = {
    "bernoulli": lambda t: bpf.Bernoulli(temperature=t),
    "sign": lambda t: bpf.Bernoulli("plus_minus_one", t),
    "softplus": lambda t: bpf.Gaussian(0.3, temperature=t),
    "relu": lambda t: bpf.Gaussian(2.0, "relu", t),
    "tanh": lambda t: bpf.Gaussian(0.05, "tanh", t),
    "linear": lambda t: bpf.Gaussian(0.7, "linear", t),
    "softmax": lambda t: bpf.Softmax(t),
}
TWO_VALUES = ("bernoulli", "sign")
GAUSSIAN = ("softplus", "relu", "tanh", "linear")
one_agent_a_unit = pytest.mark.parametrize("kind", [name for name in MAKE if name != "softmax"])


@pytest.fixture(params=MAKE)
def kind(request):
    return request.param


@pytest.fixture(params=[1.0, 1.7])
def unit(request, kind):
    return MAKE[kind](request.param)


def potentials(rows: int = 6, units: int = 5) -> torch.Tensor:
    """Numbers of both signs, the largest of which saturate units."""
    return 3 * torch.randn(rows, units, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def seeded(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


# --- closed forms --------------------------------------------------------------------------------------------------


def test_the_score_is_the_derivative_of_the_log_probability(unit):
    x = potentials().requires_grad_()
    value = unit.sample(x, seeded())
    (expected,) = torch.autograd.grad(unit.log_prob(x, value).sum(), x)
    close(unit.score(x.detach(), value), expected)


def test_the_derivative_is_that_of_each_mean_by_its_own_potential(unit):
    x = potentials()
    for row in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda z: unit.mean(z[None])[0], x[row])
        close(unit.derivative(x)[row], jacobian.diagonal())


def test_log_probabilities_are_those_of_torch_distributions(unit, kind):
    x = potentials()
    value, logits = unit.sample(x, seeded()), x / unit.temperature
    if kind in TWO_VALUES:
        upper = (value > 0).double()
        expected = d.Bernoulli(logits=logits).log_prob(upper).sum(1)
    elif kind == "softmax":
        expected = d.OneHotCategorical(logits=logits).log_prob(value)
    else:
        mean = {"softplus": torch.nn.functional.softplus, "relu": torch.relu, "tanh": torch.tanh}.get(kind, lambda z: z)
        expected = d.Normal(mean(logits), unit.variance**0.5).log_prob(value).sum(1)
    close(unit.log_prob(x, value), expected)


@one_agent_a_unit
def test_units_of_many_dimensions_are_summed_row_by_row(kind):
    unit, flat = MAKE[kind](1.7), potentials(4, 12)
    x = flat.view(4, 3, 2, 2)
    value = unit.sample(x, seeded())
    close(unit.log_prob(x, value), unit.log_prob(flat, value.view(4, 12)))
    assert torch.equal(unit.score(x, value).view(4, 12), unit.score(flat, value.view(4, 12)))


def test_the_scale_is_what_a_deviation_from_the_mean_is_multiplied_by(kind):
    unit, x = MAKE[kind](1.7), potentials()
    value = unit.sample(x, seeded())
    if unit.discrete:
        close(unit.score(x, value), (value - unit.mean(x)) * unit.scale)
    else:
        close(unit.score(x, value), (value - unit.mean(x)) * unit.derivative(x) / unit.variance)


# --- draws ---------------------------------------------------------------------------------------------------------


def test_a_draw_is_a_sample_and_its_score(unit):
    x = potentials()
    value, score = unit.draw(x, seeded())
    assert torch.equal(value, unit.sample(x, seeded()))
    close(score, unit.score(x, value))  # the same number, had in another order of operations


def test_draws_come_from_the_generator_alone_and_carry_no_graph(unit):
    x, before = potentials().requires_grad_(), torch.get_rng_state()
    for made in (unit.sample(x, seeded()), *unit.draw(x, seeded())):
        assert not made.requires_grad
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(unit.sample(x, seeded()), unit.sample(x, seeded()))
    assert not torch.equal(unit.sample(x, seeded(2)), unit.sample(x, seeded(3)))


def many(unit) -> tuple[torch.Tensor, torch.Tensor]:
    """Return potentials, one row of them, and draws, one row for each."""
    x = potentials(1)
    return x, unit.sample(x.expand(DRAWS, -1), seeded())


def test_samples_have_the_mean(unit, kind):
    """For softmax: every choice has its probability."""
    x, values = many(unit)
    mean = unit.mean(x)[0]
    variance = unit.variance * torch.ones_like(mean) if not unit.discrete else mean * (1 - mean)
    if kind == "sign":
        variance = 1 - mean**2
    assert bool(((values.mean(0) - mean).abs() <= ERRORS * (variance / DRAWS).sqrt()).all())


def test_values_are_those_of_the_unit(unit, kind):
    _, values = many(unit)
    if kind in TWO_VALUES:
        assert set(values.unique().tolist()) == {unit.low, 1.0}
    elif kind == "softmax":
        assert set(values.unique().tolist()) == {0.0, 1.0}
        assert bool((values.sum(1) == 1).all())
    else:
        # The variance of a sample variance of normal numbers is 2 / n times its square.
        error = (values.var(0) / unit.variance - 1).abs()
        assert bool((error <= ERRORS * (2 / DRAWS) ** 0.5).all())


@one_agent_a_unit
def test_units_of_a_layer_are_drawn_independently(kind):
    unit = MAKE[kind](1.0)
    values = unit.sample(0.5 * potentials(1).expand(DRAWS, -1), seeded())
    correlation = torch.corrcoef(values.T) - torch.eye(5, dtype=values.dtype)
    assert float(correlation.abs().max()) <= ERRORS / DRAWS**0.5  # the spread of a correlation of independent numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_potentials_give_single_precision_values(unit, dtype):
    x = potentials().to(dtype)
    value, score = unit.draw(x, seeded())
    for found in (value, score, unit.mean(x), unit.derivative(x), unit.log_prob(x, value), unit.score(x, value)):
        assert found.dtype == torch.float32
    torch.testing.assert_close(unit.mean(x), unit.mean(x.float()), rtol=0, atol=0)  # the numbers, not their type, count


def test_a_choice_that_is_ruled_out_is_never_drawn():
    """Scores of minus infinity are how networks rule actions out."""
    unit, x = bpf.Softmax(), torch.tensor([[0.3, -torch.inf, 1.0]]).expand(1000, -1)
    value, score = unit.draw(x, seeded())
    assert not value[:, 1].any()
    assert bool(torch.isfinite(score).all())


def test_the_log_probability_of_a_choice_is_finite_where_another_is_ruled_out():
    unit, x = bpf.Softmax(), torch.tensor([[0.0, -torch.inf, 0.0]])
    assert float(unit.log_prob(x, torch.tensor([[1.0, 0.0, 0.0]]))) == pytest.approx(-0.6931471806, rel=1e-6)


# --- as modules in a network ---------------------------------------------------------------------------------------


def test_a_module_draws_in_training_and_gives_the_mean_in_evaluation(unit):
    x = potentials()
    assert torch.equal(unit.eval()(x), unit.mean(x))
    torch.manual_seed(5)
    found = unit.train()(x)
    torch.manual_seed(5)
    close(found, unit.sample(x))  # mean + (sample - mean): the rounding of two sums


@pytest.mark.parametrize("values", ["zero_one", "plus_minus_one"])
def test_what_a_module_draws_are_exactly_its_two_values(values):
    unit = bpf.Bernoulli(values)
    assert set(unit(torch.randn(DRAWS)).tolist()) == {unit.low, 1.0}


def test_plain_backprop_takes_the_draw_for_its_mean(unit):
    x, weights = potentials().requires_grad_(), potentials().flip(0)
    (found,) = torch.autograd.grad((weights * unit(x)).sum(), x)
    (expected,) = torch.autograd.grad((weights * unit.mean(x)).sum(), x)
    assert torch.equal(found, expected)
    assert bool(found.any())


@pytest.mark.parametrize("kind", GAUSSIAN)
def test_plain_backprop_through_gaussian_units_is_exact(unit):
    """The derivative of the draw itself, with its noise held: by central differences."""
    x, width = potentials(), 1e-5

    def drawn(z: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)
        return unit(z)

    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(drawn(leaf).square().sum(), leaf)
    numeric = (drawn(x + width).square() - drawn(x - width).square()) / (2 * width)
    torch.testing.assert_close(found, numeric, rtol=1e-7, atol=1e-8)  # rounding 1e-16 / 1e-5, and width squared


def test_a_unit_shows_its_settings_and_has_no_state(kind):
    unit = MAKE[kind](1.7)
    assert "temperature=1.7" in repr(unit)
    assert not unit.state_dict()


@pytest.mark.parametrize("name", MAKE)
def test_a_unit_can_be_pickled(name):
    unit = MAKE[name](1.7)
    again = pickle.loads(pickle.dumps(unit))
    assert torch.equal(again.mean(potentials()), unit.mean(potentials()))


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bpf.Bernoulli("zero"), "values='zero': choose 'zero_one' or 'plus_minus_one'"),
        (lambda: bpf.Bernoulli(temperature=0.0), r"temperature=0\.0: give a positive number"),
        (lambda: bpf.Softmax(-1.0), r"temperature=-1\.0: give a positive number"),
        (lambda: bpf.Softmax(float("nan")), "temperature=nan: give a positive number"),
        (lambda: bpf.Gaussian(temperature=float("inf")), "temperature=inf: give a positive number"),
        (lambda: bpf.Gaussian(0.0), r"variance=0\.0: give a positive number"),
        (lambda: bpf.Gaussian(float("inf")), "variance=inf: give a positive number"),
        (lambda: bpf.Gaussian(mean="sigmoid"), "mean='sigmoid': choose 'softplus'"),
        (lambda: bpf.TeamReinforce(unit="poisson"), "unit='poisson': give 'bernoulli', 'sign'"),
        (lambda: bpf.TeamReinforce(unit="softmax"), "unit='softmax': give .* a StochasticUnit"),
    ],
)
def test_bad_input_is_named_with_its_cure(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_units_have_names():
    found = {name: unit_named(name) for name in ("bernoulli", "sign", "gaussian", "softmax")}
    assert [type(unit) for unit in found.values()] == [bpf.Bernoulli, bpf.Bernoulli, bpf.Gaussian, bpf.Softmax]
    assert found["sign"].low == -1.0
    own = bpf.Gaussian(0.1)
    assert unit_named(own) is own
