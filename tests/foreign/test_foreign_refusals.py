"""What forward-mode AD cannot do is refused; objectives without a derivative train without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign_problems import (
    RULES,
    DictBatch,
    Slopes,
    Small,
    Wrapped,
    assert_slopes_are_backprops,
    assert_trains,
    compiled,
    language_data,
    vector_data,
    vectors,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import fitted
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf

# --- what forward-mode AD cannot do is refused, and never a zero or a wrong gradient ---------------------------------


class Bagged(Small):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(20, 4), nn.Linear(4, 20)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        words, following = batch
        return F.cross_entropy(self.head(self.bag(words)), following[:, -1])


class Reentrant(DictBatch):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(checkpoint(self.net, x.requires_grad_(), use_reentrant=True), y)


class Square(torch.autograd.Function):
    """An operation as extensions bring it: with a backward pass and no forward derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)


class Extended(DictBatch):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), Squares(), nn.Linear(8, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


def compiled_in_place(layer: nn.Module) -> nn.Module:
    layer.compile(backend="eager")
    return layer


UNSUPPORTED: dict[str, tuple[Callable[[], pl.LightningModule], Callable[[], Any], str, str]] = {
    "embedding_bag": (Bagged, language_data, r"bag \(EmbeddingBag\)", "nn.Embedding"),
    "weight_norm": (
        lambda: Wrapped(nn.utils.parametrizations.weight_norm),
        vector_data,
        r"net\.0 \(ParametrizedLinear\)",
        "remove_parametrizations",
    ),
    "old_weight_norm": (lambda: Wrapped(nn.utils.weight_norm), vector_data, r"net\.0 \(Linear\)", "remove_weight_norm"),
    "spectral_norm": (
        lambda: Wrapped(nn.utils.parametrizations.spectral_norm),
        vector_data,
        r"net\.0 \(ParametrizedLinear\)",
        "remove_parametrizations",
    ),
    "old_spectral_norm": (lambda: Wrapped(nn.utils.spectral_norm), vector_data, r"net\.0 \(Linear\)", "spectral_norm"),
    "compiled": (lambda: Wrapped(compiled), vector_data, r"net\.0 is compiled", "_orig_mod"),
    "compiled_in_place": (lambda: Wrapped(compiled_in_place), vector_data, r"net\.0 is compiled", "ZerothOrder"),
    "reentrant": (Reentrant, vector_data, "use_reentrant=True", "use_reentrant=False"),
    "extension": (Extended, vector_data, r"net\.1 \(Squares\)", "ZerothOrder"),
}


@pytest.mark.parametrize("rule", ["forward_gradient", "one_by_one"])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_layer_is_named_with_its_cure(name, rule):
    make, data, layer, cure = UNSUPPORTED[name]
    module = make()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=layer) as caught:
        fitted(module, data(), RULES[rule]())
    assert cure in str(caught.value)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_layers_train_without_derivatives(name):
    make, data, _, _ = UNSUPPORTED[name]
    assert_trains(make(), data(), bpf.ZerothOrder(2))


@pytest.mark.parametrize("frozen", [False, True])
def test_unsupported_layer_that_does_not_train_is_no_obstacle(frozen):
    module = Bagged()
    module.bag.requires_grad_(not frozen)
    before = module.bag.weight.detach().clone()
    slopes = Slopes()
    rule = bpf.ForwardGradient(2) if frozen else bpf.ForwardGradient(2, params="head.*")
    fitted(module, language_data(), rule, slopes, precision="64-true")
    assert max(slopes.errors) < 1e-10  # equal math in float64
    assert torch.equal(module.bag.weight.float(), before)


class OwnTarget(DictBatch):
    """Learns from its own output, through which no gradient is to flow."""

    def __init__(self, stop: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.stop = stop

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, _ = batch
        return F.mse_loss(self.net(x), self.stop(self.net, x.flip(1)))


@torch.no_grad()
def decorated(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


def in_no_grad(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def copied_in_no_grad(net: nn.Module, x: Tensor) -> Tensor:
    output = net(x)
    memory = torch.zeros_like(output)
    with torch.no_grad():
        memory.mul_(0.9)
        memory.copy_(output)
    return memory


def in_grad_disabled(net: nn.Module, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        return net(x)


STOPS = [lambda net, x: net(x).detach(), decorated, in_no_grad, copied_in_no_grad, in_grad_disabled]


@pytest.mark.parametrize("rule", ["forward_gradient", "one_by_one"])
@pytest.mark.parametrize("stop", STOPS, ids=["detach", "decorated", "no_grad", "copied", "grad_disabled"])
def test_stopped_gradients_stop_tangents(stop, rule):
    assert_slopes_are_backprops(OwnTarget(stop), vector_data(), rule)


@pytest.mark.parametrize("rule", ["backprop", *RULES])
def test_manual_optimization_is_refused(rule):
    class Adversarial(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.discriminator = nn.Linear(2, 6), nn.Linear(6, 1)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            x, _ = batch
            generator, discriminator = self.optimizers()
            fake = self.generator(torch.randn(len(x), 2))
            loss = F.softplus(self.discriminator(fake.detach())).mean() + F.softplus(-self.discriminator(x)).mean()
            discriminator.zero_grad()
            self.manual_backward(loss)
            discriminator.step()
            generator.zero_grad()
            self.manual_backward(F.softplus(-self.discriminator(fake)).mean())
            generator.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.discriminator)]

    made = bpf.Backprop() if rule == "backprop" else RULES[rule]()
    with pytest.raises(MisconfigurationException, match="Adversarial sets automatic_optimization=False") as caught:
        fitted(Adversarial(), vector_data(), made)
    assert "lightning_bpfree.functional" in str(caught.value)


# --- objectives without a derivative ---------------------------------------------------------------------------------


class Accuracy(Small):
    """Maximizes the accuracy itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y = batch
        return 1 - (self.net(x).argmax(1) == y).double().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class InNumPy(Accuracy):
    """Computes its loss outside of torch, and returns a Python float."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> float:
        x, y = (tensor.detach().numpy() for tensor in batch)
        logits = x @ self.net.weight.detach().numpy().T + self.net.bias.detach().numpy()
        right = np.take_along_axis(logits, y[:, None], 1)
        return float(np.maximum(0, 1 + logits - right).mean())


@pytest.mark.parametrize("module", [Accuracy, InNumPy])
def test_objective_without_derivative_trains(module):
    x, y = vectors(64)
    data = DataLoader(TensorDataset(x, y), batch_size=64)
    model = module()

    def accuracy() -> float:
        return float((model.net(x).argmax(1) == y).float().mean())

    before = accuracy()
    # A wide sigma, for the accuracy is flat within a narrow one.
    fitted(model, data, bpf.ZerothOrder(8, sigma=0.1), max_epochs=60)
    assert accuracy() > before + 0.3


@pytest.mark.parametrize("rule", ["forward_gradient", "one_by_one"])
@pytest.mark.parametrize("module", [Accuracy, InNumPy])
def test_objective_without_derivative_has_no_forward_gradient(module, rule):
    model = module()
    before = model.net.weight.detach().clone()
    with pytest.raises(MisconfigurationException, match="No tangent arrives at the loss") as caught:
        fitted(model, vector_data(), RULES[rule]())
    assert "ZerothOrder()" in str(caught.value)
    assert torch.equal(model.net.weight, before)
