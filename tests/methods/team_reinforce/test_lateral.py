"""Units that draw together, against laws that are had by enumerating every configuration and every transition."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import lightning_bpfree as bpf
from lightning_bpfree.methods.team_reinforce.units.boltzmann_machine import Machine, MachineLayer
from lightning_bpfree.methods.team_reinforce.units.exploration import Independent
from lightning_bpfree.methods.team_reinforce.units.lateral import LateralWeights, pairs

ERRORS = 5.0  # standard errors: 6e-7 for a normal number, and a test looks at up to 64 of them
CHAINS = 100_000
X = torch.tensor([[0.4, -0.9, 1.3, -0.2]], dtype=torch.float64)
UNITS = {
    "zero_one": lambda: bpf.Bernoulli("zero_one", 1.5),
    "plus_minus_one": lambda: bpf.Bernoulli("plus_minus_one", 1.5),
}


@pytest.fixture(params=UNITS)
def unit(request):
    return UNITS[request.param]()


@pytest.fixture(params=[2, 4])
def colors(request):
    return request.param


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lateral(machine: bpf.Boltzmann, n: int = 4, seed: int = 1) -> torch.Tensor:
    return 2 * machine.connected(torch.randn(n, n, dtype=torch.float64, generator=seeded(seed)))


def configurations(unit: bpf.Bernoulli, n: int = 4) -> torch.Tensor:
    return torch.tensor(list(product((unit.low, 1.0), repeat=n)), dtype=torch.float64)


def place(unit: bpf.Bernoulli, values: torch.Tensor) -> torch.Tensor:
    """Return which of the configurations each row is."""
    n = values.shape[1]
    return ((values > 0).long() * 2 ** torch.arange(n - 1, -1, -1)).sum(1)


def assert_law(found: torch.Tensor, law: torch.Tensor) -> None:
    """Compare places, one a draw, with their probabilities."""
    assert float(law.sum()) == pytest.approx(1, abs=1e-9)
    frequency = torch.bincount(found, minlength=len(law)).double() / len(found)
    assert bool(((frequency - law).abs() <= ERRORS * (law * (1 - law) / len(found)).sqrt()).all())


# --- laws, by enumeration ------------------------------------------------------------------------------------------


def independent_law(unit: bpf.Bernoulli, x: torch.Tensor) -> torch.Tensor:
    every = configurations(unit, x.shape[1])
    return unit.log_prob(x.expand(len(every), -1), every).exp()


def boltzmann_law(unit: bpf.Bernoulli, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """``P(h)`` proportional to ``exp((h.x + h.U h / 2) / (step temperature))``."""
    every = configurations(unit, x.shape[1])
    return torch.softmax(((every * x).sum(1) + 0.5 * ((every @ u) * every).sum(1)) / (unit.step * unit.temperature), 0)


def gibbs_sweep(unit: bpf.Bernoulli, x: torch.Tensor, u: torch.Tensor, groups: list[slice]) -> torch.Tensor:
    """Return the matrix of probabilities of going from one configuration to another in one sweep."""
    every = configurations(unit, x.shape[1])
    total = torch.eye(len(every), dtype=torch.float64)
    for group in groups:
        step = torch.zeros_like(total)
        for start, value in enumerate(every):
            following = value.repeat(2 ** (group.stop - group.start), 1)
            following[:, group] = configurations(unit, group.stop - group.start)
            field = (x + value @ u)[:, group].expand(len(following), -1)
            step[start, place(unit, following)] = unit.log_prob(field, following[:, group]).exp()
        total = total @ step
    return total


# --- colors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "colors"), [(4, 2), (5, 2), (7, 3), (4, 4), (3, 8), (1, 2)])
def test_weights_connect_units_of_different_colors_symmetrically(n, colors):
    machine = bpf.Boltzmann(colors=colors)
    groups = machine.groups(n)
    assert [i for group in groups for i in range(n)[group]] == list(range(n))  # every unit has one color
    assert len(groups) == min(n, colors)
    sizes = [group.stop - group.start for group in groups]
    assert max(sizes) - min(sizes) <= 1
    any_matrix = torch.randn(n, n)
    before = any_matrix.clone()
    found = machine.connected(any_matrix)
    assert torch.equal(any_matrix, before)
    assert torch.equal(found, found.T)
    color = torch.tensor([c for c, size in enumerate(sizes) for _ in range(size)])
    same = color[:, None] == color
    assert not found[same].any()
    assert torch.equal(found[~same], ((any_matrix + any_matrix.T) / 2)[~same])
    assert torch.equal(machine.connected(found), found)


def test_lateral_weights_start_at_zero():
    assert torch.equal(LateralWeights(3).weight, torch.zeros(3, 3))


# --- the Gibbs sampler ---------------------------------------------------------------------------------------------


def test_a_sweep_leaves_the_law_of_the_machine_as_it_is(unit, colors):
    """By transition matrices, without a draw: what the sampler below has to be."""
    machine = bpf.Boltzmann(colors=colors)
    u = lateral(machine)
    law = boltzmann_law(unit, X, u)
    again = law @ gibbs_sweep(unit, X, u, machine.groups(4))
    torch.testing.assert_close(again, law, rtol=1e-12, atol=1e-12)  # sums of 16 doubles


@pytest.mark.parametrize("sweeps", [1, 2])
def test_values_have_the_law_of_sweeps_from_the_independent_draw(sweeps, unit, colors):
    machine = bpf.Boltzmann(sweeps, colors)
    u = lateral(machine)
    law = independent_law(unit, X)
    for _ in range(sweeps):
        law = law @ gibbs_sweep(unit, X, u, machine.groups(4))
    if sweeps == 1:  # it is told from the law of many sweeps, by more than any error of 100,000 draws
        assert float((law - boltzmann_law(unit, X, u)).abs().max()) > 0.01
    drawn = machine.draw(unit, X.expand(CHAINS, -1), u, negative_phase=False, generator=seeded())
    assert_law(place(unit, drawn.value), law)


def test_the_stationary_law_is_that_of_the_energy(unit, colors):
    machine = bpf.Boltzmann(30, colors)
    u = lateral(machine)
    law = boltzmann_law(unit, X, u)
    reached = independent_law(unit, X) @ torch.matrix_power(gibbs_sweep(unit, X, u, machine.groups(4)), 30)
    torch.testing.assert_close(reached, law, rtol=0, atol=1e-5)  # of a standard error of 1e-3: 30 sweeps are many
    drawn = machine.draw(unit, X.expand(CHAINS, -1), u, negative_phase=False, generator=seeded())
    assert_law(place(unit, drawn.value), law)


def test_without_weights_the_law_is_the_independent_one(unit, colors):
    drawn = bpf.Boltzmann(3, colors).draw(unit, X.expand(CHAINS, -1), torch.zeros(4, 4), generator=seeded())
    assert_law(place(unit, drawn.value), independent_law(unit, X))


def test_draws_come_from_the_generator_alone(unit):
    before = torch.get_rng_state()
    for exploration in (Independent(), bpf.Boltzmann(), bpf.Recurrent()):
        one, two = (exploration.draw(unit, X, torch.ones(4, 4), generator=seeded()) for _ in range(2))
        assert torch.equal(one.value, two.value)
        assert torch.equal(one.score, two.score)
    assert torch.equal(torch.get_rng_state(), before)


# --- the recurrent layer -------------------------------------------------------------------------------------------


def test_one_step_is_the_independent_draw_bit_for_bit(unit):
    """The same uniform numbers decide both: ``u < sigmoid(x / T)``, or ``x > T logit(u)``."""
    x = 2 * torch.randn(5000, 4, dtype=torch.float64, generator=seeded(1))
    drawn = bpf.Recurrent(1).draw(unit, x, torch.ones(4, 4, dtype=torch.float64), generator=seeded())
    value, score = unit.draw(x, seeded())
    assert torch.equal(drawn.value, value)
    torch.testing.assert_close(drawn.score, score, rtol=1e-12, atol=1e-12)  # another order of operations
    assert not drawn.lateral(torch.ones(5000, dtype=torch.float64)).any()


@pytest.mark.parametrize("weights", ["none", "random"])
def test_the_last_step_has_the_law_of_the_trajectory(weights, unit):
    u = torch.zeros(4, 4, dtype=torch.float64)
    if weights == "random":
        u = torch.randn(4, 4, dtype=torch.float64, generator=seeded(1))  # any square matrix
    every = configurations(unit)
    law = independent_law(unit, X)
    for _ in range(2):
        field = X + every @ u.T
        step = torch.stack([unit.log_prob(row.expand(16, -1), every).exp() for row in field])
        law = law @ step
    drawn = bpf.Recurrent(3).draw(unit, X.expand(CHAINS, -1), u, generator=seeded())
    assert_law(place(unit, drawn.value), law)
    if weights == "none":
        assert_law(place(unit, drawn.value), independent_law(unit, X))


# --- one machine over the whole network ----------------------------------------------------------------------------


def whole_network(sweeps: int) -> tuple[Machine, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Layers of unequal scales: 3 units of 0 and 1, 2 of -1 and 1, 2 actions. Machine, input, configurations, law."""
    random = seeded(5)
    settings = bpf.Boltzmann(sweeps, 2, whole_network=True)
    first = torch.tensor([[0.5, -0.7, 0.2]], dtype=torch.float64)
    units = [bpf.Bernoulli("zero_one", 1.5), bpf.Bernoulli("plus_minus_one", 0.8), bpf.Softmax(1.3)]
    w1, b1 = torch.randn(2, 3, dtype=torch.float64, generator=random), torch.tensor([0.3, -0.4], dtype=torch.float64)
    w2 = torch.randn(2, 2, dtype=torch.float64, generator=random)
    u0, u1 = lateral(settings, 3, 6), lateral(settings, 2, 7)
    layers = [MachineLayer(units[0], lateral=u0), MachineLayer(units[1], w1, b1, u1), MachineLayer(units[2], w2)]
    rows = list(product(configurations(units[0], 3), configurations(units[1], 2), torch.eye(2, dtype=torch.float64)))
    h0, h1, action = (torch.stack(parts) for parts in zip(*rows, strict=True))
    energy = ((h0 * first).sum(1) + 0.5 * ((h0 @ u0) * h0).sum(1)) / 1.5
    energy = energy + ((h1 * (h0 @ w1.T + b1)).sum(1) + 0.5 * ((h1 @ u1) * h1).sum(1)) / (2 * 0.8)
    energy = energy + (action * (h1 @ w2.T)).sum(1) / 1.3
    return Machine(layers, settings), first, [h0, h1, action], torch.softmax(energy, 0)


