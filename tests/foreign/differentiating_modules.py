"""Rules without a backward pass, a classifier whose loss others change, and steps that differentiate."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from foreign_problems import Small
from torch import Tensor, nn

import lightning_bpfree as bpf

WITHOUT_BACKWARD: dict[str, Callable[[], bpf.TrainingRule]] = {
    "forward_gradient": lambda: bpf.ForwardGradient(2),
    "one_direction": lambda: bpf.ForwardGradient(1),
    "zeroth_order": lambda: bpf.ZerothOrder(2),
    "evolution": lambda: bpf.EvolutionStrategy(population_size=8),
    "evolution_snes": lambda: bpf.EvolutionStrategy("snes", population_size=8),
}
every_rule = pytest.mark.parametrize("rule", WITHOUT_BACKWARD)


class Classifier(Small):
    """A small classifier whose loss others change."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3) if net is None else net

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.logits(batch[0]), batch[1])


def smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


# --- derivatives within the step -------------------------------------------------------------------------------------


class Physics(Classifier):
    """The derivative of the network by its input is a part of the loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        u = self.net(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope.sum(1) - u[:, 0]).square().mean()


class SecondDerivative(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        (first,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
        return (second.sum(1) + first[:, 1]).square().mean()


class PenaltyOnParameters(Classifier):
    """The norm of the gradient by the parameters is a part of the loss."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        grads = torch.autograd.grad(loss, list(self.net.parameters()), create_graph=True)
        return loss + sum(grad.square().sum() for grad in grads)


class SwitchesGradientsOn(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            u = self.net(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope.sum(1) - u[:, 0]).square().mean()


class FromTheThirdBatchOn(Physics):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return Classifier.training_step(self, batch, batch_idx) if batch_idx < 2 else super().training_step(batch, 0)


class Functional(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        slope = torch.func.grad(lambda x: self.net(x).sum())(batch[0])
        return (slope.sum(1) - self.net(batch[0])[:, 0]).square().mean()


DERIVATIVES = [
    Physics, SecondDerivative, PenaltyOnParameters, SwitchesGradientsOn, FromTheThirdBatchOn, Functional,
]  # fmt: skip


class AllDirections(pl.Callback):
    """Compares an orthogonal estimate along as many directions as coordinates with the gradient."""

    def setup(self, trainer, pl_module, stage) -> None:
        (rule,) = [callback for callback in trainer.callbacks if isinstance(callback, bpf.TrainingRule)]
        rule.observers.append(self)

    def due(self, trainer) -> bool:
        return True

    def observe(self, trainer, module, step, estimate) -> None:
        found = estimate.resolved()
        with torch.enable_grad():
            params = {slot.name: slot.parameter for slot in step.trained}
            grads = torch.autograd.grad(step.loss(recorded=False), list(params.values()))
        for (name, _), grad in zip(params.items(), grads, strict=True):
            # Equal math in float64, through the inverse of a Gram matrix with a condition number of about 1e3.
            torch.testing.assert_close(found[name].to(grad.dtype), grad, rtol=1e-5, atol=1e-8, msg=name)
