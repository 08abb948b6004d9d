"""Backward passes: the exact adjoint is backprop through the solver; the continuous one is off by its order."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusion_problems import STABLE_DIFFUSION, Gaussian, Tanh, TextNet, gradients, log_spaced, relative
from test_solvers import exact_map
from tiny_diffusion import prompts

from lightning_bpfree.methods.diffusion_adjoint.plans import SOLVERS
from lightning_bpfree.methods.diffusion_adjoint.sampler import DiffusionSampler
from lightning_bpfree.methods.diffusion_adjoint.schedules import FlowMatching

EXACT = 1e-10  # equal mathematics in float64, another order of operations


def unet_case(guidance_scale: float, **settings):
    net = TextNet().double()
    noise = torch.randn(2, 4, 8, 8, dtype=torch.double)
    given = {"prompt_embeds": prompts(dtype=torch.double)}
    if guidance_scale != 1.0:
        given["no_prompt_embeds"] = torch.randn(1, 5, 8, dtype=torch.double)
    return lambda gradient, **more: gradients(
        DiffusionSampler(
            net, STABLE_DIFFUSION, gradient=gradient, guidance_scale=guidance_scale, **{**settings, **more}
        ),
        noise,
        **given,
    )


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_exact_adjoint_is_backprop_through_the_solver(solver, guidance_scale):
    case = unet_case(guidance_scale, solver=solver, num_steps=3, guidance_rescale=0.5 if guidance_scale > 1 else 0.0)
    true, found = case("direct"), case("exact_adjoint")
    assert torch.equal(true[0], found[0])  # the same samples, to the bit
    assert len(true) == (4 if guidance_scale == 1.0 else 5)  # sample, noise, one or two conditionings, weights
    for ours, autograd in zip(found, true, strict=True):
        assert relative(ours, autograd) < EXACT


@pytest.mark.parametrize("num_steps", [1, 20])
def test_exact_adjoint_of_few_and_of_many_steps(num_steps):
    case = unet_case(1.0, num_steps=num_steps)
    for ours, autograd in zip(case("exact_adjoint"), case("direct"), strict=True):
        assert relative(ours, autograd) < EXACT


@pytest.mark.parametrize(
    "settings", [{"micro_batch": 1}, {"split_guidance": True}, {"micro_batch": 1, "split_guidance": True}]
)
@pytest.mark.parametrize("gradient", ["exact_adjoint", "checkpoint", "adjoint"])
def test_parts_of_a_batch_give_the_same_gradient(gradient, settings):
    case = unet_case(3.0, num_steps=2)
    for ours, whole in zip(case(gradient, **settings), case(gradient), strict=True):
        assert relative(ours, whole) < EXACT


def test_checkpoint_is_backprop():
    case = unet_case(3.0, num_steps=3, solver="heun")
    for ours, autograd in zip(case("checkpoint"), case("direct"), strict=True):
        assert relative(ours, autograd) < EXACT


@pytest.mark.parametrize("solver", ["euler", "rk4", "dpmpp_2m"])
def test_truncated_is_backprop_through_the_last_steps(solver):
    net, schedule, noise = Tanh(), log_spaced(), torch.randn(5, 3, dtype=torch.double)
    c = torch.randn(5, 3, dtype=torch.double)
    sampler = DiffusionSampler(net, schedule, num_steps=6, solver=solver, gradient="truncated", last_steps=2)
    found = gradients(sampler, noise, c=c)
    assert len(found) == 3  # none for the noise

    calls, limit = [0], {"euler": 4, "rk4": 16, "dpmpp_2m": 4}[solver]  # evaluations of the first four steps

    def later(x, time, c):
        calls[0] += 1
        return net(x, time, c) if calls[0] > limit else net(x, time, c).detach()

    # Autograd, with the early predictions constant and the start too: what is left are the last two steps, but for the
    # linear way of y through a step of `dpmpp_2m`, which has no evaluation in it and starts from constants.
    net.zero_grad()
    given = c.clone().requires_grad_()
    out = DiffusionSampler(later, schedule, num_steps=6, solver=solver, gradient="direct")(noise, {"c": given})
    (out - torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).square().sum().backward()
    assert relative(found[1], given.grad) < EXACT
    assert relative(found[2], torch.cat([p.grad.flatten() for p in net.parameters()])) < EXACT


def test_truncated_over_all_steps_gives_weights_all_and_noise_nothing():
    net, noise = Tanh(), torch.randn(5, 3, dtype=torch.double)
    found = {
        gradient: gradients(DiffusionSampler(net, log_spaced(), num_steps=3, gradient=gradient, last_steps=3), noise)
        for gradient in ("exact_adjoint", "truncated")
    }
    assert [len(found[gradient]) for gradient in found] == [3, 2]  # the sample, noise, weights
    assert torch.equal(found["exact_adjoint"][2], found["truncated"][1])


@pytest.mark.parametrize("schedule", [log_spaced(), FlowMatching()], ids=["vp", "flow"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_gradcheck(solver, schedule):
    net, prediction = Tanh(), schedule.predictions[0]
    sampler = DiffusionSampler(net, schedule, prediction, num_steps=2, solver=solver)
    noise, c = (torch.randn(2, 3, dtype=torch.double, requires_grad=True) for _ in range(2))

    def sample(noise, c, *weights):
        # As functional_call does it: other tensors in the places of the parameters, gone before the backward pass.
        names = [name for name, _ in sampler.named_parameters()]
        return torch.func.functional_call(sampler, dict(zip(names, weights, strict=True)), (noise, {"c": c}))

    weights = [parameter.detach().clone().requires_grad_() for parameter in sampler.parameters()]
    assert torch.autograd.gradcheck(sample, (noise, c, *weights))


def test_gradients_of_a_gaussian_in_closed_form():
    schedule, m, s = log_spaced(), 0.7, 0.4
    first, last = schedule.rhos[-1], schedule.rhos[0]
    net, noise = Gaussian(m, s), torch.linspace(-2, 2, 5, dtype=torch.double)[:, None].requires_grad_()
    out = DiffusionSampler(net, schedule, num_steps=80, solver="rk4")(noise)
    out.sum().backward()
    r, scale = exact_map(m, s, last, first), math.sqrt(1 + first**2) / math.sqrt(1 + last**2)
    by_s = s * (first**2 - last**2) * (s * s + last**2) ** -0.5 * (s * s + first**2) ** -1.5
    start = noise.detach() * math.sqrt(1 + first**2)
    # rk4 at 80 steps: (1/80)^4 is 2e-8, times derivatives of the order of 10.
    torch.testing.assert_close(noise.grad, torch.full_like(noise, r * scale), rtol=1e-6, atol=0.0)
    end = math.sqrt(1 + last**2)
    torch.testing.assert_close(net.mean.grad, torch.tensor(5 * (1 - r) / end, dtype=torch.double), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(net.std.grad, (start - m).sum() * by_s / end, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_the_bias_of_the_adjoint_falls_in_the_solvers_order(solver, order):
    net, noise = Tanh(), torch.randn(3, 3, dtype=torch.double)
    c, errors = torch.randn(3, 3, dtype=torch.double), {}
    for steps in (20, 40, 80):
        both = [
            gradients(
                DiffusionSampler(net, FlowMatching(), "flow_prediction", num_steps=steps, solver=solver, gradient=g),
                noise,
                c=c,
            )
            for g in ("adjoint", "direct")
        ]
        assert torch.equal(both[0][0], both[1][0])
        errors[steps] = [relative(a, b) for a, b in zip(both[0][1:], both[1][1:], strict=True)]
    for index in range(3):  # by noise, by conditioning, by weights
        assert math.log2(errors[20][index] / errors[40][index]) > order - 0.3
        assert math.log2(errors[40][index] / errors[80][index]) > order - 0.3
    if solver == "euler":
        assert all(error > 1e-4 for error in errors[80])  # not the exact one by another name


def adjoint_deis_1(net, noise, c, steps):
    """AdjointDEIS-1 as its paper writes it, in x and lambda, on the states of the forward solve."""
    nodes = STABLE_DIFFUSION.grid(steps)
    xs, x = [], noise
    with torch.no_grad():
        for start, end in itertools.pairwise(nodes):
            eps = net(x, torch.full((len(x),), start.time, dtype=x.dtype), c)
            x = end.alpha / start.alpha * x + (end.sigma - end.alpha / start.alpha * start.sigma) * eps
            xs.append(x)
    target = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    a_x, a_z = 2 * (x - target), torch.zeros_like(c)
    for start, end in reversed(list(itertools.pairwise(nodes))):  # from the clean end to the noisy start
        at, z = xs.pop().requires_grad_(), c.clone().requires_grad_()
        eps = net(at, torch.full((len(at),), end.time, dtype=at.dtype), z)
        by_x, by_z = torch.autograd.grad(eps, (at, z), a_x)
        h = math.log(start.alpha / start.sigma) - math.log(end.alpha / end.sigma)
        ratio = end.alpha / start.alpha
        a_z = a_z + start.sigma * (math.exp(h) - 1) * ratio * by_z
        a_x = ratio * a_x + start.sigma * (math.exp(h) - 1) * ratio**2 * by_x
    return a_x, a_z


def test_the_euler_adjoint_is_adjoint_deis_1():
    # A schedule that ends at the noise of time 0, since lambda is infinite without noise.
    STABLE_DIFFUSION.end_at_zero, STABLE_DIFFUSION.steps_offset = False, 1
    try:
        net, noise, c = Tanh(), torch.randn(3, 3, dtype=torch.double), torch.randn(3, 3, dtype=torch.double)
        sampler = DiffusionSampler(net, STABLE_DIFFUSION, num_steps=9, gradient="adjoint")
        found = gradients(sampler, noise, c=c)
        by_x, by_z = adjoint_deis_1(net, noise, c, 9)
    finally:
        STABLE_DIFFUSION.end_at_zero, STABLE_DIFFUSION.steps_offset = True, 0
    assert relative(found[1], by_x) < EXACT
    assert relative(found[2], by_z) < EXACT


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun2"])
def test_the_adjoint_is_torchdiffeqs(solver):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    net, schedule = Tanh(), log_spaced()
    noise, c = (torch.randn(3, 3, dtype=torch.double, requires_grad=True) for _ in range(2))
    nodes = schedule.grid(8)

    def field(rho, y):
        node = schedule.node(float(rho.detach()))
        return net(node.scale * y, torch.full((len(y),), node.time, dtype=y.dtype), c)

    sampler = DiffusionSampler(net, schedule, num_steps=8, solver=solver.rstrip("2"), gradient="adjoint")
    found = gradients(sampler, noise, c=c)
    net.zero_grad()
    rhos = torch.tensor([node.rho for node in nodes], dtype=torch.double)
    end = torchdiffeq.odeint_adjoint(
        field, noise / nodes[0].scale, rhos, method=solver, adjoint_params=(c, *net.parameters())
    )[-1]
    out = end * nodes[-1].scale
    (out - torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).square().sum().backward()
    assert relative(found[0], out.detach()) < EXACT
    assert relative(found[1], noise.grad) < EXACT
    assert relative(found[2], c.grad) < EXACT
    assert relative(found[3], torch.cat([p.grad.flatten() for p in net.parameters()])) < EXACT
