"""Regression on fresh Gaussian inputs to imitate a random network; the reward is the negative squared error.

After the scalar regression of S. Chung, "MAP propagation algorithm: faster learning with a team of reinforcement
learning agents", NeurIPS 2021, arXiv 2010.07893, where networks with 64 and 32 hidden units learn in batches of 128.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_bpfree.core.arguments import PositiveFloat, PositiveInt, Seed32, check_arguments, checked
from lightning_bpfree.demos.fresh import Batch, FreshDataModule

__all__ = ["RandomNetDataModule", "Regressor"]

_HIDDEN = 8
_PROBES = 4096  # inputs by which it is judged whether a target network says enough


class RandomNetDataModule(FreshDataModule):
    """Standard Gaussian inputs, and the outputs of a fixed random network for them.

    Batches are pairs, both float32: inputs of shape (B, in_features), independent standard normal; targets of shape
    (B, 1), at least 0: ``relu(relu(x @ W) @ v)``, with 8 hidden units and no biases. `W` and `v` are uniform within
    Glorot's bounds, ``sqrt(6 / (inputs + outputs))``. The outer ReLU would set most outputs of many such networks to 0,
    so networks are drawn from a generator seeded by `target_seed` until one gives a positive target for at least half
    of 4,096 inputs.

    Training batches are new in every epoch, and ``seed_everything`` determines them. Inputs for validation and test are
    the same in every run.

    Args:
        in_features: Numbers in an input, at least 1.
        batch_size: Samples per training batch, at least 1.
        batches_per_epoch: Training batches per epoch, at least 1, over all devices.
        eval_samples: Samples for validation, and as many others for the test; at least 1.
        target_seed: Determines the target network completely; 0 to 2**32 - 1.

    Attributes:
        weights: `W`, shape (in_features, 8), and `v`, shape (8, 1).

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> x, y = next(iter(RandomNetDataModule(batch_size=5).train_dataloader()))
        >>> tuple(x.shape), tuple(y.shape)
        ((5, 8), (5, 1))
    """

    @checked
    def __init__(
        self,
        in_features: PositiveInt = 8,
        batch_size: PositiveInt = 32,
        batches_per_epoch: PositiveInt = 500,
        eval_samples: PositiveInt = 4096,
        target_seed: Seed32 = 0,
    ) -> None:
        super().__init__(batch_size, batches_per_epoch, eval_samples)
        self.in_features, self.target_seed = in_features, target_seed
        self.weights = self._draw_weights(np.random.RandomState(target_seed))

    def _draw_weights(self, state: np.random.RandomState) -> tuple[Tensor, Tensor]:
        probes = torch.from_numpy(state.standard_normal((_PROBES, self.in_features))).float()
        while True:
            weights = tuple(
                torch.from_numpy(state.uniform(-1, 1, shape) * math.sqrt(6 / sum(shape))).float()
                for shape in ((self.in_features, _HIDDEN), (_HIDDEN, 1))
            )
            self.weights = weights[0], weights[1]
            if (self.target(probes) > 0).float().mean() >= 0.5:
                return self.weights

    def target(self, inputs: Tensor) -> Tensor:
        """The targets, shape (B, 1), of inputs of shape (B, in_features)."""
        inner, outer = (weight.to(inputs) for weight in self.weights)
        return torch.relu(torch.relu(inputs @ inner) @ outer)

    def draw(self, num: int, state: np.random.RandomState) -> Batch:
        """The given number of inputs, and their targets."""
        inputs = torch.from_numpy(state.standard_normal((num, self.in_features))).float()
        return inputs, self.target(inputs)


class Regressor(LightningModule):
    """Least squares with any network, and the reward of sampled outputs.

    Batches are pairs (inputs, targets), targets float of shape (B, 1). Logs, as means over the epoch, the mean squared
    error: ``train_loss``, ``val_loss`` and ``test_loss``.

    Args:
        net: Network from inputs to outputs of shape (B, 1).
        lr: Learning rate, above 0.
        optimizer: ``sgd`` or ``adam``.

    Raises:
        ValueError: An argument is out of range; from the first batch, if the output of `net` has another shape than the
            targets.

    Example:
        >>> batch = torch.zeros(2, 3), torch.tensor([[1.0], [2.0]])
        >>> Regressor(nn.Linear(3, 1)).reward(batch, torch.tensor([[1.0], [1.0], [4.0], [2.0]]))
        tensor([-0., -1., -9., -0.])
    """

    def __init__(self, net: nn.Module, lr: PositiveFloat = 0.01, optimizer: Literal["sgd", "adam"] = "sgd") -> None:
        check_arguments(Regressor, locals())
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, shape (B, 1)."""
        outputs: Tensor = self.net(x)
        return outputs

    def reward(self, batch: tuple[Tensor, Tensor], action: Tensor) -> Tensor:
        """The negative squared error of each row, shape (M * B,).

        Args:
            batch: Inputs and targets, of which the targets, shape (B, 1), are used.
            action: Outputs for M concatenated copies of the batch, shape (M * B, 1): row m * B + b is an output
                for sample b.

        Raises:
            ValueError: The number of rows is not M times that of the batch, or a row has several numbers.
        """
        targets = batch[1]
        if action.dim() != 2 or action.shape[1] != 1 or not len(action) or len(action) % len(targets):
            raise ValueError(
                f"action has shape {tuple(action.shape)}; for a batch of {len(targets)} samples give one number a row, "
                f"and {len(targets)} rows for each copy of the batch."
            )
        copies = len(action) // len(targets)
        return -(action - targets.repeat(copies, 1)).square().squeeze(1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean squared error of the batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val_loss``."""
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test_loss``."""
        self._step(batch, "test")

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        x, y = batch
        outputs = self(x)
        if outputs.shape != y.shape:
            raise ValueError(
                f"net gives outputs of shape {tuple(outputs.shape)} for targets of shape {tuple(y.shape)}; build it "
                "with an output of 1."
            )
        loss = F.mse_loss(outputs, y)
        log = functools.partial(self.log, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        log(f"{stage}_loss", loss.detach(), batch_size=len(y))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer."""
        kind = torch.optim.SGD if self.hparams["optimizer"] == "sgd" else torch.optim.Adam
        return kind(self.parameters(), lr=self.hparams["lr"])
