"""Modules, batches and a plain implementation of REINFORCE for the tests of TeamReinforce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from problems import Problem, loader
from torch import Tensor, nn

import lightning_bpfree as bpf
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.core.step import Step
from lightning_bpfree.demos.modules import MLP
from lightning_bpfree.demos.regression import Regressor
from lightning_bpfree.training.module_state import ModuleState

EXACT = 1e-12  # float64, sums of some dozens of numbers of size 1


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Plain(pl.LightningModule):
    """Cross-entropy of a network; logs nothing, so that a step can be made without a Trainer."""

    def __init__(self, net: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Validated(Problem):
    """Validates too."""

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    test_step = validation_step


def problem(*widths: int, lr: float = 0.0, seed: int = 0, kind: type[Problem] = Problem) -> Any:
    torch.manual_seed(seed)
    return kind(MLP(6, widths or (8, 8), 3), lr=lr)


def validated(**settings: Any) -> Validated:
    module: Validated = problem(kind=Validated, **settings)
    return module


def trained(module: pl.LightningModule, *callbacks: pl.Callback, val: Any = None, **settings: Any) -> pl.Trainer:
    """Fit with a loader for validation."""
    options = {"max_epochs": 1, "limit_val_batches": 0 if val is None else 1.0}
    trainer = pl.Trainer(callbacks=list(callbacks), **{**QUIET, **options, **settings})
    trainer.fit(module, loader(), loader() if val is None else val)
    return trainer


def vectors(rows: int = 8, features: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(rows, features, generator=generator, dtype=dtype), torch.arange(rows) % 3


def estimate(rule: bpf.TeamReinforce, module: pl.LightningModule, batch: Any, seed: int = 3) -> dict[str, Tensor]:
    """Return what the rule makes of a batch: ascent directions by name."""
    rule.install(module)
    view = ModuleState(module, None)
    replay = view.replay()
    step = Step(
        module,
        lambda batch: module.training_step(batch, 0),
        view.slots,
        seed,
        args=(batch,),
        replay=replay,
        quiet=view.quiet,
    )
    try:
        made = rule.estimate(step).resolved()
        rule.on_batch_settled(True)  # as in a fit, when no rank has failed
        return {name: -gradient for name, gradient in made.items()}
    finally:
        step.finish()


def flat(gradients: Any) -> Tensor:
    several = gradients.values() if isinstance(gradients, dict) else gradients
    return torch.cat([gradient.flatten() for gradient in several])


class ByHand:
    """REINFORCE written down plainly: draws in the order of the layers, and autograd of the weighted log probability.

    Args:
        segments: what leads to the potentials of every layer of units, and to the output.
        units: of the layers.
        output: what acts.
        samples: draws of each input.
        seed: of the step.
    """

    def __init__(
        self,
        segments: Sequence[Callable[[Tensor], Tensor]],
        units: Sequence[bpf.Bernoulli | bpf.Gaussian],
        output: Any = None,
        samples: int = 4,
        seed: int = 3,
    ) -> None:
        self.segments, self.units, self.samples, self.seed = segments, units, samples, seed
        self.output = bpf.Softmax() if output is None else output

    def run(self, x: Tensor) -> ByHand:
        generator = torch.Generator().manual_seed(mix(self.seed, 0))
        below = x.repeat(self.samples, *[1] * (x.dim() - 1))
        self.log_prob, self.values = torch.zeros(len(below), dtype=x.dtype), []
        for segment, unit in zip(self.segments, self.units, strict=False):
            potential = segment(below)
            below = unit.sample(potential.detach(), generator)
            self.values.append(below)
            self.log_prob = self.log_prob + unit.log_prob(potential, below)
        self.last = self.segments[-1](below)
        self.action = self.output.sample(self.last.detach(), generator)
        return self

    def gradients(self, parameters: Sequence[Tensor], advantage: Tensor) -> list[Tensor]:
        total = self.log_prob + self.output.log_prob(self.last, self.action)
        return list(torch.autograd.grad((advantage * total).mean(), list(parameters)))


def rewards_of_classes(hand: ByHand, labels: Tensor) -> Tensor:
    return 2 * (hand.action.argmax(1) == labels.repeat(hand.samples)).double() - 1


def advantages(rewards: Tensor, samples: int) -> Tensor:
    """Each reward minus the mean of the others of its input, written as a loop."""
    table = rewards.view(samples, -1)
    rows = []
    for m in range(samples):
        others = [table[n] for n in range(samples) if n != m]
        rows.append(table[m] - torch.stack(others).mean(0))
    return torch.stack(rows).flatten()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance)
        assert gradient.any(), f"{name}: nothing was compared"


def untouched(net: nn.Module) -> bool:
    return not any("forward" in part.__dict__ or part._forward_hooks for part in net.modules())


def images(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 1, 8, 8, generator=generator, dtype=dtype), torch.arange(6) % 3


class Regresses(Plain):
    """The reward is a method of the module."""

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])

    reward = Regressor.reward


def targets(x: Tensor) -> Tensor:
    return x[:, :1] * x[:, 1:2]


class Acts(Plain):
    """Draws its action itself, and returns what it is rewarded with."""

    def __init__(self, net: nn.Module, rewards: Tensor, done: Tensor | None = None, output: Any = None) -> None:
        super().__init__(net)
        self.rewards, self.done, self.output = rewards, done, output or bpf.Softmax()
        self.actions: list[Tensor] = []
        self.noise = torch.Generator().manual_seed(8)

    def training_step(self, batch, batch_idx):
        scores = self.net(batch[0])
        self.actions.append(self.output.sample(scores, self.noise))
        action = self.actions[-1]
        if isinstance(self.output, bpf.Softmax):
            action = action.argmax(1)
        returned = {"loss": scores.square().mean(), "action": action, "reward": self.rewards}
        return returned if self.done is None else {**returned, "done": self.done}


class Between(nn.Module):
    """More than a linear layer between two layers of units."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)
        )

    def forward(self, x):
        return self.net(x)
