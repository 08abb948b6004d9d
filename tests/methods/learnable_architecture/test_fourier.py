"""Resizing in the Fourier domain, learned strides, learned resolutions."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_bpfree.functional import fourier_resize
from lightning_bpfree.methods.learnable_architecture.continuous import fourier
from lightning_bpfree.methods.learnable_architecture.continuous.fourier import resize_axis
from lightning_bpfree.methods.learnable_architecture.continuous.striding import (
    DiffStride,
    FrequencyCrop,
    FrequencyRestore,
)


def waves(samples: int, highest: int) -> torch.Tensor:
    """A real signal of frequencies up to ``highest``, and a mean, at ``samples`` points."""
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(samples, dtype=torch.float64) / samples
    amplitudes = torch.randn(highest + 1, 2, generator=generator, dtype=torch.float64)
    parts = [
        a * torch.cos(2 * math.pi * k * t) + b * torch.sin(2 * math.pi * k * t) for k, (a, b) in enumerate(amplitudes)
    ]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize(("old", "new"), [(64, 32), (64, 28), (64, 40), (300, 160), (32, 64), (28, 300)])
def test_a_band_limited_signal_is_sampled_anew(old, new):
    highest = min(old, new) // 2 - 1
    # Exact mathematics in float64, sums of up to 300 terms.
    assert torch.allclose(fourier_resize(waves(old, highest), [new]), waves(new, highest), rtol=1e-10, atol=1e-11)


def test_a_constant_keeps_its_value_in_both_axes():
    x = torch.full((1, 1, 8, 6), 1.5, dtype=torch.float64)
    assert torch.allclose(fourier_resize(x, [4, 2]), torch.full((1, 1, 4, 2), 1.5, dtype=torch.float64), rtol=1e-12)


def test_the_highest_frequency_of_a_smaller_result_is_left_out():
    t = torch.arange(16, dtype=torch.float64)
    at_the_edge = torch.cos(2 * math.pi * 4 * t / 16)  # the highest of 8 samples
    assert fourier_resize(at_the_edge, [8]).abs().max() < 1e-12
    own = torch.cos(math.pi * t)  # the highest of 16 samples stays in a larger result
    assert torch.allclose(fourier_resize(own, [32])[::2], own, rtol=1e-10, atol=1e-12)


def test_both_routes_compute_the_same(monkeypatch):
    x = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    mask = torch.linspace(1, 0.2, 9, dtype=torch.float64)
    by_matrix = resize_axis(x, 2, 10, mask)
    monkeypatch.setattr(fourier, "MATRIX_LIMIT", 0)
    assert torch.allclose(resize_axis(x, 2, 10, mask), by_matrix, rtol=1e-10, atol=1e-12)


def test_strides_give_the_sizes_of_the_paper():
    assert DiffStride((2.0, 4.0))(torch.zeros(1, 2, 64, 64)).shape == (1, 2, 40, 24)
    assert DiffStride(1.5, ramp=2.0, dims=1)(torch.zeros(1, 2, 30)).shape == (1, 2, 24)


@pytest.mark.parametrize("stride", [(2.0, 4.0), (1.375, 2.75)])
def test_a_learned_stride_crops_what_its_mask_zeroes(stride):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 32, 32, dtype=torch.float64)
    out = DiffStride(stride).double()(x)
    masked = x
    for d, s in zip((-2, -1), stride, strict=True):
        ramp = ((4 + 32 / (2 * s) - torch.arange(17, dtype=torch.float64)) / 4).clamp(0, 1)
        masked = resize_axis(masked, d, 32, ramp)
    # Nothing is lost by the crop: back at the old size, the signal is the masked one, which is not cropped.
    assert torch.allclose(fourier_resize(out, [32, 32]), masked, rtol=1e-9, atol=1e-10)


def test_strides_get_their_gradient_also_where_they_begin():
    torch.manual_seed(0)
    stride = DiffStride(1.0)  # below what leaves the mask a slope: clamped, with a gradient all the same
    stride(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert (stride.stride.grad.abs() > 0).all()
    assert stride.stride.grad.isfinite().all()


def test_the_gradient_of_a_stride_is_that_of_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 24, 24, dtype=torch.float64)
    layer = DiffStride((1.7, 2.3)).double()
    torch.autograd.gradcheck(
        lambda s: torch.func.functional_call(layer, {"stride": s}, (x,)).square().sum(),
        (layer.stride.detach().clone().requires_grad_(),),
    )


def test_a_learned_resolution_crops_what_its_mask_zeroes_and_is_restored():
    torch.manual_seed(0)
    crop = FrequencyCrop([16, 16]).double()
    x = torch.randn(1, 2, 16, 16, dtype=torch.float64)
    for axis, size in zip(crop.frequency_axes, (8, 12), strict=True):
        axis.set_crop(size)
    out = crop(x)
    assert out.shape == (1, 2, 8, 12)
    masked = x
    for d, axis in zip((-2, -1), crop.frequency_axes, strict=True):
        mask = axis.mask().detach()
        masked = resize_axis(masked, d, 16, mask * (mask >= 0.1))
    assert torch.allclose(FrequencyRestore([16, 16])(out), masked, rtol=1e-9, atol=1e-10)


def test_a_signal_that_is_smaller_already_keeps_its_frequencies():
    crop = FrequencyCrop([16])
    crop.frequency_axes[0].set_crop(12)
    assert crop(torch.randn(1, 1, 8)).shape == (1, 1, 8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FrequencyCrop([7]),
        lambda: FrequencyCrop([8])(torch.zeros(1, 1, 5)),
        lambda: FrequencyRestore([9]),
        lambda: DiffStride()(torch.zeros(1, 1, 8, 7)),
        lambda: fourier_resize(torch.zeros(9), [4]),
        lambda: fourier_resize(torch.zeros(8), [3]),
    ],
)
def test_odd_sides_are_refused(make):
    with pytest.raises(ValueError, match=r"a side of \d: the Fourier crop takes even sides. Pad the input to \d+"):
        make()