def test_the_machine_draws_from_its_joint_law():
    machine, first, every, law = whole_network(30)
    values = machine.draw(first.expand(CHAINS, -1), seeded())
    upper = [(value > 0).long() for value in (*values[:2], values[2][:, 1:])]
    places = torch.cat(upper, 1)
    index = (places * 2 ** torch.arange(5, -1, -1)).sum(1)
    # `every` counts in the same way: the first unit changes last, action 0 comes before action 1.
    here = torch.cat([(part > 0).long() for part in (*every[:2], every[2][:, 1:])], 1)
    assert torch.equal((here * 2 ** torch.arange(5, -1, -1)).sum(1), torch.arange(64))
    assert_law(index, law)


def test_a_machine_without_connections_is_the_mean_of_every_layer():
    machine, first, *_ = whole_network(3)
    loose = [layer._replace(weight=None if layer.weight is None else 0 * layer.weight) for layer in machine.layers]
    loose = [layer._replace(lateral=None if layer.lateral is None else 0 * layer.lateral) for layer in loose]
    means = Machine(loose, machine.settings).mean_field(first)
    potentials = [first, loose[1].bias[None], torch.zeros(1, 2, dtype=torch.float64)]
    for layer, mean, x in zip(loose, means, potentials, strict=True):
        torch.testing.assert_close(mean, layer.unit.mean(x), rtol=1e-12, atol=0)


