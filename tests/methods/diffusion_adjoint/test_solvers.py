"""Solvers and schedules: DDIM, closed forms, orders of convergence, nodes."""

from __future__ import annotations

import itertools
import math
import weakref

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusion_problems import STABLE_DIFFUSION, Gaussian, TextNet, log_spaced, relative
from tiny_diffusion import ddim_scheduler, prompts

from lightning_bpfree.methods.diffusion_adjoint.plans import SOLVERS, plan, run
from lightning_bpfree.methods.diffusion_adjoint.sampler import DiffusionSampler
from lightning_bpfree.methods.diffusion_adjoint.schedules import DiscreteVP, FlowMatching, LinearVP

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "dpmpp_2m": 2}


def test_euler_is_ddim_forwards_and_backwards():
    net, scheduler = TextNet().double(), ddim_scheduler()
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.double) ** 2).cumprod(0)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = abar, abar[0]
    scheduler.set_timesteps(7)
    x = torch.randn(2, 4, 8, 8, dtype=torch.double)
    noise, c = x.clone().requires_grad_(), prompts(dtype=torch.double)
    ours = DiffusionSampler(net, DiscreteVP(abar, steps_offset=1, end_at_zero=False), num_steps=7)(
        noise, {"prompt_embeds": c}
    )
    ours.square().sum().backward()

    theirs = start = x.clone().requires_grad_()
    for t in scheduler.timesteps:
        theirs = scheduler.step(net(theirs, t.repeat(2).double(), c), t, theirs).prev_sample
    theirs.square().sum().backward()
    # The same mathematics in float64 in another order of operations.
    assert relative(ours.detach(), theirs.detach()) < 1e-12
    assert relative(noise.grad, start.grad) < 1e-12


def exact_map(m, s, rho_end, rho_start):
    """y at the end = m + r (y at the start - m), of data from N(m, s^2)."""
    return math.sqrt((s * s + rho_end**2) / (s * s + rho_start**2))


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_converge_to_the_closed_form_in_their_order(solver):
    schedule = log_spaced()
    first, last = schedule.rhos[-1], schedule.rhos[0]
    noise, errors = torch.linspace(-2, 2, 5, dtype=torch.double)[:, None], {}
    for steps in (40, 80):
        sampler = DiffusionSampler(Gaussian(), schedule, num_steps=steps, solver=solver)
        with torch.no_grad():
            y = sampler(noise) * math.sqrt(1 + last**2)
        start = noise * math.sqrt(1 + first**2)
        true = 0.7 + exact_map(0.7, 0.4, last, first) * (start - 0.7)
        errors[steps] = relative(y, true)
    # Orders are reached in the limit only; the midpoint method has one more here, by the symmetry of the problem.
    assert math.log2(errors[40] / errors[80]) > ORDERS[solver] - 0.1, errors
    assert errors[80] < {1: 2e-2, 2: 1e-3, 4: 1e-6}[ORDERS[solver]]


def test_guidance_of_two_gaussians_is_a_third():
    schedule, w, noise = log_spaced(), 7.5, torch.randn(6, 1, dtype=torch.double)
    settings = {"num_steps": 20, "solver": "rk4"}
    shift, none = torch.full((1, 1), 0.3, dtype=torch.double), torch.full((1, 1), -0.2, dtype=torch.double)
    guided = DiffusionSampler(Gaussian(), schedule, guidance_scale=w, **settings)
    found = guided(noise, {"shift": shift}, {"shift": none})
    mean = 0.7 - 0.2 + w * (0.3 + 0.2)
    # Equal standard deviations: the guided noise is that of one Gaussian. The same numbers in another order.
    torch.testing.assert_close(
        found, DiffusionSampler(Gaussian(mean), schedule, **settings)(noise), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4"])
def test_flow_matching_of_a_gaussian(solver):
    m, s = 0.5, 0.3

    def velocity(x, time):
        at = float(time[0]) / 1000
        variance = (1 - at) ** 2 * s * s + at * at  # of x
        slope = (at - (1 - at) * s * s) / variance  # cov(noise - x0, x) / var(x)
        return -m + slope * (x - (1 - at) * m)

    noise, errors = torch.linspace(-2, 2, 5, dtype=torch.double)[:, None], {}
    for steps in (80, 160):
        sampler = DiffusionSampler(velocity, FlowMatching(), "flow_prediction", num_steps=steps, solver=solver)
        errors[steps] = relative(sampler(noise), m + s * noise)
    assert math.log2(errors[80] / errors[160]) > ORDERS[solver] - 0.1, errors


@pytest.mark.parametrize("flow", [False, True])
def test_dpmpp_2m_is_that_of_diffusers(flow):
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if flow else {}
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings
    )
    scheduler.set_timesteps(16)

    class Given(FlowMatching if flow else DiscreteVP):
        def grid(self, num_steps):
            """The nodes of diffusers, whose numbers are in single precision."""
            return [self.node(float(sigma)) for sigma in scheduler.sigmas]

    schedule = Given() if flow else Given(scheduler.alphas_cumprod.double())
    net = TextNet().double()
    x, c = torch.randn(2, 4, 8, 8, dtype=torch.double), prompts(dtype=torch.double)
    times = [node.time for node in schedule.grid(16)]
    prediction = "flow_prediction" if flow else "epsilon"
    with torch.no_grad():
        found = DiffusionSampler(net, schedule, prediction, num_steps=16, solver="dpmpp_2m")(x, {"prompt_embeds": c})
        for t, time in zip(scheduler.timesteps, times, strict=False):
            x = scheduler.step(net(x, torch.full((2,), time, dtype=torch.double), c), t, x).prev_sample
    assert relative(found, x) < 1e-5  # diffusers steps in single precision


