"""What tracing finds, and that costs, crops and exports of it are exact: for networks of many kinds."""

from __future__ import annotations

import copy

import pytest
import torch
from searched_networks import NETWORKS, built, crop_at_random, logits
from torch import nn

from lightning_bpfree.functional import count_macs
from lightning_bpfree.methods.learnable_architecture.architecture import Architecture
from lightning_bpfree.methods.learnable_architecture.export import export
from lightning_bpfree.methods.learnable_architecture.search import Search
from lightning_bpfree.methods.learnable_architecture.sizes.axes import UnitAxis, refresh
from lightning_bpfree.methods.learnable_architecture.sizes.cost import deviation, settle
from lightning_bpfree.methods.learnable_architecture.tracing.counting import CostBuilder
from lightning_bpfree.methods.learnable_architecture.tracing.probe import ExampleCall, quiet_evaluation

pytest.importorskip("transformers")

UNITS = {
    "mlp": [6, 5],
    "cnn": [6, 8],
    "group norm": [8, 4],  # the second norm has groups of 3 channels
    "resnet": [6, 6, 6, 10, 10, 10],  # two streams, and one width within each of four blocks
    "concatenating": [4, 6, 8],
    "transformer": [16, 16],  # hidden units of MLPs; nn.MultiheadAttention holds the stream
    "ccnn": [4, 4, 4],
    "transformers ViT": [12, 3, 16, 3, 16],  # the stream, heads, MLPs
    "transformers ConvNeXt": [4, 16, 16, 8, 32, 32],
}
BLOCKS = {"resnet": [1, 2], "ccnn": [2], "transformer": [2], "transformers ViT": [2], "transformers ResNet": [1, 1]}


@pytest.mark.parametrize("name", UNITS)
def test_widths_are_tied_by_streams_norms_and_heads(name):
    _, _, architecture = built(name)
    assert sorted(axis.count for axis in architecture.of("width")) == sorted(UNITS[name])