def test_a_machine_is_made_of_units_of_two_values():
    with pytest.raises(ValueError, match=r"whole_network=True\): units are Gaussian.*units with two values"):
        Machine([MachineLayer(bpf.Gaussian())], bpf.Boltzmann(whole_network=True))


# --- what is given without noise -----------------------------------------------------------------------------------


def test_without_weights_the_mean_field_is_the_mean(unit, colors):
    x = torch.randn(6, 4, dtype=torch.float64)
    for exploration in (bpf.Boltzmann(3, colors), bpf.Recurrent(3)):
        found = exploration.mean(unit, x, torch.zeros(4, 4, dtype=torch.float64))
        torch.testing.assert_close(found, unit.mean(x), rtol=1e-12, atol=0)  # slices of a row may round otherwise
    assert torch.equal(Independent().mean(unit, x), unit.mean(x))


def marginals(unit: bpf.Bernoulli, u: torch.Tensor) -> torch.Tensor:
    return boltzmann_law(unit, X, u) @ configurations(unit)


def test_the_mean_field_is_a_fixed_point_and_right_to_first_order(unit, colors):
    machine = bpf.Boltzmann(60, colors)
    errors = []
    for size in (0.01, 0.005):
        u = size * lateral(machine)
        mean = machine.mean(unit, X, u)
        torch.testing.assert_close(mean, unit.mean(X + mean @ u), rtol=1e-12, atol=1e-12)
        errors.append(float((mean[0] - marginals(unit, u)).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)  # what is neglected is of second order in the weights


def test_the_mean_field_of_the_machine_solves_its_equations():
    machine, first, *_ = whole_network(300)
    means = machine.mean_field(first)
    for index, layer in enumerate(machine.layers):
        field = machine.fields(first, means, index)
        if layer.lateral is not None:
            field = field + means[index] @ layer.lateral
        torch.testing.assert_close(means[index], layer.unit.mean(field), rtol=1e-9, atol=1e-9)


# --- scores --------------------------------------------------------------------------------------------------------


def test_without_negative_phase_the_score_is_the_value_and_its_products(unit, colors):
    machine = bpf.Boltzmann(2, colors)
    u, advantage = lateral(machine), torch.linspace(-1, 2, 7, dtype=torch.float64)
    drawn = machine.draw(unit, X.expand(7, -1), u, negative_phase=False, generator=seeded())
    assert torch.equal(drawn.score, unit.scale * drawn.value)
    expected = sum(a * torch.outer(h, h) for a, h in zip(advantage, drawn.value, strict=True))
    expected = unit.scale * machine.connected(expected)
    torch.testing.assert_close(drawn.lateral(advantage), expected, rtol=1e-12, atol=1e-12)


def test_pairs_are_weighted_products_of_two_draws():
    random = seeded()
    value, other = (torch.randn(5, 3, generator=random).double() for _ in range(2))
    advantage = torch.randn(5, generator=random).double()
    one = sum(a * torch.outer(p, p) for a, p in zip(advantage, value, strict=True))
    two = sum(a * torch.outer(p, p) for a, p in zip(advantage, other, strict=True))
    torch.testing.assert_close(pairs(value, advantage), one)
    torch.testing.assert_close(pairs(value, advantage, other), one - two)


def test_the_scores_of_a_boltzmann_layer_have_mean_zero_by_its_negative_phase(unit, colors):
    machine = bpf.Boltzmann(10, colors)
    u, every = lateral(machine), configurations(unit)
    drawn = machine.draw(unit, X.expand(CHAINS, -1), u, generator=seeded())
    law = boltzmann_law(unit, X, u)
    # Differences of two independent draws have twice the variance of one.
    variance = 2 * (law @ every.square() - (law @ every).square())
    assert bool((drawn.score.mean(0).abs() <= ERRORS * unit.scale * (variance / CHAINS).sqrt()).all())
    products = torch.einsum("bi,bj->bij", every, every)
    mean = torch.einsum("b,bij->ij", law, products)
    variance = 2 * (torch.einsum("b,bij->ij", law, products.square()) - mean.square()).clamp(min=0)
    found = drawn.lateral(torch.ones(CHAINS, dtype=torch.float64)) / CHAINS
    assert bool((found.abs() <= ERRORS * unit.scale * (variance / CHAINS).sqrt()).all())
    assert bool(found.any())


def test_the_scores_of_a_trajectory_have_mean_zero(unit):
    rows = CHAINS // 5
    u = torch.randn(4, 4, dtype=torch.float64, generator=seeded(1))
    drawn = bpf.Recurrent(3).draw(unit, X.expand(rows, -1), u, generator=seeded())
    error = drawn.score.std(0) / rows**0.5
    assert bool((drawn.score.mean(0).abs() <= ERRORS * error).all())
    parts = torch.eye(100, dtype=torch.float64).repeat_interleave(rows // 100, 1)
    means = torch.stack([drawn.lateral(part) for part in parts]) / (rows // 100)
    # The spread is measured on 100 parts: Student's t, of which 6e-6 lies beyond 4.8, in place of the normal law.
    assert bool((means.mean(0).abs() <= ERRORS * means.std(0) / 10).all())
    hebbian = bpf.Recurrent(3).draw(unit, X.expand(rows, -1), u, negative_phase=False, generator=seeded())
    assert torch.equal(hebbian.value, drawn.value)
    assert float(hebbian.score.mean(0).abs().max()) > 0.1


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bpf.Boltzmann(0), "sweeps=0: give a whole number of at least 1"),
        (lambda: bpf.Boltzmann(colors=1), "colors=1: give a whole number of at least 2"),
        (lambda: bpf.Recurrent(0), "steps=0: give a whole number of at least 1"),
        (
            lambda: bpf.Boltzmann().check(bpf.Gaussian()),
            "exploration=Boltzmann: lateral weights.*unit is Gaussian.*'bernoulli' or 'sign', or exploration='indep",
        ),
        (lambda: bpf.Recurrent().check(bpf.Softmax()), "exploration=Recurrent.*unit is Softmax"),
    ],
)
def test_bad_input_is_named_with_its_cure(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_any_unit_may_draw_independently():
    for unit in (bpf.Gaussian(), bpf.Bernoulli(), bpf.Softmax()):
        Independent().check(unit)
