"""A classifier that wraps any network, and three small networks to put into it.

Nothing here knows of training rules: `Classifier` is an ordinary LightningModule with automatic optimisation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

__all__ = ["MLP", "Classifier", "SmallCNN", "SmallTransformer"]

Activation = Literal["relu", "gelu", "tanh", "hardswish"]
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "hardswish": nn.Hardswish,
}
_POOL = 4  # SmallCNN pools each side to this many cells at most


def _choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; give one of {', '.join(map(repr, allowed))}.")


def _at_least(least: float, **values: float) -> None:
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{name} is {value}; give {least} or more.")


def _check_input(net: nn.Module, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape[1:] != shape:
        raise ValueError(
            f"{type(net).__name__} was built for inputs of shape {('B', *shape)}, got {tuple(x.shape)}; "
            "build it with the data's shape, or feed it such inputs."
        )


def _image_shape(in_shape: Sequence[int]) -> tuple[int, int, int]:
    if len(in_shape) != 3 or min(in_shape) < 1:
        raise ValueError(f"in_shape is {tuple(in_shape)}; give channels, height and width, each 1 or more.")
    return in_shape[0], in_shape[1], in_shape[2]


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
        weight_decay: Weight decay, at least 0 (decoupled from the gradient with ``adamw`` only).
        lr_schedule: ``constant``, or ``cosine`` from `lr` down to 0 over all steps of the fit.
        warmup_steps: Optimizer steps over which the learning rate grows linearly to `lr`; 0: none.
        label_smoothing: Share of the target spread over all classes, in [0, 1]; for the training loss only.

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
        num_classes: int = 10,
        lr: float = 0.01,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        lr_schedule: Literal["constant", "cosine"] = "constant",
        warmup_steps: int = 0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _choice("optimizer", optimizer, ("sgd", "adam", "adamw"))
        _choice("lr_schedule", lr_schedule, ("constant", "cosine"))
        _at_least(2, num_classes=num_classes)
        _at_least(0, weight_decay=weight_decay, warmup_steps=warmup_steps)
        if not lr > 0:
            raise ValueError(f"lr is {lr}; give a learning rate above 0.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; give a value from 0 up to, but not including, 1.")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing is {label_smoothing}; give a share from 0 to 1.")
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
        return loss

    def configure_optimizers(self) -> Any:
        """The optimizer, and a scheduler that steps with it where the learning rate is not constant.

        Raises:
            ValueError: The fit has no last step for ``cosine`` to end at, or ends within the warm-up.
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
            if not warmup < total < math.inf:
                raise ValueError(
                    f"lr_schedule is 'cosine' with warmup_steps={warmup}, but the fit has {total} steps; give the "
                    "Trainer a max_epochs or max_steps that goes beyond the warm-up."
                )

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup))))

        return factor


class MLP(nn.Module):
    """Fully connected network; flattens its input to (B, in_features).

    Args:
        in_features: Numbers in one sample.
        hidden: Widths of the hidden layers; empty: a linear model.
        num_classes: Width of the output.
        activation: Nonlinearity after each hidden layer.
        norm: Normalisation between a hidden layer and its nonlinearity.

    Raises:
        ValueError: A size is below 1, a name unknown, or an input does not have `in_features` numbers a sample.

    Example:
        >>> MLP(64, [32, 16], 10)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        in_features: int = 64,
        hidden: Sequence[int] = (128,),
        num_classes: int = 10,
        activation: Activation = "relu",
        norm: Literal["none", "layer", "batch"] = "none",
    ) -> None:
        super().__init__()
        _choice("activation", activation, tuple(_ACTIVATIONS))
        _choice("norm", norm, ("none", "layer", "batch"))
        widths = {f"hidden[{i}]": width for i, width in enumerate(hidden)}
        _at_least(1, in_features=in_features, num_classes=num_classes, **widths)
        layers: list[nn.Module] = []
        width = in_features
        for next_width in hidden:
            layers.append(nn.Linear(width, next_width))
            if norm != "none":
                layers.append(nn.LayerNorm(next_width) if norm == "layer" else nn.BatchNorm1d(next_width))
            layers.append(_ACTIVATIONS[activation]())
            width = next_width
        self.in_features = in_features
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, num_classes), of inputs of shape (B, ...)."""
        x = x.flatten(1)
        _check_input(self, x, (self.in_features,))
        logits: Tensor = self.layers(x)
        return logits


