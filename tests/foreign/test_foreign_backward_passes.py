"""What only a backward pass would run is refused; hooks on parameters get the estimate."""

from __future__ import annotations

import pytest
import torch
from differentiating_modules import (
    WITHOUT_BACKWARD,
    Classifier,
    every_rule,
)
from foreign_problems import vector_data
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import fitted
from thinned import in_turn
from torch import Tensor

import lightning_bpfree as bpf

# --- what only a backward pass would run -----------------------------------------------------------------------------


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float = 1.0) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return -ctx.factor * grad, None


reverse = Reverse.apply  # as people keep it


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.clamp(-1e-3, 1e-3)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class Reverses(Classifier):
    def logits(self, x):
        return Reverse.apply(self.net(x))


class ReversesByAnotherName(Classifier):
    def logits(self, x):
        return reverse(self.net(x), 0.5)


class Clips(Classifier):
    def logits(self, x):
        return Clipped.apply(self.net(x))


class HooksOutputs(Classifier):
    def logits(self, x):
        y = self.net(x)
        y.register_hook(lambda grad: -grad)
        return y


class HooksWhereItCan(Classifier):
    def logits(self, x):
        y = self.net(x)
        if y.requires_grad:
            y.register_hook(lambda grad: -grad)
        return y


class HooksWeightsInTheStep(Classifier):
    def logits(self, x):
        self.net.weight.register_hook(lambda grad: -grad)
        return self.net(x)


class Retains(Classifier):
    def logits(self, x):
        self.kept = self.net(x)
        self.kept.retain_grad()
        return self.kept


class HookedLayer(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net.register_full_backward_hook(lambda *_: None)


class HookedBefore(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net.register_full_backward_pre_hook(lambda *_: None)


IGNORED = {
    Reverses: "Reverse", ReversesByAnotherName: "Reverse", Clips: "Clipped", HooksOutputs: "register_hook",
    HooksWhereItCan: "register_hook", HooksWeightsInTheStep: "register_hook", Retains: "retain_grad",
    HookedLayer: "net", HookedBefore: "net",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(("kind", "rule"), in_turn(IGNORED, WITHOUT_BACKWARD, fast=1))
def test_what_a_backward_pass_would_run_is_refused_with_the_cure(kind, rule):
    module = kind()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=rf"{IGNORED[kind]}(.|\n)*Backprop\(\)"):
        fitted(module, vector_data(), WITHOUT_BACKWARD[rule]())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.Tensor.register_hook.__module__ == "torch._tensor"  # the watch has ended
    assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)
    fitted(module, vector_data(), bpf.Backprop())


class Squares(Classifier):
    def logits(self, x):
        return Square.apply(self.net(x))


class Rounds(Classifier):
    def logits(self, x):
        return Rounded.apply(self.net(x))


@pytest.mark.parametrize("rule", ["zeroth_order", "evolution"])
@pytest.mark.parametrize("kind", [Squares, Rounds])
def test_an_honest_backward_pass_and_a_surrogate_are_let_through(kind, rule):
    module = kind()
    before = module.net.weight.detach().clone()
    rules = {"zeroth_order": bpf.ZerothOrder(8, sigma=0.1), "evolution": bpf.EvolutionStrategy(population_size=8)}
    fitted(module, vector_data(), rules[rule])
    assert not torch.equal(before, module.net.weight)


@every_rule
def test_hooks_on_parameters_get_the_estimate(rule):
    torch.manual_seed(0)
    module = Classifier()
    half = module.net.weight[:, :3].detach().clone()
    module.net.weight.register_hook(lambda grad: torch.cat([torch.zeros(3, 3), grad[:, 3:]], 1))
    other = module.net.weight[:, 3:].detach().clone()
    fitted(module, vector_data(), WITHOUT_BACKWARD[rule]())
    assert torch.equal(module.net.weight[:, :3], half)
    assert not torch.equal(module.net.weight[:, 3:], other)
