"""What a backward pass keeps, repeats and refuses: memory, autocast, random numbers, types, second derivatives."""

from __future__ import annotations

import pytest
import torch
from diffusion_problems import STABLE_DIFFUSION, Tanh, TextNet, gradients, log_spaced, relative
from tiny_diffusion import prompts
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bpfree.core.replay.uncounted import uncounted
from lightning_bpfree.methods.diffusion_adjoint.sampler import DiffusionSampler
from lightning_bpfree.methods.diffusion_adjoint.schedules import FlowMatching


def saved_bytes(sampler, noise, conditioning):
    """Bytes of storages that the forward pass saves, each once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in sampler.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = sampler(noise, conditioning)
    del out  # until here the graph keeps what was saved, so that no address is used twice
    return sum(found.values())


@pytest.mark.parametrize("gradient", ["exact_adjoint", "adjoint", "checkpoint", "truncated", "direct"])
def test_memory_over_steps(gradient):
    net, noise = TextNet(), torch.randn(2, 4, 8, 8, requires_grad=True)
    conditioning = {"prompt_embeds": prompts()}
    sizes = {}
    for steps in (5, 100):
        sampler = DiffusionSampler(net, STABLE_DIFFUSION, num_steps=steps, gradient=gradient)
        sizes[steps] = saved_bytes(sampler, noise, conditioning)
    states = 95 * noise.nbytes  # the 95 further states, each as large as the noise
    grown = sizes[100] - sizes[5]
    if gradient == "direct":
        assert grown > 50 * states  # the activations of 95 evaluations
    else:
        assert grown <= 2 * states  # a checkpoint keeps two tensors a step; allocators round up
    assert (gradient == "truncated") == (grown == 0)


class Types(TorchDispatchMode):
    """The types in which matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm.default:
            self.seen.append(args[1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradient", ["exact_adjoint", "adjoint"])
def test_autocast_holds_in_the_backward_pass(gradient):
    net, noise = Tanh(dtype=torch.float32), torch.randn(4, 3, requires_grad=True)
    sampler = DiffusionSampler(net, STABLE_DIFFUSION, num_steps=3, gradient=gradient)
    with torch.autocast("cpu", torch.bfloat16):
        out = sampler(noise)
    assert out.dtype == torch.float32  # the state is
    with Types() as types:
        out.sum().backward()
    assert types.seen
    assert set(types.seen) == {torch.bfloat16}


def test_bfloat16_autocast_on_the_unet():
    torch.manual_seed(0)
    net, noise = TextNet(), torch.randn(4, 4, 8, 8)
    given = {"prompt_embeds": prompts(4), "no_prompt_embeds": torch.randn(1, 5, 8)}
    sampler = DiffusionSampler(net, STABLE_DIFFUSION, num_steps=20, guidance_scale=7.5)
    true = gradients(sampler, noise, **given)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(sampler, noise, **given)
    for ours, single in zip(found[1:], true[1:], strict=True):
        # The bound that the method is held to; bfloat16 has 8 bits, and errors of 20 steps average out.
        assert torch.cosine_similarity(ours.flatten(), single.flatten(), 0) > 0.999


def test_half_precision_networks_have_a_state_in_single_precision():
    net = TextNet().to(torch.bfloat16)
    sampler = DiffusionSampler(net, STABLE_DIFFUSION, num_steps=3)
    noise = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    out = sampler(noise, {"prompt_embeds": prompts()})
    out.square().mean().backward()
    assert out.dtype == torch.float32
    assert noise.grad.dtype == torch.bfloat16
    assert {p.grad.dtype for p in net.parameters()} == {torch.bfloat16}


def test_a_shared_parameter_gets_its_gradient_once():
    net = torch.nn.Module()
    net.first, net.second = (torch.nn.Linear(3, 3, dtype=torch.double) for _ in range(2))
    net.second.weight = net.first.weight
    net.forward = lambda x, time: net.second(torch.tanh(net.first(x)))
    noise = torch.randn(4, 3, dtype=torch.double)
    true, found = (
        gradients(DiffusionSampler(net, log_spaced(), num_steps=3, gradient=kind), noise)
        for kind in ("direct", "exact_adjoint")
    )
    assert relative(found[-1], true[-1]) < 1e-10  # equal mathematics in float64


class Constant(torch.nn.Module):
    """A velocity that is a parameter in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.velocity = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

    def forward(self, x, time):
        return self.velocity.expand_as(x)


@pytest.mark.parametrize("gradient", ["exact_adjoint", "adjoint"])
def test_gradients_in_half_precision_are_summed_in_single_precision(gradient):
    net, steps = Constant(), 500
    sampler = DiffusionSampler(net, FlowMatching(), "flow_prediction", num_steps=steps, gradient=gradient)
    (0.75 * sampler(torch.zeros(1, 1))).sum().backward()
    # Each step adds 0.0015. Added up in bfloat16, whose numbers from 0.5 on are 0.0039 apart, they would end at 0.5.
    torch.testing.assert_close(net.velocity.grad, torch.tensor([-0.75], dtype=torch.bfloat16), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("gradient", ["exact_adjoint", "checkpoint"])
def test_dropout_is_the_same_on_the_way_back(gradient):
    net, noise = Tanh(dropout=0.5), torch.randn(8, 3, dtype=torch.double)
    c, found = torch.randn(8, 3, dtype=torch.double), {}
    for kind in ("direct", gradient):
        torch.manual_seed(3)
        sampler = DiffusionSampler(net, log_spaced(), num_steps=4, solver="midpoint", gradient=kind)
        found[kind] = [*gradients(sampler, noise, c=c), torch.rand(1)]  # the caller's stream moves as with autograd
    assert torch.equal(found[gradient][-1], found["direct"][-1])
    for ours, autograd in zip(found[gradient], found["direct"], strict=True):
        assert relative(ours, autograd) < 1e-10  # equal mathematics in float64


def test_the_adjoint_with_dropout_uses_the_masks_of_its_steps():
    # With one step, its only evaluation is at the end, under the mask of the forward one: the sample does not depend on
    # parameters that the mask takes out.
    net = Tanh(dropout=0.5)
    torch.manual_seed(0)
    sampler = DiffusionSampler(net, log_spaced(), num_steps=1, gradient="adjoint")
    kept = []
    net.drop.register_forward_hook(lambda module, args, out: kept.append((out != 0).clone()))
    sampler(torch.randn(1, 3, dtype=torch.double)).sum().backward()
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(net.second.weight.grad[0] != 0, kept[0][0])


def test_the_adjoint_of_two_stages_uses_the_masks_of_their_places():
    net, masks = Tanh(dropout=0.5), []
    net.drop.register_forward_hook(lambda module, args, out: masks.append(out != 0))
    sampler = DiffusionSampler(net, log_spaced(), num_steps=1, solver="heun", gradient="adjoint")
    sampler(torch.randn(4, 3, dtype=torch.double)).sum().backward()
    at_start, at_end, back_at_end, back_at_start = masks
    assert not torch.equal(at_start, at_end)
    assert torch.equal(back_at_end, at_end)
    assert torch.equal(back_at_start, at_start)


class TwoBiases(torch.nn.Module):
    """Both biases have one tensor as their gradient, which is the cotangent itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(torch.ones(2, 3, dtype=torch.double)) for _ in range(2))

    def forward(self, x, time):
        return torch.tanh(x).detach() + self.first + self.second


@pytest.mark.parametrize("gradient", ["exact_adjoint", "adjoint"])
def test_gradients_that_share_a_tensor_are_summed_apart(gradient):
    noise, net = torch.randn(2, 3, dtype=torch.double), TwoBiases()
    true, found = (
        gradients(DiffusionSampler(net, log_spaced(), num_steps=3, gradient=kind), noise)
        for kind in ("direct", gradient)
    )
    # The field is a constant plus the parameters, whose derivative is 1 at every place: the adjoint has no bias.
    assert relative(found[-1], true[-1]) < 1e-10  # equal mathematics in float64


@pytest.mark.parametrize("gradient", ["exact_adjoint", "adjoint"])
def test_second_derivatives_are_refused(gradient):
    noise = torch.randn(2, 3, dtype=torch.double, requires_grad=True)
    out = DiffusionSampler(Tanh(), log_spaced(), num_steps=2, gradient=gradient)(noise)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.sum(), noise, create_graph=True)


