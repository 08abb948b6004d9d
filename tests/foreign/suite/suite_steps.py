"""Training steps that compute, differentiate or return in unusual ways."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from suite_base import CLASSES, FEATURES, Foreign, case, loader, mlp, table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@case
class ReturnsADict(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        logits = self.net(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits.detach(), "names": ["a"]}


@case
class ReturnsNone(Foreign):
    """Leaves out every second batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 1 else self.loss(*batch)


@case
class ReturnsOneElement(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(*batch).reshape(1)


@case
class ReturnsAVector(Foreign):
    """One loss a row, which plain Lightning refuses to differentiate."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")


@case
class Underscore(Foreign):
    """The index has another name."""

    def training_step(self, batch: Any, _: int) -> Any:
        return self.loss(*batch)


@case
class OnlyTheBatch(Foreign):
    def training_step(self, rows: Any) -> Any:
        return self.loss(*rows)


@case
class AnyArguments(Foreign):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert args[1:] == (self.trainer.fit_loop.batch_idx,)
        assert not kwargs
        return self.loss(*args[0])


@case
class DataloaderIter(Foreign):
    def training_step(self, dataloader_iter: Any) -> Any:
        batch, _, _ = next(dataloader_iter)
        return self.loss(*batch)


@case
class GradientPenalty(Foreign):
    """Differentiates its loss by the inputs, and penalizes the norm."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = x.clone().requires_grad_()
        loss = self.loss(x, y)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + (slope.norm(dim=1) - 1).square().mean()


@case
class Physics(Foreign):
    """A network informed by physics: second derivatives by its inputs."""

    def prepare(self) -> None:
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        points = batch[0][:, :2].clone().requires_grad_()
        u = self.net(points).sum()
        (first,) = torch.autograd.grad(u, points, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)
        return (first[:, 1] - 0.1 * second[:, 0]).square().mean() + self.net(points[:1]).square().mean()


@case
class Forces(Foreign):
    """A force field: an energy, and its derivative compared with data."""

    def prepare(self) -> None:
        self.net = nn.Sequential(nn.Linear(FEATURES, 5), nn.SiLU(), nn.Linear(5, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.enable_grad():
            x = batch[0].detach().requires_grad_()
            energy = self.net(x)
            forces = -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]
        return energy.square().mean() + F.mse_loss(forces, batch[0].flip(1))


@case
class Adversarial(Foreign):
    """Attacks its own inputs in one step of the sign."""

    rough = True  # finite differences see through what stops gradients

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.loss(x, y), x)
        return self.loss((x + 0.1 * slope.sign()).detach(), y)


@case
class InnerBackward(Foreign):
    """Saliency by `backward()` in the step, whose gradients pile up in the inputs if they are let."""

    rough = True  # finite differences see through what stops gradients

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x.requires_grad_()
        self.loss(x, y).backward(inputs=[x])
        saliency = x.grad.abs()
        return self.loss(x.detach() * (1 + saliency), y)


@case
class PenaltyOnWeights(Foreign):
    """Differentiates by its own parameters, as meta-learning does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        weights = dict(self.net.named_parameters())
        inner = torch.autograd.grad(self.loss(x[:2], y[:2]), list(weights.values()), create_graph=True)
        adapted = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), inner, strict=True)}
        return F.cross_entropy(torch.func.functional_call(self.net, adapted, (x[2:],)), y[2:])


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


@case
class Reversal(Foreign):
    """Adversarial adaptation to a domain, by gradient reversal."""

    def prepare(self) -> None:
        self.domain = nn.Linear(CLASSES, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        return F.cross_entropy(logits, y) + F.cross_entropy(self.domain(_Reverse.apply(logits)), (y > 0).long())


@case
class HookInTheStep(Foreign):
    """Scales a gradient on its way back."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.net[1](self.net[0](batch[0]))
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * 0.1)
        return F.cross_entropy(self.net[2](hidden), batch[1])


@case
class Surrogate(Foreign):
    """Spikes: a step forward, a smooth derivative backward."""

    rough = True  # finite differences see through what stops gradients

    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return (x > 0).to(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad / (1 + x.abs()).square()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net[2](self.Spike.apply(self.net[0](x))), y)


