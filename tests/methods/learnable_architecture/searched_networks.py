"""Networks whose sizes are learned in the tests, and what several files of tests do with them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.demos.nets import MLP, SmallCNN, SmallTransformer
from lightning_bpfree.methods.learnable_architecture.architecture import Architecture
from lightning_bpfree.methods.learnable_architecture.sizes.axes import refresh
from lightning_bpfree.methods.learnable_architecture.tracing.probe import ExampleCall


class Residual(nn.Module):
    """A residual block as in torchvision's ResNets."""

    def __init__(self, a: int, b: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.norm2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.act = nn.ReLU()
        self.shortcut = nn.Identity()
        if stride > 1 or a != b:
            self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

    def forward(self, x):
        return self.act(self.norm2(self.conv2(self.act(self.norm1(self.conv1(x))))) + self.shortcut(x))


class ResNet(nn.Sequential):
    def __init__(self, a: int = 6, b: int = 10) -> None:
        super().__init__(
            nn.Sequential(nn.Conv2d(1, a, 3, padding=1, bias=False), nn.BatchNorm2d(a), nn.ReLU()),
            nn.Sequential(Residual(a, a), Residual(a, a)),
            nn.Sequential(Residual(a, b, 2), Residual(b, b)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(b, 3),
        )


class Concatenating(nn.Module):
    """Two branches side by side, with a norm over both, and a head that reads positions in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(2, 6, 5, padding=2)
        self.norm = nn.BatchNorm1d(10)
        self.mix = nn.Conv1d(10, 8, 1)
        self.head = nn.Linear(8 * 5, 3)

    def forward(self, x):
        x = self.norm(torch.cat([self.left(x), self.right(x).relu()], 1)).relu()
        return self.head(self.mix(x).relu().transpose(1, 2).flatten(1))


def vit() -> tuple[nn.Module, Any]:
    import transformers

    config = transformers.ViTConfig(
        image_size=8, num_channels=1, patch_size=4, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=16, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(1, 1, 8, 8)}


def hf_resnet() -> tuple[nn.Module, Any]:
    import transformers

    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[8, 16], depths=[2, 2], layer_type="bottleneck", num_labels=3
    )
    return transformers.ResNetForImageClassification(config), torch.randn(1, 1, 16, 16)


def convnext() -> tuple[nn.Module, Any]:
    import transformers

    config = transformers.ConvNextConfig(
        num_channels=1, num_stages=2, hidden_sizes=[4, 8], depths=[2, 2], num_labels=3, image_size=16, patch_size=2,
        layer_scale_init_value=0.5,
    )  # fmt: skip
    return transformers.ConvNextForImageClassification(config), torch.randn(1, 1, 16, 16)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "mlp": lambda: (MLP(8, [6, 5], 3, norm="batch"), torch.randn(1, 8)),
    "layer norm": lambda: (MLP(8, [6, 5], 3, norm="layer"), torch.randn(1, 8)),
    "cnn": lambda: (SmallCNN((1, 8, 8), [6, 8], 3, norm="batch"), torch.randn(1, 1, 8, 8)),
    "group norm": lambda: (SmallCNN((1, 8, 8), [8, 12], 3, norm="group"), torch.randn(1, 1, 8, 8)),
    "resnet": lambda: (ResNet(), torch.randn(1, 1, 8, 8)),
    "concatenating": lambda: (Concatenating(), torch.randn(1, 2, 5)),
    "transformer": lambda: (SmallTransformer((1, 4, 4), 3, dim=8, heads=2), torch.randn(1, 1, 4, 4)),
    "ccnn": lambda: (bpf.CCNN((1, 8, 8), 3, width=4, blocks=2), torch.randn(1, 1, 8, 8)),
    "dense ccnn": lambda: (bpf.CCNN((1, 16), 2, width=4, blocks=2, dense=True), torch.randn(1, 1, 16)),
    "transformers ViT": vit,
    "transformers ResNet": hf_resnet,
    "transformers ConvNeXt": convnext,
}


def built(name: str, seed: int = 0, dims=None) -> tuple[nn.Module, ExampleCall, Architecture]:
    """Return a network with statistics that are not trivial, a call of it, and its sizes."""
    torch.manual_seed(seed)
    network, example = NETWORKS[name]()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    call = ExampleCall((), dict(example)) if isinstance(example, dict) else ExampleCall((example,), {})
    return network, call, Architecture(network, call, dims)


def crop_at_random(architecture: Architecture, seed: int) -> None:
    chosen = random.Random(seed)
    for axis in architecture.axes:
        axis.set_crop(chosen.choice(list(axis.crops)))
    refresh(architecture.axes)


def logits(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out.logits


class Module(pl.LightningModule):
    """Classifies by any network."""

    def __init__(self, net: nn.Module, lr: float = 0.05, scheduler: bool = False) -> None:
        super().__init__()
        self.net, self.lr, self.scheduler = net, lr, scheduler

    def forward(self, x):
        return logits(self.net(x))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=1e-3)
        if not self.scheduler:
            return optimizer
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), "interval": "step"}]


def loader(*shape: int, rows: int = 32, classes: int = 3, batch_size: int = 8, shuffle: bool = True) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, *shape, generator=generator)
    y = (x.flatten(1) @ torch.randn(x[0].numel(), classes, generator=generator)).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size, shuffle=shuffle)


def trainer(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    options = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**options, **settings})


def search(budget: float = 0.6, dims=("width",), **kwargs: Any) -> bpf.LearnableArchitecture:
    # Sizes of a few units are coarse.
    return bpf.LearnableArchitecture(budget, dims, pictures=False, **{"tolerance": 0.05, **kwargs})
