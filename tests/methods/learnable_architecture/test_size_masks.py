"""Masks, crops and differentiable sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_bpfree.methods.learnable_architecture.continuous.convolution import ContinuousConv
from lightning_bpfree.methods.learnable_architecture.sizes.axes import FrequencyAxis, KernelAxis, UnitAxis, refresh
from lightning_bpfree.methods.learnable_architecture.sizes.masks import (
    clamped,
    gaussian_mask,
    gaussian_root,
    sigmoid_mask,
    sigmoid_root,
    tap_positions,
    thresholded,
)

AXES = {
    "units": lambda: UnitAxis("width", 12),
    "blocks": lambda: UnitAxis("depth", 4, least=0),
    "taps": lambda: KernelAxis(33, 0.3),
    "causal taps": lambda: KernelAxis(33, 0.3, causal=True),
    "frequencies": lambda: FrequencyAxis(16),
}


def test_roots_are_where_masks_cross_the_threshold():
    # The same formula solved for the position, in float64: rounding only.
    spread, edge = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    assert gaussian_mask(gaussian_root(spread, 0.1), spread).item() == pytest.approx(0.1, rel=1e-10)
    assert sigmoid_mask(sigmoid_root(edge, 25.0, 0.1), edge, 25.0).item() == pytest.approx(0.1, rel=1e-10)


def test_masks_and_roots_pass_gradcheck():
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    size = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    for function in (
        lambda s: gaussian_mask(x, s),
        gaussian_root,
        lambda s: sigmoid_mask(x, s, 10.0),
        sigmoid_root,
    ):
        assert torch.autograd.gradcheck(function, (size,))


def test_a_gaussian_of_no_spread_is_no_nan():
    spread = torch.zeros((), requires_grad=True)
    value = gaussian_mask(tap_positions(5), spread).sum() + gaussian_root(spread)
    value.backward()
    assert value.isfinite()
    assert spread.grad.isfinite()


@pytest.mark.parametrize("kind", AXES)
def test_crops_can_be_set_and_lengths_are_near_them(kind):
    axis = AXES[kind]()
    for crop in axis.crops:
        axis.set_crop(crop)
        axis.clamp_()
        refresh([axis])
        assert axis.crop == crop
        # Half a unit, block or causal tap; a tap on each side of a kernel; two samples a frequency.
        assert abs(float(axis.length().detach()) - crop) <= (0.5 if kind in ("units", "blocks", "causal taps") else 1.0)


@pytest.mark.parametrize("kind", AXES)
def test_what_is_cropped_is_what_the_threshold_would_zero(kind):
    axis = AXES[kind]()
    for crop in axis.crops:
        axis.set_crop(crop)
        mask = thresholded(axis.mask().detach())
        assert int((mask > 0).sum()) == axis.kept
        jump = axis.mask().detach()[mask == 0]
        assert (jump < 0.1).all()  # what the loss sees when a unit crosses the threshold


@pytest.mark.parametrize("kind", AXES)
def test_sizes_outside_of_their_range_still_get_a_gradient(kind):
    axis = AXES[kind]()
    for value in (axis.low - 0.2, axis.high + 0.2):
        with torch.no_grad():
            axis.size.fill_(value)
        axis.size.grad = None
        axis.length().backward()
        if value > 0 or kind not in ("taps", "causal taps"):  # a Gaussian is even in its spread
            assert axis.size.grad > 0


def test_a_size_that_collapses_is_brought_back():
    axis = UnitAxis("width", 4)
    for value in (-3.0, float("nan")):
        with torch.no_grad():
            axis.size.fill_(value)
        assert axis.clamp_()
        refresh([axis])
        assert axis.kept >= 1
    assert not axis.clamp_()


def test_clamping_has_the_derivative_of_the_identity():
    x = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    out = clamped(x, 0.0, 1.0)
    out.sum().backward()
    assert torch.equal(out.detach(), torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(x.grad, torch.ones(3))


def wide_kernel(conv: ContinuousConv, threshold: bool) -> torch.Tensor:
    """The kernel at all taps, hard-thresholded along each axis or not, by the plain formula."""
    at = [axis.positions for axis in conv.kernel_axes]
    grid = torch.stack(torch.meshgrid(*at, indexing="ij"), -1)
    values = conv.generator(grid.view(-1, conv.dims)).T.reshape(conv.channels, 1, *grid.shape[:-1])
    for d, axis in enumerate(conv.kernel_axes):
        mask = axis.mask()
        if threshold:
            mask = mask * (mask >= 0.1)
        values = values * mask.view([-1 if i == d else 1 for i in range(conv.dims)])
    return values


@pytest.mark.parametrize("dims", [1, 2])
def test_a_cropped_kernel_is_the_thresholded_one(dims):
    torch.manual_seed(0)
    conv = ContinuousConv(3, 33, dims, spread=0.075).double()
    x = torch.randn(2, 3, *[40] * dims, dtype=torch.float64)
    convolve = F.conv1d if dims == 1 else F.conv2d
    assert conv.kernel().shape[2:] == torch.Size([5] * dims)

    def gradient(out):
        return torch.autograd.grad(out.square().sum(), [axis.size for axis in conv.kernel_axes])

    cropped = conv(x)
    plain = convolve(x, wide_kernel(conv, threshold=True), conv.bias, padding=16, groups=3)
    # Sums over the taps in another order, in float64.
    assert torch.allclose(cropped, plain, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradient(cropped), gradient(plain), strict=True):
        assert torch.allclose(a, b, rtol=1e-9)
    soft = convolve(x, wide_kernel(conv, threshold=False), conv.bias, padding=16, groups=3)
    off = float((cropped - soft).detach().norm() / soft.detach().norm())
    assert 0.01 < off < 0.15  # an approximation of the mask that is not thresholded, as the page says