@pytest.mark.parametrize("name", BLOCKS)
def test_residual_blocks_are_found(name):
    _, _, architecture = built(name)
    assert sorted(axis.count for axis in architecture.of("depth")) == BLOCKS[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_are_those_of_an_independent_counter(name):
    network, call, architecture = built(name)
    builder = CostBuilder(architecture)
    macs, params = builder.macs(), builder.params()
    architecture.install()
    for seed in range(3):
        crop_at_random(architecture, seed)
        exported = export(architecture)
        assert macs.number() == pytest.approx(exported.macs, abs=0.5)
        assert count_macs(network, *call.args, **call.kwargs) == exported.macs
        assert params.number() == pytest.approx(exported.params, abs=0.5)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_export_computes_what_the_masked_network_computes(name):
    network, call, architecture = built(name)
    architecture.install()
    crop_at_random(architecture, 3)
    args, kwargs = (torch.randn(4, *call.args[0].shape[1:]),) if call.args else (), dict(call.kwargs)
    exported = export(architecture).network
    network.eval()
    with torch.no_grad():
        masked, plain = logits(network(*args, **kwargs)), logits(exported(*args, **kwargs))
    # The same products in float32; what was learned in hooks is multiplied into the weights.
    assert torch.allclose(masked, plain, rtol=1e-5, atol=1e-5)
    assert not any(name.endswith("size") for name, _ in exported.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in exported.modules())


def zeroed(network: nn.Module, architecture: Architecture) -> nn.Module:
    """A copy of full width, in which layers that read units have columns multiplied by the thresholded mask."""
    plain = copy.deepcopy(network)
    for group in architecture.groups:
        axis = architecture.named[f"width/{group.name}"]
        assert isinstance(axis, UnitAxis)
        mask = axis.mask().detach() * (axis.mask().detach() >= 0.1)
        for name in group.readers:
            weight = plain.get_submodule(name).weight.data
            for entry, unit in group.places[name].ordered(group.count):
                weight[:, entry] *= mask[unit]
    return plain


@pytest.mark.parametrize("name", ["mlp", "cnn", "group norm", "resnet", "concatenating", "transformers ResNet", "ccnn"])
def test_cropped_widths_are_thresholded_ones(name):
    network, call, architecture = built(name, dims=("width",))
    architecture.manage(managed=False)
    crop_at_random(architecture, 1)
    plain = zeroed(network, architecture).double().eval()
    network.double().eval()
    architecture.double().install()
    x = torch.randn(3, *call.args[0].shape[1:], dtype=torch.float64)
    with torch.no_grad():
        # Masks are float32, multiplied in float64; equal mathematics otherwise.
        assert torch.allclose(logits(network(x)), logits(plain(x)), rtol=1e-6, atol=1e-7)


def test_a_layer_norm_is_that_of_the_units_that_are_left():
    network, _, architecture = built("layer norm", dims=("width",))
    architecture.install()
    crop_at_random(architecture, 1)
    seen = {}
    network.layers[1].register_forward_hook(lambda m, args, out: seen.update(given=args[0], out=out))
    network(torch.randn(16, 8))
    kept = architecture.axes[0].kept
    assert kept < 6
    assert seen["given"].shape == (16, kept)
    own = nn.functional.layer_norm(seen["given"], (kept,))
    assert torch.allclose(seen["out"], own, rtol=1e-5, atol=1e-6)


def test_masks_are_behind_norms_which_would_take_them_away():
    network, _, architecture = built("mlp", dims=("width",))
    x = torch.randn(64, 8)
    network.train()
    architecture.install()
    outs = []
    for edge in (1.0, 0.8):
        with torch.no_grad():
            architecture.axes[0].size.fill_(edge)
        outs.append(network(x))
    assert architecture.axes[0].kept == 6  # the crop is the same
    assert (outs[0] - outs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_a_gradient_reaches_every_mask(name):
    network, call, architecture = built(name)
    architecture.install()
    network.train()
    x = torch.randn(4, *call.args[0].shape[1:]) if call.args else None
    out = logits(network(x) if x is not None else network(**call.kwargs))
    (out * torch.randn(out.shape)).sum().backward()
    for axis_name, axis in architecture.named.items():
        assert axis.size.grad is not None, axis_name
        assert axis.size.grad.isfinite(), axis_name
        assert axis.size.grad != 0, axis_name


@pytest.mark.parametrize("name", ["resnet", "ccnn", "transformers ViT"])
def test_the_gradients_of_masks_are_those_of_finite_differences(name):
    torch.manual_seed(1)
    network, call, architecture = built(name)
    architecture.manage(managed=False)
    crop_at_random(architecture, 5)
    architecture.manage()
    network.double().eval()
    architecture.double().install()
    call = ExampleCall(tuple(a.double() for a in call.args), {k: v.double() for k, v in call.kwargs.items()})
    weights = torch.randn(logits(call(network)).shape, dtype=torch.float64)

    def value() -> torch.Tensor:
        return (logits(call(network)) * weights).sum()

    found = torch.autograd.grad(value(), [axis.size for axis in architecture.axes], allow_unused=True)
    for (axis_name, axis), gradient in zip(architecture.named.items(), found, strict=True):
        with torch.no_grad():
            size, step = axis.size.clone(), 1e-5
            ends = []
            for sign in (1, -1):
                axis.size.copy_(size + sign * step)
                ends.append(value())
            axis.size.copy_(size)
        expected = (ends[0] - ends[1]) / (2 * step)
        own = torch.zeros_like(expected) if gradient is None else gradient
        # Central differences: an error of step² by the third derivative, some 25³ for a sigmoid of slope 25.
        assert torch.allclose(own, expected, rtol=1e-4, atol=1e-6), axis_name


@pytest.mark.parametrize("name", NETWORKS)
def test_tracing_and_removing_leave_the_network_as_it_was(name):
    torch.manual_seed(0)
    network, example = NETWORKS[name]()
    call = ExampleCall((), dict(example)) if isinstance(example, dict) else ExampleCall((example,), {})
    network.train()
    before, stream = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    with quiet_evaluation(network):
        out = logits(call(network))
    architecture = Architecture(network, call)
    CostBuilder(architecture)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(module.training for module in network.modules())
    architecture.install()
    with quiet_evaluation(network):
        call(network)
    architecture.remove()
    architecture.manage(managed=False)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with quiet_evaluation(network):
        assert torch.equal(logits(call(network)), out)


def largest_step(cost, axes):
    """Return by how much the cost changes at most where one size becomes its next crop, up or down."""
    now, steps = cost.number(), [0.0]
    for axis in axes:
        kept, size, place = axis.kept, axis.size.detach().clone(), axis.crops.index(axis.crop)
        for other in {max(place - 1, 0), min(place + 1, len(axis.crops) - 1)}:
            axis.set_crop(axis.crops[other])
            steps.append(abs(cost.number() - now))
        with torch.no_grad():
            axis.size.copy_(size)
        axis.set_kept(kept)
    return max(steps)


@pytest.mark.parametrize(("name", "start"), [("resnet", "large"), ("resnet", "small"), ("transformers ViT", "large")])
def test_the_budget_alone_is_reached_from_above_and_below(name, start):
    _, _, architecture = built(name)
    cost = CostBuilder(architecture).macs()
    low, high = cost.at(architecture.axes, smallest=True), cost.full
    target = low + 0.4 * (high - low)
    for axis in architecture.axes:
        axis.set_crop(axis.crops[-1 if start == "large" else len(axis.crops) // 8])
    begin = cost.number()
    assert begin > target if start == "large" else begin < target
    own = Search(architecture, cost, target, weight=10.0, lr=0.02, tolerance=0.02)
    costs, crops = [], []
    for step in range(250):
        own.step(left=1 - step / 250)
        costs.append(float(cost.value().detach()))
        crops.append(cost.number())
    # The objective is the deviation of the crops: the search goes to and fro between those on both sides of the target,
    # which are far apart where one head of three makes the difference.
    assert min(crops[-100:]) <= 1.01 * target
    assert max(crops[-100:]) >= 0.99 * target
    assert abs(crops[-1] - target) <= largest_step(cost, architecture.axes)
    beyond = min(costs) / target if start == "large" else target / max(costs)
    assert beyond > 0.75  # no overshoot that leaves little of the network
    assert settle(cost, architecture.axes, target, 0.02)
    assert cost.number() == pytest.approx(target, rel=0.02)


def test_the_budgets_value_is_that_of_the_crops_and_its_gradient_that_of_lengths():
    _, _, architecture = built("mlp")
    cost = CostBuilder(architecture).macs()
    crop_at_random(architecture, 0)
    target = 0.5 * cost.full
    value = deviation(cost, target)
    assert float(value.detach()) == pytest.approx((cost.number() / target - 1) ** 2, rel=1e-5)
    value.backward()
    for axis in architecture.axes:
        own = axis.size.grad
        slope = torch.autograd.grad(cost.value(), axis.size)[0]
        assert own == pytest.approx(float(2 * (cost.number() / target - 1) * slope / target), rel=1e-4)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
def test_settling_changes_all_widths_by_one_factor(share):
    network = nn.Sequential(
        nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 80), nn.ReLU(), nn.Linear(80, 40), nn.ReLU(), nn.Linear(40, 3)
    )
    architecture = Architecture(network, ExampleCall((torch.randn(1, 8),), {}), ("width",))
    cost = CostBuilder(architecture).macs()
    learned = [16, 60, 40]
    for axis, crop in zip(architecture.axes, learned, strict=True):
        axis.set_crop(crop)
    refresh(architecture.axes)
    assert settle(cost, architecture.axes, share * cost.number(), 0.03)
    factors = [axis.crop / crop for axis, crop in zip(architecture.axes, learned, strict=True)]
    # One unit of the narrowest layer is 1/16 of it, and the last step may be an exchange: of one unit more.
    assert max(factors) - min(factors) <= 2 / 16
    assert max(factors) < 1
