"""Forward gradients along guesses: the projection, and where backprop ends."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from projection_problems import (
    FROZEN,
    SPACES,
    Coupled,
    Watches,
    chain,
    close,
    data_in,
    flat,
    head_of,
    part,
    step,
    steps,
)

from lightning_bpfree import Backprop, ForwardGradient, LocalLoss
from lightning_bpfree.functional import cosine
from lightning_bpfree.methods.forward_gradient import projection as local_guess
from lightning_bpfree.methods.forward_gradient.projection import unit


def given(monkeypatch, guess):
    """Let `guess(sources)` stand for the gradients of the local losses."""

    def instead(head, output, labels, sources, trained):
        return torch.zeros(len(output)), [guess(source) for source in sources], []

    monkeypatch.setattr(local_guess, "local_gradients", instead)


# --- the projection --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, -1.0, 3.0])
@pytest.mark.parametrize("scope", ["network", "block", "tensor"])
def test_the_true_gradient_as_a_guess_gives_the_gradient(scope, factor, monkeypatch):
    truth = step(Backprop())
    by_shape = {tuple(grad.shape): grad for grad in truth.values()}
    given(monkeypatch, lambda source: factor * by_shape[tuple(source.shape)])
    close(step(ForwardGradient(guess=LocalLoss(), scope=scope)), truth, rtol=1e-10, atol=1e-14)  # float64 sums


@pytest.mark.parametrize("factor", [1.0, -1.0, 3.0])
@pytest.mark.parametrize("kind", [Watches, Coupled])
def test_the_true_gradient_at_outputs_gives_the_gradient_also_for_a_loss_that_couples_samples(
    kind, factor, monkeypatch
):
    truth = step(Backprop(), kind=kind)
    at = {grad.shape[1]: grad for grad in kind(chain()).at_blocks(data_in(torch.float64)).values()}
    given(monkeypatch, lambda source: factor * at[source.shape[1]])
    rule = ForwardGradient(guess=LocalLoss(), space="activations")
    close(step(rule, kind=kind), truth, rtol=1e-10, atol=1e-14)  # float64 sums


def test_a_guess_at_right_angles_and_a_guess_of_zero_give_zero_and_leave_the_last_part_exact(monkeypatch):
    truth = step(Backprop())
    shapes = {tuple(grad.shape): grad for grad in truth.values()}

    def orthogonal(source):
        grad = shapes[tuple(source.shape)]
        drawn = torch.randn_like(grad)
        return drawn - (drawn * grad).sum() / grad.square().sum() * grad

    for guess in (orthogonal, torch.zeros_like, lambda _: None):
        given(monkeypatch, guess)
        made = step(ForwardGradient(guess=LocalLoss(), scope="tensor"))
        assert float(flat(part(made)).abs().max()) < 1e-15
        close(part(made, {"net.4.weight", "net.4.bias"}), part(truth, {"net.4.weight", "net.4.bias"}), rtol=0, atol=0)
    given(monkeypatch, torch.zeros_like)
    made = step(ForwardGradient(guess=LocalLoss(), space="activations"))
    assert float(flat(part(made)).abs().max()) == 0.0


@pytest.mark.parametrize("scope", ["network", "block"])
@pytest.mark.parametrize("space", SPACES)
def test_sign_size_and_cosine(space, scope):
    """u is a direction of descent, not longer than g, and as near to g as the line of the guess is."""
    truth = part(step(Backprop()))
    made = part(step(ForwardGradient(guess=FROZEN(), space=space, scope=scope, seed=1)))
    assert float(flat(made) @ flat(truth)) > 0
    assert float(flat(made).norm()) <= float(flat(truth).norm())
    if space == "weights" and scope == "network":
        guess = part(step(ForwardGradient(guess=FROZEN(), target="local", seed=1)))
        assert float(cosine(made, truth)) == pytest.approx(abs(float(cosine(guess, truth))), rel=1e-9)


def test_projecting_block_by_block_is_never_further_from_the_gradient():
    """By Cauchy and Schwarz; why it is the default."""
    truth = part(step(Backprop()))
    made = [part(step(ForwardGradient(guess=FROZEN(), scope=s, seed=1))) for s in ("network", "block", "tensor")]
    near = [float(cosine(u, truth)) for u in made]
    assert near[0] < near[1] < near[2]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("factor", [1e-9, -7.0, 1e9])
def test_the_size_of_the_guess_does_not_matter(space, factor, monkeypatch):
    rule = partial(ForwardGradient, guess=FROZEN(), space=space, seed=1)
    plain = step(rule(), dtype=torch.float32)
    own = local_guess.local_gradients

    def scaled(*args):
        losses, found, heads = own(*args)
        return losses, [factor * q for q in found], heads

    monkeypatch.setattr(local_guess, "local_gradients", scaled)
    close(step(rule(), dtype=torch.float32), plain, rtol=1e-4, atol=1e-7)  # float32, over a range of 1e18


def test_projecting_twice_changes_nothing(monkeypatch):
    once = step(ForwardGradient(guess=FROZEN(), seed=1))
    shapes = {tuple(grad.shape): grad for grad in once.values()}
    given(monkeypatch, lambda source: shapes[tuple(source.shape)])
    close(step(ForwardGradient(guess=LocalLoss())), once, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_a_random_vector_divided_by_its_square_is_biased_by_one_over_d(monkeypatch):
    """What the published weight-space code does with random guesses; here they are not divided."""
    truth = part(step(Backprop()))
    generator = torch.Generator().manual_seed(0)
    given(monkeypatch, lambda s: torch.randn(s.shape, generator=generator, dtype=s.dtype))
    repeated = torch.utils.data.DataLoader(data_in(torch.float64).dataset, batch_sampler=[list(range(16))] * 200)
    found = steps(ForwardGradient(guess=LocalLoss(), scope="network"), data=repeated, log_every_n_steps=0)
    along = torch.stack([flat(part(u)) @ flat(truth) for u in found]) / flat(truth).square().sum()
    d = flat(truth).numel()
    # The square of a coordinate of a random unit vector: mean 1 / d, standard deviation below sqrt(2) / d.
    assert float(along.mean()) * d == pytest.approx(1, abs=4 * 2**0.5 / 200**0.5)


def test_unit():
    a, b = unit([torch.randn(4, 3), torch.randn(4, 2, 2)], each_sample=True)
    torch.testing.assert_close(a.square().sum(1) + b.square().sum((1, 2)), torch.ones(4))
    assert torch.equal(unit([torch.zeros(3)])[0], torch.zeros(3))
    assert float(unit([torch.full((3,), 1e-15)])[0].norm()) == pytest.approx(1)
    assert not unit([])


# --- targets and spaces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["train", "freeze"])
def test_guess_and_target_local_is_local_learning(update):
    rules = [ForwardGradient(guess=LocalLoss(update=update), target="local", space=s, seed=1) for s in SPACES]
    one, two = (step(rule) for rule in rules)
    assert all(torch.equal(one[name], two[name]) for name in one)
    if update == "train":
        return  # its heads have moved since
    net, (x, y) = chain(), next(iter(data_in(torch.float64)))
    for block, (start, names) in enumerate([(0, ("net.0.weight", "net.0.bias")), (2, ("net.2.weight", "net.2.bias"))]):
        z = net[start : start + 2](net[:start](x).detach())
        head = head_of(rules[0], block=block)
        F.cross_entropy(F.linear(z, head["1.weight"], head["1.bias"]), y).backward()
        close({n: one[n] for n in names}, dict(zip(names, (net[start].weight.grad, net[start].bias.grad), strict=True)))


@pytest.mark.parametrize("scope", ["network", "block", "tensor", None])
def test_projecting_a_local_gradient_on_itself_gives_it_back(scope):
    """Two equal local losses, of which one is the guess: the identity, by way of the projection."""
    local = step(ForwardGradient(guess=LocalLoss(), target="local", seed=1))
    for space in SPACES if scope is None else ["weights"]:
        rule = ForwardGradient(guess=LocalLoss(), target=LocalLoss(), space=space, scope=scope, seed=1)
        close(step(rule), local, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("how", [{}, {"guess": LocalLoss()}, {"target": "local"}, {"space": "activations"}])
def test_without_a_block_all_is_exact(how):
    nothing = lambda network: []  # noqa: E731
    how = {"guess": LocalLoss(blocks=nothing)} if "guess" in how else {**how, "blocks": nothing}
    one, two = step(Backprop()), step(ForwardGradient(**how))
    assert all(torch.equal(one[name], two[name]) for name in one)
