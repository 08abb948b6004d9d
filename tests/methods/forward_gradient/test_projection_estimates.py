"""Slopes of samples and random directions along blocks: exact, unbiased, with the spread of theory."""

from functools import partial

import pytest
import torch
from projection_problems import FROZEN, SPACES, Coupled, Watches, chain, close, data_in, flat, part, step, steps
from torch import nn

from lightning_bpfree import Backprop, ForwardGradient
from lightning_bpfree.methods.forward_gradient import projection as local_guess


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("kind", [Watches, Coupled])
def test_slopes_of_samples_are_inner_products_with_backprops_gradient(kind, dtype, rtol, monkeypatch):
    truth = kind(chain(dtype)).at_blocks(data_in(dtype))
    seen, own = [], local_guess.sample_slopes

    def spied(parts, output_gradient, injected, direction):
        directions = {}

        def kept(j, z):
            directions[j] = direction(j, z).clone()
            return directions[j]

        slopes = own(parts, output_gradient, injected, kept)
        seen.append((directions, slopes))
        return slopes

    monkeypatch.setattr(local_guess, "sample_slopes", spied)
    step(ForwardGradient(guess=FROZEN(), space="activations", seed=1), kind=kind, dtype=dtype)
    step(ForwardGradient(2, space="activations", seed=1), kind=kind, dtype=dtype)
    assert [list(directions) for directions, _ in seen] == [[0], [1]] * 3
    for directions, found in seen:
        ((j, v),) = directions.items()
        expected = (truth[j] * v).sum(1)
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["network", "block"])
def test_random_activations_are_unbiased_along_the_gradient_with_the_spread_of_theory(scope):
    truth, at = part(step(Backprop())), Watches(chain()).at_blocks(data_in(torch.float64))
    net, (x, _) = chain(), next(iter(data_in(torch.float64)))
    moved = {}  # how the outputs of a block move along the gradient of its parameters
    for j, start in enumerate((0, 2)):
        along = {f"{start}.{kind}": truth[f"net.{start}.{kind}"] for kind in ("weight", "bias")}
        here = {name: dict(net[start : start + 2].named_parameters())[name].detach() for name in along}
        call = partial(torch.func.functional_call, net[start : start + 2])
        entering = net[:start](x).detach()
        moved[j] = torch.func.jvp(lambda p, call=call, x=entering: call(p, (x,)), (here,), (along,))[1]
    pairs = [(at[j].detach(), moved[j].detach()) for j in moved]
    if scope == "network":
        pairs = [tuple(torch.cat(both, 1) for both in zip(*pairs, strict=True))]
    # <u, g> = sum_n (z_n . v_n) (v_n . w_n) with w the movement: its mean is |g|^2, and for Gaussian v its variance
    # sum_n |z_n|^2 |w_n|^2 + (z_n . w_n)^2.
    variance = sum(float((z.square().sum(1) * w.square().sum(1) + (z * w).sum(1) ** 2).sum()) for z, w in pairs)
    assert sum(float((z * w).sum()) for z, w in pairs) == pytest.approx(float(flat(truth).square().sum()))
    repeated = torch.utils.data.DataLoader(data_in(torch.float64).dataset, batch_sampler=[list(range(16))] * 200)
    rule = ForwardGradient(space="activations", scope=scope, blocks=1, seed=3)
    found = [float(flat(part(u)) @ flat(truth)) for u in steps(rule, data=repeated, log_every_n_steps=0)]
    mean, square = float(flat(truth).square().sum()), torch.tensor(found).var()
    assert sum(found) / 200 == pytest.approx(mean, abs=4 * (variance / 200) ** 0.5)
    assert float(square) == pytest.approx(variance, rel=0.5)  # of 200 draws: 10 to 12 % at one standard error


@pytest.mark.parametrize("target", ["global", "local"])
def test_several_random_activations_count_as_their_mean(target, monkeypatch):
    own = local_guess.BlockProjection._random_at
    monkeypatch.setattr(local_guess.BlockProjection, "_random_at", lambda self, k, j, z: own(self, 0, j, z))
    one, three = (step(ForwardGradient(k, space="activations", target=target, seed=1)) for k in (1, 3))
    close(one, three, rtol=1e-10, atol=1e-14)  # three times the same direction


def test_random_activations_differ_between_blocks_ranks_and_directions(monkeypatch):
    drawn, own = [], local_guess.BlockProjection._random_at

    def kept(self, k, j, z):
        drawn.append(own(self, k, j, z))
        self.rank += 1
        drawn.append(own(self, k, j, z))
        self.rank -= 1
        return drawn[-2]

    monkeypatch.setattr(local_guess.BlockProjection, "_random_at", kept)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    steps(ForwardGradient(2, space="activations", target="local", seed=1), net=net)
    assert len(drawn) == len({tuple(v.flatten().tolist()) for v in drawn}) == 2 * 2 * 2


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["network", "block", "tensor"])
def test_random_weights_of_blocks_are_unbiased_along_the_gradient(scope):
    truth = part(step(Backprop()))
    num = 200
    made = part(step(ForwardGradient(num, blocks=1, scope=scope, seed=3)))
    along = float(flat(made) @ flat(truth) / flat(truth).square().sum())
    assert along == pytest.approx(1, abs=4 * 2**0.5 / num**0.5)  # one direction: at most sqrt 2, as for all at once


@pytest.mark.parametrize("space", SPACES)
def test_random_directions_with_a_local_target_are_unbiased_along_the_local_gradient(space):
    frozen = FROZEN()
    local = part(step(ForwardGradient(guess=frozen, target="local", seed=1)))
    num = 250
    rule = ForwardGradient(num, target=frozen, space=space, seed=1)
    along = float(flat(part(step(rule))) @ flat(local) / flat(local).square().sum())
    assert along == pytest.approx(1, abs=4 * 2**0.5 / num**0.5)  # one direction: at most sqrt 2


@pytest.mark.slow
def test_variance_in_activations_and_in_weights():
    """(#activations + 1) against (#weights + 1), per sample, for a linear layer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3)).double()
    one = torch.utils.data.DataLoader(data_in(torch.float64).dataset, batch_sampler=[[0]] * 200)
    name = "net.0.weight"
    truth = step(Backprop(), net=net, data=one)[name]

    def variance(**how):
        rule = ForwardGradient(blocks=1, seed=2, **how)
        found = torch.stack([u[name] for u in steps(rule, net=net, data=one, log_every_n_steps=0)])
        return float((found - truth).square().sum((1, 2)).mean() / truth.square().sum())

    # A mean of 200 squares (u - g)^2 of about s^2 d with s normal, which spread by sqrt(2) times their size: 10 %.
    assert variance(space="activations") == pytest.approx(4 + 1, rel=0.4)
    assert variance(space="weights", scope="block") == pytest.approx(24 + 1, rel=0.4)
