"""Modules of a rule's own: made from a seed, trained by means of gradients, saved before and after they are made."""

import io

import pytest
import torch
from torch import nn

from lightning_bpfree.core.auxiliary_modules import AuxiliaryModules, made

CPU = torch.device("cpu")


def linear():
    return nn.Linear(3, 2)


def stepped(own, times=1, seed=0):
    module = own.get("head", linear, seed, CPU)
    for _ in range(times):
        own.add_gradients("head", [torch.randn(2, 3), torch.randn(2)])
        own.step()
    return module


def test_a_start_is_a_function_of_the_seed_and_moves_no_stream():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    one, two, other = made(linear, 5, CPU), made(linear, 5, CPU), made(linear, 6, CPU)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, other.weight)
    assert not one.training
    assert made(linear, 5, CPU, torch.float64).weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_start_does_not_depend_on_the_default_type(dtype):
    plain = made(linear, 5, CPU)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(made(linear, 5, CPU).weight, plain.weight)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_micro_batches_count_as_their_mean(optimizer):
    one, two = AuxiliaryModules(optimizer, lr=0.1), AuxiliaryModules(optimizer, lr=0.1)
    a, b = (own.get("head", linear, 0, CPU) for own in (one, two))
    for _ in range(3):
        first, second = ([torch.randn(2, 3), torch.randn(2)] for _ in range(2))
        one.add_gradients("head", first)
        one.add_gradients("head", second)
        two.add_gradients("head", [(x + y) / 2 for x, y in zip(first, second, strict=True)])
        one.step()
        two.step()
    assert torch.equal(a.weight, b.weight)
    assert all(p.grad is None for p in a.parameters())


def test_without_gradients_nothing_moves_and_none_counts_as_zero():
    own = AuxiliaryModules(lr=0.1)
    module = own.get("head", linear, 0, CPU)
    before = module.weight.clone(), module.bias.clone()
    own.step()
    own.add_gradients("head", [None, torch.ones(2)])
    own.add_gradients("head", [None, torch.ones(2)])
    own.step()
    assert torch.equal(module.weight, before[0])
    assert not torch.equal(module.bias, before[1])
    after = module.bias.clone()
    own.step()  # what was added is forgotten
    assert torch.equal(module.bias, after)


def test_ranks_are_averaged_by_the_function_given():
    own = AuxiliaryModules("sgd", lr=1.0)
    module = own.get("head", linear, 0, CPU)
    before = module.weight.detach().clone()
    own.add_gradients("head", [torch.ones(2, 3), None])
    own.step(reduce=lambda gradient: gradient * 0.5)
    torch.testing.assert_close(before - module.weight.detach(), torch.full((2, 3), 0.5))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_saved_and_loaded_before_the_module_is_made_it_goes_on_bit_for_bit(optimizer):
    torch.manual_seed(0)
    whole = AuxiliaryModules(optimizer, lr=0.1)
    stepped(whole, 3)
    buffer = io.BytesIO()
    torch.save(whole.state_dict(), buffer)
    buffer.seek(0)
    again = AuxiliaryModules(optimizer, lr=0.1)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert "head" not in again
    assert again.state_dict().keys() == {"head"}  # a checkpoint before the first batch keeps what was loaded
    streams = torch.get_rng_state()
    one = stepped(whole, 2)
    torch.set_rng_state(streams)
    two = stepped(again, 2, seed=99)
    assert torch.equal(one.weight, two.weight)


def test_a_state_is_a_copy():
    own = AuxiliaryModules(lr=0.1)
    stepped(own)
    state = own.state_dict()
    kept = state["head"]["module"]["weight"].clone()
    stepped(own)
    assert torch.equal(state["head"]["module"]["weight"], kept)


def test_a_module_that_is_needed_in_another_type_keeps_its_state():
    own = AuxiliaryModules(lr=0.1)
    single = stepped(own, 2)
    double = own.get("head", linear, 0, CPU, torch.float64)
    assert double.weight.dtype == torch.float64
    torch.testing.assert_close(double.weight.float(), single.weight)
    assert own.state_dict()["head"]["optimizer"]["state"][0]["exp_avg"].dtype == torch.float64


def test_errors_name_the_cure():
    with pytest.raises(ValueError, match="optimizer='adamw': choose"):
        AuxiliaryModules("adamw")
    with pytest.raises(ValueError, match=r"lr=0: .*positive"):
        AuxiliaryModules(lr=0)
    own, other = AuxiliaryModules(), AuxiliaryModules()
    stepped(own)
    other.load_state_dict(own.state_dict())
    with pytest.raises(ValueError, match=r"checkpoint's head does not fit.*arguments"):
        other.get("head", lambda: nn.Linear(4, 2), 0, CPU)
