"""Forward mode equals <backprop gradient, v> on every supported layer; where it cannot, it says so."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_bpfree.core.forward_ad import (
    NoForwardDerivativeError,
    compiled_parts,
    directional_derivative,
    directional_derivatives,
    failing_layer,
    supported_kernels,
    unsupported_layers,
)
from lightning_bpfree.core.params import ParameterSlots


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = nn.Linear(8, 8), reentrant
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        x = x.requires_grad_(torch.is_grad_enabled())
        return self.head(checkpoint(self.inner, x, use_reentrant=self.reentrant))


class First(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[0]


VECTORS = (6, 8)
SEQUENCES = (6, 5, 8)
IMAGES = (6, 2, 8, 8)
SUPPORTED = {
    "linear": (nn.Linear(8, 4), VECTORS),
    "relu": (nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)), VECTORS),
    "gelu": (nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)), VECTORS),
    "conv": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)), IMAGES),
    "transposed conv": (nn.ConvTranspose2d(2, 3, 3), IMAGES),
    "average pool": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.AdaptiveAvgPool2d(2)), IMAGES),
    "batch norm": (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()), VECTORS),
    "layer norm": (nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh()), VECTORS),
    "group norm": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()), IMAGES),
    "dropout": (nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2)), VECTORS),
    "gru": (First(nn.GRU(8, 4, batch_first=True)), SEQUENCES),
    "lstm": (First(nn.LSTM(8, 4, batch_first=True)), SEQUENCES),
    "attention": (Attention(), SEQUENCES),
    "multi-head attention": (nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True), SEQUENCES),
    "transformer in eval mode": (nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True).eval(), SEQUENCES),
    "checkpoint": (Checkpointed(reentrant=False), VECTORS),
}


def problem(net, shape, dtype=torch.float64):
    net = net.to(dtype)
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=dtype)
    slots = ParameterSlots(net)
    params = {slot.name: slot.parameter.detach() for slot in slots}
    target = torch.randn(net(x).shape, dtype=dtype)

    def loss_fn(values, seed=5):
        torch.manual_seed(seed)
        with slots.replaced(values):
            return F.mse_loss(net(x.clone()), target)

    return net, slots, params, loss_fn


@pytest.mark.parametrize(("net", "shape"), SUPPORTED.values(), ids=SUPPORTED.keys())
def test_slope_is_the_inner_product_with_the_gradient(net, shape):
    net, slots, params, loss_fn = problem(net, shape)
    direction = {name: torch.randn_like(p) for name, p in params.items()}
    with supported_kernels(net):
        loss, slope = directional_derivative(loss_fn, params, direction)
    torch.manual_seed(5)
    own = {slot.name: slot.parameter for slot in slots}
    value = loss_fn(own)
    grads = torch.autograd.grad(value, list(own.values()))
    expected = sum((g * direction[n]).sum() for n, g in zip(own, grads, strict=True))
    torch.testing.assert_close(loss, value.detach(), rtol=1e-10, atol=1e-12)  # equal math in float64
    torch.testing.assert_close(slope, expected, rtol=1e-10, atol=1e-12)
    assert not loss.requires_grad
    assert not slope.requires_grad


@pytest.mark.parametrize("name", ["linear", "relu", "conv", "layer norm", "gru", "attention"])
def test_vectorised_slopes_equal_the_loop(name):
    net, _, params, loss_fn = problem(*SUPPORTED[name])
    stacked = {n: torch.randn(3, *p.shape, dtype=p.dtype) for n, p in params.items()}
    with supported_kernels(net):
        _, together = directional_derivatives(loss_fn, params, stacked)
        alone = [directional_derivative(loss_fn, params, {n: s[i] for n, s in stacked.items()})[1] for i in range(3)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-10, atol=1e-12)


def test_no_graph_is_built():
    _, _, params, loss_fn = problem(*SUPPORTED["relu"])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        directional_derivative(loss_fn, params, {n: torch.randn_like(p) for n, p in params.items()})
    assert saved == []


def test_a_reentrant_checkpoint_raises_instead_of_dropping_the_tangent():
    net, _, params, loss_fn = problem(Checkpointed(reentrant=True), VECTORS)
    direction = {n: torch.randn_like(p) for n, p in params.items()}
    with supported_kernels(net), pytest.raises(NoForwardDerivativeError, match="use_reentrant=False"):
        directional_derivative(loss_fn, params, direction)
    own = torch.utils.checkpoint.CheckpointFunction.apply
    assert "refuse" not in getattr(own, "__qualname__", "")


def test_a_cut_tangent_is_an_error_and_never_a_zero():
    with pytest.raises(NoForwardDerivativeError, match=r"ZerothOrder\(\)"):
        directional_derivative(lambda p: (p["w"].detach() ** 2).sum(), {"w": torch.ones(2)}, {"w": torch.ones(2)})
    with pytest.raises(NoForwardDerivativeError, match=r"ZerothOrder\(\)"):
        directional_derivatives(lambda p: (p["w"].detach() ** 2).sum(), {"w": torch.ones(2)}, {"w": torch.ones(3, 2)})


def test_layers_without_forward_mode_are_named_with_a_cure():
    bag = nn.Sequential(nn.Linear(2, 2), nn.EmbeddingBag(4, 2))
    (found,) = unsupported_layers(bag, bag.parameters())
    assert found == ("1 (EmbeddingBag)", "use nn.Embedding followed by a sum or mean")
    assert unsupported_layers(bag, bag[0].parameters()) == []  # a layer that is not trained meets no tangent
    net = parametrizations.weight_norm(nn.Linear(2, 2))
    (found,) = unsupported_layers(net, net.parameters())
    assert "WeightNorm" in found[1]
    net = parametrizations.spectral_norm(nn.Linear(2, 2))
    (found,) = unsupported_layers(net, net.parameters())
    assert "SpectralNorm" in found[1]
    net = nn.utils.spectral_norm(nn.Linear(2, 2))
    (found,) = unsupported_layers(net, net.parameters())
    assert "remove_spectral_norm" in found[1]
    net = nn.Sequential(nn.LSTM(2, 2), nn.BatchNorm1d(2))
    assert unsupported_layers(net, net.parameters()) == []


def test_no_grad_stops_tangents_as_it_stops_gradients():
    def loss_fn(p):
        with torch.no_grad():
            target = p["w"] * 2
        return ((p["w"] - target) ** 2).sum()

    at, v = {"w": torch.tensor([3.0])}, {"w": torch.ones(1)}
    before = torch.no_grad.__enter__
    _, slope = directional_derivative(loss_fn, at, v)
    _, slopes = directional_derivatives(loss_fn, at, {"w": torch.ones(2, 1)})
    assert float(slope) == -6.0  # 2 (w - 6) with the target held fixed; without the stop it would be 6
    assert slopes.tolist() == [-6.0, -6.0]
    assert torch.no_grad.__enter__ is before


def test_compiled_parts_are_found():
    net = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2), backend="eager"))
    assert compiled_parts(net) == ["1"]
    inplace = nn.Linear(2, 2)
    inplace.compile(backend="eager")
    assert compiled_parts(nn.Sequential(inplace)) == ["0"]


def test_failing_layer_names_the_innermost():
    class Breaks(nn.Module):
        def forward(self, x):
            raise ValueError("here")

    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Breaks()))
    error, layer = failing_layer(net, lambda: net(torch.ones(1, 2)))
    assert layer == "1.0 (Breaks)"
    assert isinstance(error, ValueError)
    assert failing_layer(net[0], lambda: net[0](torch.ones(1, 2))) == (None, None)