def test_predictions_of_one_model_give_the_same_samples():
    class Other(Gaussian):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind

        def forward(self, x, time):
            noise = super().forward(x, time)
            alpha, sigma = node_numbers(float(time[0]))
            x0 = (x - sigma * noise) / alpha
            return {"sample": x0, "v_prediction": alpha * noise - sigma * x0, "score": -noise / sigma}[self.kind]

    def node_numbers(time):
        node = STABLE_DIFFUSION.node(STABLE_DIFFUSION.rhos[int(time)])
        return node.alpha, node.sigma

    noise = torch.randn(3, 1, dtype=torch.double)
    true = DiffusionSampler(Gaussian(), STABLE_DIFFUSION, num_steps=5)(noise)
    for kind in ("sample", "v_prediction", "score"):
        found = DiffusionSampler(Other(kind), STABLE_DIFFUSION, kind, num_steps=5)(noise)
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)


def test_learned_variances_are_left_out():
    def doubled(x, time):
        return torch.cat([x, torch.full_like(x, 9.0)], 1)

    noise = torch.randn(2, 3, 4, 4)
    found = DiffusionSampler(doubled, STABLE_DIFFUSION, num_steps=3)(noise)
    assert torch.equal(found, DiffusionSampler(lambda x, time: x, STABLE_DIFFUSION, num_steps=3)(noise))


def test_times_are_the_inverse_of_rho():
    linear = LinearVP()
    for t in (1e-3, 0.1, 0.5, 1.0):
        assert linear.time(linear.rho(t)) == pytest.approx(1000 * t, rel=1e-10)
    for t in (0, 1, 500, 999):
        assert STABLE_DIFFUSION.time(STABLE_DIFFUSION.rhos[t]) == pytest.approx(t, abs=1e-9)
    low, high = STABLE_DIFFUSION.rhos[10:12]
    assert STABLE_DIFFUSION.time(math.sqrt(low * high)) == pytest.approx(10.5, abs=1e-9)
    assert STABLE_DIFFUSION.time(0.0) == 0.0


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_times_are_those_of_ddim(spacing):
    for steps in (1, 2, 20, 30, 50):
        scheduler = ddim_scheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        schedule = DiscreteVP(scheduler.alphas_cumprod.double(), spacing=spacing, steps_offset=1)
        times = [node.time for node in schedule.grid(steps)]
        if spacing == "linspace" and steps == 1:
            continue  # numpy's first point of one is 0: a solve of no length
        assert times[:-1] == scheduler.timesteps.tolist()


def test_nodes_that_coincide_are_merged():
    schedule = DiscreteVP(ddim_scheduler().alphas_cumprod.double(), end_at_zero=False)
    assert plan("euler", schedule, 20).num_steps == 19  # time 0 is the last of "leading", and the end
    rhos = [node.rho for node in schedule.grid(20)]
    assert all(a > b for a, b in itertools.pairwise(rhos))


def test_one_step_of_a_shifted_flow():
    nodes = FlowMatching(shift=3.0).grid(1)
    assert [node.rho for node in nodes] == [1.0, 0.0]
    assert [round(node.rho, 6) for node in FlowMatching(shift=3.0).grid(2)] == [1.0, 0.75, 0.0]


@pytest.mark.parametrize(("solver", "held"), [("euler", 0), ("rk4", 3), ("dpmpp_2m", 0)])
def test_slopes_go_when_nothing_needs_them(solver, held):
    alive, most = [], []

    def evaluate(at, y):
        most.append(sum(slope() is not None for slope in alive))
        slope = torch.ones_like(y)
        alive.append(weakref.ref(slope))
        return slope

    run(plan(solver, STABLE_DIFFUSION, 4), evaluate, torch.zeros(2))
    assert max(most) == held


@pytest.mark.parametrize(
    ("solver", "evaluations"), [("euler", 6), ("midpoint", 12), ("heun", 12), ("rk4", 24), ("dpmpp_2m", 6)]
)
def test_what_a_solve_evaluates(solver, evaluations):
    assert plan(solver, FlowMatching(), 6).num_evaluations == evaluations