@case
class Checkpointed(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(checkpoint(self.net, batch[0], use_reentrant=False), batch[1])


@case
class AutocastInside(Foreign):
    """Computes in half precision by itself, whatever the Trainer says."""

    settings = {"precision": "32-true"}  # noqa: RUF012
    digits = 1e-2

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.net(batch[0])
        return F.cross_entropy(logits.float(), batch[1])


@case
class Branches(Foreign):
    """Looks at numbers, and goes one way or the other."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        if loss.item() > 1.2 or any(row.max().item() > 0 for row in logits):
            loss = loss + 0.1 * logits.square().mean()
        self.log("loss", loss.item())
        return loss


@case
class Variational(Foreign):
    """An autoencoder that draws."""

    def prepare(self) -> None:
        self.net, self.decoder = nn.Linear(FEATURES, 4), nn.Linear(2, FEATURES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean, log_std = self.net(batch[0]).chunk(2, 1)
        posterior = torch.distributions.Normal(mean, log_std.exp())
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        kl = torch.distributions.kl_divergence(posterior, prior).sum(1).mean()
        return F.mse_loss(self.decoder(posterior.rsample()), batch[0]) + 0.1 * kl


@case
class ScoreFunction(Foreign):
    """A policy's draw, and its logarithm times the reward."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        policy = torch.distributions.Categorical(logits=self.net(x))
        action = policy.sample()
        return -(policy.log_prob(action) * (action == y).to(x)).mean()


@case
class Contrastive(Foreign):
    """Two views through one network, each the other's label."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        views = [F.normalize(self.net(F.dropout(x, 0.2)), dim=1) for _ in range(2)]
        logits = views[0] @ views[1].T / 0.5
        labels = torch.arange(len(x))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@case
class Siamese(Foreign):
    """No gradient through one of two branches."""

    rough = True  # finite differences see through what stops gradients

    def prepare(self) -> None:
        self.predictor = nn.Linear(CLASSES, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        target = self.net(x.flip(1)).detach()
        return -F.cosine_similarity(self.predictor(self.net(x)), target).mean()


@case
class Transducer(Foreign):
    """A loss for sequences, which torch computes by itself."""

    def prepare(self) -> None:
        self.net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        log_probs = self.net(x.unsqueeze(-1)).log_softmax(-1).transpose(0, 1)
        sizes = torch.full((len(x),), FEATURES)
        return F.ctc_loss(log_probs, (y + 1).unsqueeze(1), sizes, torch.ones(len(x), dtype=torch.long))


@case
class Margin(Foreign):
    """Angles to rows of a weight, with a margin."""

    def prepare(self) -> None:
        self.rows = nn.Parameter(torch.randn(CLASSES, CLASSES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        cosines = F.linear(F.normalize(self.net(x)), F.normalize(self.rows)).clamp(-0.99, 0.99)
        moved = torch.cos(cosines.acos() + 0.2 * F.one_hot(y, CLASSES))
        return F.cross_entropy(moved * 4, y)


@case
class Outside(Foreign):
    """A loss from NumPy, without a graph."""

    beyond_backprop = True

    def training_step(self, batch: Any, batch_idx: int) -> float:
        x, y = (t.detach().numpy() for t in batch)
        with torch.no_grad():
            logits = self.net(batch[0]).numpy()
        return float(np.maximum(0, 1 + logits - np.take_along_axis(logits, y[:, None], 1)).mean() + 0 * x.sum())


@case
class ManualGan(Foreign):
    """Two optimizers, by hand."""

    def prepare(self) -> None:
        self.automatic_optimization = False
        self.critic = nn.Linear(FEATURES, 1)
        self.net = nn.Linear(2, FEATURES)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, critic = self.optimizers()
        fake = self.net(torch.randn(len(batch[0]), 2))
        for optimizer, loss in (
            (critic, F.softplus(self.critic(fake.detach())).mean() + F.softplus(-self.critic(batch[0])).mean()),
            (generator, F.softplus(-self.critic(fake)).mean()),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net, self.critic)]


@case
class TwoOptimizers(Foreign):
    """Two optimizers and no manual optimization: Lightning itself refuses."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]


@case
class ClampsItsWeights(Foreign):
    """Clips weights in the step, as the first Wasserstein critics did."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for parameter in self.net.parameters():
            parameter.data.clamp_(-0.2, 0.2)
        return self.loss(*batch)


@case
class FreezesInTheStep(Foreign):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.net[0].requires_grad_(False)
        return self.loss(*batch)


@case
class OwnSeed(Foreign):
    """Sets the seed in the step, and goes on with the stream behind it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            noise = torch.randn_like(batch[0])
        return self.loss(batch[0] + noise * torch.rand(()), batch[1])


@case
class Nested(Foreign):
    """A LightningModule within another, whose own step is called."""

    class Inner(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(4)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    def prepare(self) -> None:
        self.net = self.Inner()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net.training_step(batch, batch_idx)


@case
class NetworkTwice(Foreign):
    """Calls its network once for each half of the batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(x[:2], y[:2]) + self.loss(x[2:], y[2:])


@case
class TargetsOfNumbers(Foreign):
    """Regression: labels that are no classes."""

    def prepare(self) -> None:
        self.net = nn.Sequential(nn.Linear(FEATURES, 5), nn.ReLU(), nn.Linear(5, 1))

    def train_dataloader(self) -> Any:
        x, _ = table()
        return loader(x, x.sum(1, keepdim=True))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.huber_loss(self.net(batch[0]), batch[1])
