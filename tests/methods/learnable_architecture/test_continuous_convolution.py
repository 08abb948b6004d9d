"""Continuous convolutions and the CCNN."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F

import lightning_bpfree as bpf
from lightning_bpfree.methods.learnable_architecture.continuous import convolution


@pytest.mark.parametrize(("dims", "causal"), [(1, False), (1, True), (2, False)])
def test_large_kernels_go_through_the_fourier_domain_and_stay_the_same(dims, causal, monkeypatch):
    torch.manual_seed(0)
    conv = bpf.ContinuousConv(2, 65, dims, spread=2.0, causal=causal).double()
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(1, 2, *[24] * dims, dtype=torch.float64)
    by_fft = conv(x)
    assert min(conv.kernel().shape[2:]) > convolution.FFT_FROM
    monkeypatch.setattr(convolution, "FFT_FROM", 1000)
    assert torch.allclose(by_fft, conv(x), rtol=1e-9, atol=1e-10)


def test_a_causal_convolution_looks_back_only():
    torch.manual_seed(0)
    conv = bpf.ContinuousConv(1, 9, 1, spread=0.8, causal=True)
    x = torch.randn(1, 1, 20)
    changed = x.clone()
    changed[..., 10:] += 1
    assert torch.equal(conv(x)[..., :10], conv(changed)[..., :10])
    assert not torch.equal(conv(x)[..., 10], conv(changed)[..., 10])


def test_weights_are_final_before_the_first_call():
    torch.manual_seed(0)
    conv = bpf.ContinuousConv(4, 33)
    before = copy.deepcopy(conv.state_dict())
    first, second = conv(torch.ones(1, 4, 8, 8)), conv(torch.ones(1, 4, 8, 8))
    assert torch.equal(first, second)
    assert all(torch.equal(before[name], value) for name, value in conv.state_dict().items())
    other = bpf.ContinuousConv(4, 33)
    other.load_state_dict(before)
    assert torch.equal(other(torch.ones(1, 4, 8, 8)), first)


def test_the_small_network_is_scaled_by_the_taps_of_the_first_crop():
    torch.manual_seed(0)
    five = bpf.ContinuousConv(64, 33, spread=0.075)
    torch.manual_seed(0)
    all_taps = bpf.ContinuousConv(64, 33, spread=0.075)
    torch.manual_seed(0)
    generator = convolution.MAGNet(2, 64, spread=0.075, omega=10.0)
    assert torch.allclose(five.generator.out.weight, generator.out.weight / 5)  # 5 x 5 of 33 x 33
    assert torch.equal(five.generator.out.weight, all_taps.generator.out.weight)


def test_the_same_weights_give_close_outputs_at_twice_the_resolution():
    torch.manual_seed(0)
    conv = bpf.ContinuousConv(1, 17, 1, spread=0.3, omega=0.2, bias=False).double()
    t = torch.arange(64, dtype=torch.float64) / 64
    x = torch.stack([torch.sin(2 * torch.pi * 2 * t), torch.cos(2 * torch.pi * 3 * t)]).unsqueeze(1)
    fine = bpf.functional.fourier_resize(x, [128])
    low = conv(x)[..., 10:-10]
    kernel = conv.kernel(scale=2)
    high = F.conv1d(fine, kernel, padding=kernel.shape[-1] // 2)[..., ::2][..., 10:-10]
    # A sum over taps approximates an integral: the error is of the second order in their distance, and the end taps,
    # at the mask's threshold, count half.
    assert (low - high).abs().max() < 0.12 * low.abs().max()
    unscaled = F.conv1d(fine, 2 * kernel, padding=kernel.shape[-1] // 2)[..., ::2][..., 10:-10]
    assert (low - unscaled).abs().max() > 0.5 * low.abs().max()


@pytest.mark.parametrize("kwargs", [{"dense": True}, {"dense": False}, {"crops": False}])
@pytest.mark.parametrize("in_shape", [(2, 8, 8), (2, 16)])
def test_one_network_for_sequences_and_images(in_shape, kwargs):
    torch.manual_seed(0)
    net = bpf.CCNN(in_shape, 3, width=4, blocks=2, **kwargs)
    out = net(torch.randn(2, *in_shape))
    assert out.shape == ((2, 3, *in_shape[1:]) if kwargs.get("dense") else (2, 3))
    out.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bpf.ContinuousConv(4, 8), "max_kernel=8: give an odd number"),
        (lambda: bpf.ContinuousConv(4, 9, 2, causal=True), "causal=True with dims=2: images have no order"),
        (lambda: bpf.CCNN((1, 8, 8, 8)), "in_shape=(1, 8, 8, 8): give channels and one or two sides"),
        (lambda: bpf.CCNN((1, 7, 8)), "a side of 7: the Fourier crop takes even sides"),
        (lambda: bpf.CCNN((1, 8, 8))(torch.zeros(1, 1, 8, 6)), "built for inputs of shape ('B', 1, 8, 8)"),
        (lambda: bpf.DiffStride((1.0, 2.0), dims=1), "give one number, or 1, for dims=1"),
    ],
)
def test_bad_sizes_are_named(make, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make()