def test_weights_changed_in_place_between_the_passes_are_noticed():
    net = Tanh()
    out = DiffusionSampler(net, log_spaced(), num_steps=2)(torch.randn(2, 3, dtype=torch.double))
    with torch.no_grad():
        net.first.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.sum().backward()


def test_only_what_is_trained_is_differentiated():
    net = Tanh()
    net.first.requires_grad_(False)
    sampler = DiffusionSampler(net, log_spaced(), num_steps=3)
    sampler(torch.randn(2, 3, dtype=torch.double)).sum().backward()
    assert net.first.weight.grad is None
    assert net.second.weight.grad is not None
    with torch.no_grad():
        assert not sampler(torch.randn(2, 3, dtype=torch.double)).requires_grad


@pytest.mark.parametrize(("micro_batch", "kept"), [(None, 2), (2, 0)])
def test_evaluations_are_counted(micro_batch, kept):
    net, noise = TextNet(), torch.randn(4, 4, 8, 8)
    given = {"prompt_embeds": prompts(4), "no_prompt_embeds": torch.randn(1, 5, 8)}
    counts = {}
    for gradient in ("direct", "exact_adjoint", "adjoint", "checkpoint"):
        sampler = DiffusionSampler(
            net, STABLE_DIFFUSION, num_steps=3, gradient=gradient, guidance_scale=2.0, micro_batch=micro_batch
        )
        gradients(sampler, noise, **given)
        counts[gradient] = sampler.network_evals
    # Three steps with and without the prompt, and again; the graph of the last is kept where the batch is in one part.
    assert counts == {"direct": 6, "exact_adjoint": 12 - kept, "adjoint": 12, "checkpoint": 12}


