"""Modules that take part in training by hooks, optimizers and settings of the Trainer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from suite_base import CLASSES, FEATURES, Foreign, case, loader, mlp, table
from torch import Tensor, nn


@case
class ClipsByItself(Foreign):
    """Clips each layer by its own norm, and logs what it was."""

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:  # fmt: skip  # noqa: E501
        norms = [nn.utils.clip_grad_norm_(layer.parameters(), 0.1) for layer in (self.net[0], self.net[2])]
        self.clipped = [*getattr(self, "clipped", []), float(norms[0])]


@case
class CountsBatches(Foreign):
    """Counters in hooks around the batch."""

    def prepare(self) -> None:
        self.started, self.ended, self.losses = 0, 0, []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.started += 1

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ended += 1
        self.losses.append(float(outputs["loss"]))


@case
class ClampsAfterwards(Foreign):
    """Clips weights where rules that evaluate several times allow it."""

    comparable = False  # backprop differentiates at the clipped weights what was computed at others

    def on_before_zero_grad(self, optimizer: Any) -> None:
        for parameter in self.net.parameters():
            parameter.data.clamp_(-0.3, 0.3)


@case
class NoiseOnGradients(Foreign):
    """Adds noise to each gradient, behind the backward pass."""

    def on_after_backward(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(0.01 * torch.randn_like(parameter))


@case
class OwnOptimizerStep(Foreign):
    """Warms up within `optimizer_step`."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.param_groups[0]["lr"] = 0.01 * (batch_idx + 1)
        optimizer.step(closure=optimizer_closure)


@case
class OwnBackward(Foreign):
    """Differentiates by itself."""

    comparable = False

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (2 * loss).backward(*args, **kwargs)


@case
class SchedulerOfItsOwn(Foreign):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()
        self.rates = [*getattr(self, "rates", []), scheduler.get_last_lr()[0]]


@case
class AccumulatesAndClips(Foreign):
    comparable = False  # sums of batches

    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}  # noqa: RUF012


@case
class LineSearch(Foreign):
    """An optimizer that evaluates its closure several times."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)


@case
class Grows(Foreign):
    """Gets another layer at the start of the second epoch."""

    settings = {"max_epochs": 2}  # noqa: RUF012

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.more = nn.Linear(FEATURES, CLASSES).to(self.dtype)
            self.trainer.optimizers[0].add_param_group({"params": list(self.more.parameters())})

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x) + (self.more(x) if hasattr(self, "more") else 0)
        return F.cross_entropy(logits, y)


@case
class Thaws(Foreign):
    """Trains its head first, and everything from the second epoch on."""

    settings = {"max_epochs": 2}  # noqa: RUF012

    def prepare(self) -> None:
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch == 1)


@case
class ValidatesByTheStep(Foreign):
    """Its validation step calls its training step."""

    def prepare(self) -> None:
        self.steps: list[int] = []

    def val_dataloader(self) -> Any:
        return loader(*(t[:8] for t in table()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps.append(batch_idx)
        loss = self.loss(*batch)
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


@case
class MadeLate(Foreign):
    """Makes its network in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = mlp()


@case
class SkipsABatch(Foreign):
    """Leaves the epoch by its own hook."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


@case
class CompiledPart(Foreign):
    """A part that is compiled, without a compiler behind it."""

    def prepare(self) -> None:
        self.net[0] = torch.compile(self.net[0], backend="eager")


@case
class HookOnAParameter(Foreign):
    """Masks a gradient by a hook on a parameter, outside of the step."""

    comparable = False  # the estimate passes the hook, too

    def prepare(self) -> None:
        self.net[0].weight.register_hook(lambda grad: grad * (torch.arange(FEATURES) < 3).to(grad))


@case
class HookOnAModule(Foreign):
    """Watches activations through a hook that fills a list."""

    def prepare(self) -> None:
        self.activity: list[float] = []
        self.net[1].register_forward_hook(lambda _m, _i, out: self.activity.append(float(out.detach().mean())))
