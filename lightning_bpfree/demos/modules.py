"""A classifier that wraps any network, and three small networks for it.

Nothing here depends on training rules: `Classifier` is an ordinary LightningModule with automatic optimization.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_bpfree.core.arguments import (
    AtLeastTwo,
    Fraction,
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    check_arguments,
)
from lightning_bpfree.demos.nets import MLP, SmallCNN, SmallTransformer
from lightning_bpfree.training.trainer_attributes import is_dry_run

__all__ = ["MLP", "Classifier", "SmallCNN", "SmallTransformer"]


class Classifier(LightningModule):
    """Cross-entropy classification with any network.

    Batches are pairs (inputs, labels), labels int64 of shape (B,) with values in [0, num_classes). Logs, as means over
    the epoch, ``train_loss`` and ``train_acc``, ``val_loss`` and ``val_acc``, ``test_loss`` and ``test_acc``;
    accuracies are shares in [0, 1].

    Args:
        net: Network from inputs to logits of shape (B, num_classes).
        num_classes: Number of classes, at least 2.
        lr: Learning rate after the warm-up, above 0.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        momentum: Momentum of ``sgd``, in [0, 1); the other two ignore it.
        weight_decay: Weight decay, at least 0 (decoupled from the gradient only with ``adamw``).
        lr_schedule: ``constant``, or ``cosine`` from `lr` down to 0 over all steps of the fit.
        warmup_steps: Optimizer steps over which the learning rate increases linearly to `lr`; 0 for none.
        label_smoothing: Share of the target spread over all classes, in [0, 1]; only for the training loss.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> model = Classifier(MLP(64, [32], 10), num_classes=10, lr=0.1)
        >>> model(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: AtLeastTwo = 10,
        lr: PositiveFloat = 0.01,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        momentum: FractionBelowOne = 0.0,
        weight_decay: NonNegativeFloat = 0.0,
        lr_schedule: Literal["constant", "cosine"] = "constant",
        warmup_steps: NonNegativeInt = 0,
        label_smoothing: Fraction = 0.0,
    ) -> None:
        check_arguments(Classifier, locals())
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.net = net
        # validate_args looks at the values, which would make a GPU wait at each step; cross_entropy refuses a label out
        # of range all the same.
        self.train_acc, self.val_acc, self.test_acc = (
            MulticlassAccuracy(num_classes, average="micro", validate_args=False) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, num_classes)."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the batch, label smoothing included."""
        return self._step(batch, "train", self.hparams["label_smoothing"])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_acc``."""
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test_loss`` and ``test_acc``."""
        self._step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities, shape (B, num_classes), for a batch of inputs or of (inputs, labels)."""
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        return torch.softmax(self(x), -1)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str, label_smoothing: float = 0.0) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
        accuracy = getattr(self, f"{stage}_acc")
        accuracy.update(logits.detach(), y)
        log = functools.partial(self.log, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(y))
        log(f"{stage}_loss", loss.detach(), sync_dist=True)
        log(f"{stage}_acc", accuracy)  # a metric object adds up its own counts, across processes as well
        for name, value in self._also_logged(logits.detach(), y).items():
            log(f"{stage}_{name}", value, sync_dist=True)
        return loss

    def _also_logged(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Further values to log, means over the batch, by what follows the stage in their names; for subclasses."""
        return {}

    def configure_optimizers(self) -> Any:
        """The optimizer, and a scheduler that steps with it if the learning rate is not constant.

        Raises:
            ValueError: The fit has no last step, which ``cosine`` needs, or ends within the warm-up.
        """
        hp = self.hparams
        settings: dict[str, Any] = {"lr": hp["lr"], "weight_decay": hp["weight_decay"]}
        optimizer: torch.optim.Optimizer
        if hp["optimizer"] == "sgd":
            optimizer = torch.optim.SGD(self.parameters(), momentum=hp["momentum"], **settings)
        else:
            kind = torch.optim.Adam if hp["optimizer"] == "adam" else torch.optim.AdamW
            optimizer = kind(self.parameters(), **settings)
        if hp["lr_schedule"] == "constant" and hp["warmup_steps"] == 0:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self) -> Callable[[int], float]:
        """Step to the factor on `lr`: k / warmup_steps for the k-th warm-up step, then 1 or the cosine."""
        warmup, total = int(self.hparams["warmup_steps"]), math.inf
        if self.hparams["lr_schedule"] == "cosine":
            total = self.trainer.estimated_stepping_batches
            # A few steps that only show that all goes together need not go beyond the warm-up.
            if not warmup < total < math.inf and not is_dry_run(self.trainer):
                raise ValueError(
                    f"lr_schedule is 'cosine' with warmup_steps={warmup}, but the fit has {total} steps; give the "
                    "Trainer a max_epochs or max_steps that goes beyond the warm-up."
                )

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

        return factor