class SmallCNN(nn.Module):
    """3 x 3 convolutions, the first at full size and each later one halving it, average pooling, one linear layer.

    Args:
        in_shape: Shape (C, H, W) of one image, any size from 1 x 1 up.
        channels: Output channels of each convolution, at least one.
        num_classes: Width of the output.
        norm: Normalisation after each convolution; ``group`` has up to 8 groups.
        activation: Nonlinearity after it.

    Raises:
        ValueError: A size is below 1, a name unknown, or an input does not have `in_shape`.

    Example:
        >>> SmallCNN((1, 28, 28), [8, 16])(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int] = (1, 8, 8),
        channels: Sequence[int] = (16, 32),
        num_classes: int = 10,
        norm: Literal["none", "group", "batch"] = "none",
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        _choice("activation", activation, tuple(_ACTIVATIONS))
        _choice("norm", norm, ("none", "group", "batch"))
        c, *sides = _image_shape(in_shape)
        widths = {f"channels[{i}]": width for i, width in enumerate(channels)}
        _at_least(1, **{"len(channels)": len(channels)}, num_classes=num_classes, **widths)
        layers: list[nn.Module] = []
        for i, width in enumerate(channels):
            layers.append(nn.Conv2d(c, width, 3, stride=1 if i == 0 else 2, padding=1))
            if norm != "none":
                layers.append(nn.GroupNorm(math.gcd(8, width), width) if norm == "group" else nn.BatchNorm2d(width))
            layers.append(_ACTIVATIONS[activation]())
            c = width
            sides = [math.ceil(side / (1 if i == 0 else 2)) for side in sides]
        # AdaptiveAvgPool2d has no deterministic backward on CUDA, so the windows that give _POOL cells a side at most
        # are worked out here, and Trainer(deterministic=True) works.
        windows = [math.ceil(side / _POOL) for side in sides]
        cells = math.prod(math.ceil(side / window) for side, window in zip(sides, windows, strict=True))
        layers.append(nn.AvgPool2d((windows[0], windows[1]), ceil_mode=True))
        self.in_shape = tuple(in_shape)
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(c * cells, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, num_classes), of images of shape (B, C, H, W)."""
        _check_input(self, x, self.in_shape)
        logits: Tensor = self.head(self.features(x).flatten(1))
        return logits


class SmallTransformer(nn.Module):
    """Transformer encoder over rows or patches of an image: pre-norm, learned positions, mean over tokens.

    Args:
        in_shape: Shape (C, H, W) of one image.
        num_classes: Width of the output.
        dim: Width of a token, a multiple of `heads`.
        depth: Encoder layers.
        heads: Attention heads.
        patch: Height and width of a patch, which divide H and W; None: each row is a token.
        mlp_ratio: Width of a layer's feed-forward part over `dim`.
        dropout: Dropout probability in the layers, in [0, 1).

    Raises:
        ValueError: A size is below 1 or does not divide another as it must, or an input does not have `in_shape`.

    Example:
        >>> SmallTransformer((1, 28, 28), patch=(7, 7))(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int] = (1, 8, 8),
        num_classes: int = 10,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        patch: tuple[int, int] | None = None,
        mlp_ratio: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        c, h, w = _image_shape(in_shape)
        p, q = (1, w) if patch is None else patch
        sizes = {"num_classes": num_classes, "dim": dim, "depth": depth, "heads": heads, "mlp_ratio": mlp_ratio}
        _at_least(1, **sizes, **{"patch[0]": p, "patch[1]": q})
        if h % p or w % q:
            raise ValueError(f"patch is {p} x {q}, which does not divide the image of {h} x {w}; choose one that does.")
        if dim % heads:
            raise ValueError(f"dim is {dim} and heads {heads}; make dim a multiple of heads.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; give a probability from 0 up to, but not including, 1.")
        self.in_shape, self.patch = (c, h, w), (p, q)
        self.embed = nn.Linear(c * p * q, dim)
        self.position = nn.Parameter(0.02 * torch.randn(h // p * (w // q), dim))
        layer = nn.TransformerEncoderLayer(
            dim, heads, mlp_ratio * dim, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        for parameter in self.encoder.parameters():
            if parameter.dim() > 1:  # TransformerEncoder copies one layer: without this all layers start out the same
                nn.init.xavier_uniform_(parameter)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, num_classes), of images of shape (B, C, H, W)."""
        _check_input(self, x, self.in_shape)
        (c, h, w), (p, q) = self.in_shape, self.patch
        grid = x.reshape(-1, c, h // p, p, w // q, q).permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, p, q)
        tokens = grid.flatten(3).flatten(1, 2)
        logits: Tensor = self.head(self.encoder(self.embed(tokens) + self.position).mean(1))
        return logits