def test_uncounted_evaluations_are_not_counted():
    sampler, noise = DiffusionSampler(Tanh(), STABLE_DIFFUSION, num_steps=3), torch.randn(2, 3, dtype=torch.double)
    with uncounted():
        sampler(noise).sum().backward()
    assert sampler.network_evals == 0
    sampler(noise).sum().backward()
    assert sampler.network_evals == 5


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("gradient", ["exact_adjoint", "truncated"])
def test_a_second_backward_pass_has_the_gradient_of_the_first(gradient, num_steps):
    # The first takes the kept graph of the last evaluation, the second evaluates it again. The conditioning has a graph
    # behind it, so that the kept graph ends at a leaf of its own.
    net, c = Tanh(dropout=0.5), torch.randn(2, 3, dtype=torch.double, requires_grad=True)
    sampler = DiffusionSampler(net, log_spaced(), num_steps=num_steps, gradient=gradient)
    out = sampler(torch.randn(2, 3, dtype=torch.double), {"c": c * 2.0}).sum()
    first = torch.autograd.grad(out, [c, *net.parameters()], retain_graph=True)
    second = torch.autograd.grad(out, [c, *net.parameters()])
    assert all(bool(grad.any()) for grad in first)
    assert all(map(torch.equal, first, second))


def test_forward_mode_goes_through_a_solve_without_a_graph():
    import torch.autograd.forward_ad as fwd

    net, noise = Tanh().requires_grad_(False), torch.randn(2, 3, dtype=torch.double)
    direction = torch.randn_like(noise)
    sampler = DiffusionSampler(net, log_spaced(), num_steps=4)
    leaf = noise.clone().requires_grad_()
    true = (torch.autograd.grad(sampler(leaf).sum(), leaf)[0] * direction).sum()
    with torch.no_grad(), fwd.dual_level():
        slope = fwd.unpack_dual(sampler(fwd.make_dual(noise, direction)).sum()).tangent
    torch.testing.assert_close(slope, true, rtol=1e-10, atol=0.0)
