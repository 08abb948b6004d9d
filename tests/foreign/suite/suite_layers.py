"""Networks with unusual layers and parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from suite_base import CLASSES, FEATURES, ROWS, Foreign, case, loader, mlp, pictures, table, words
from torch import Tensor, nn
from torch.nn.utils import parametrizations


@case
class TiedAutoencoder(Foreign):
    def prepare(self) -> None:
        self.net = nn.Linear(FEATURES, 4)
        self.back = nn.Linear(4, FEATURES)
        self.back.weight = nn.Parameter(self.net.weight.detach().T.clone())
        self.again = nn.Linear(FEATURES, 4)
        self.again.weight = self.net.weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        return F.mse_loss(self.back(torch.tanh(self.net(x) + self.again(x.flip(1)))), x)


@case
class TiedLanguageModel(Foreign):
    """Input and output embeddings are one matrix."""

    def prepare(self) -> None:
        self.embed, self.net = nn.Embedding(20, 4, padding_idx=0), nn.Linear(4, 4)
        self.head = nn.Linear(4, 20, bias=False)
        self.head.weight = self.embed.weight

    def train_dataloader(self) -> Any:
        ids = words(6)
        ids[::2, 3:] = 0  # padding
        return loader(ids[:, :-1], ids[:, 1:])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, following = batch
        return F.cross_entropy(self.head(torch.tanh(self.net(self.embed(ids)))).flatten(0, 1), following.flatten())


@case
class Lazy(Foreign):
    draws_alike = False  # layers are made before the first step, and not within it

    def prepare(self) -> None:
        self.net = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(CLASSES))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@case
class ConvNet(Foreign):
    """BatchNorm, pooling, dropout, a flat head.

    Kinks of ReLU behind BatchNorm lie within sigma of one dropout mask in four: central differences are off by up to
    0.6 there, which says nothing about a rule. With GELU they are off by 0.06 at most, in 20 masks.
    """

    def prepare(self) -> None:
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2), nn.Dropout2d(0.2),
            nn.Conv2d(4, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES),
        )  # fmt: skip

    def train_dataloader(self) -> Any:
        return loader(pictures(), table()[1])


@case
class Unet(Foreign):
    """Skips, transposed convolutions, GroupNorm."""

    def prepare(self) -> None:
        self.down = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.norm, self.up = nn.GroupNorm(2, 4), nn.ConvTranspose2d(4, 1, 2, stride=2)
        self.net = nn.Conv2d(2, 1, 1)

    def train_dataloader(self) -> Any:
        return loader(pictures())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        noisy = x + 0.3 * torch.randn_like(x)
        up = self.up(F.silu(self.norm(self.down(noisy))))
        return F.l1_loss(self.net(torch.cat([noisy, up], 1)), x)


@case
class Packed(Foreign):
    """Packed sequences through two directions and layers of an LSTM."""

    def prepare(self) -> None:
        self.net = nn.LSTM(1, 3, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        lengths = torch.tensor([6, 5, 3, 2])
        packed = nn.utils.rnn.pack_padded_sequence(x.unsqueeze(-1), lengths, batch_first=True)
        _, (hidden, _) = self.net(packed)
        return F.cross_entropy(self.head(torch.cat([hidden[-1], hidden[-2]], 1)), y)


@case
class Encoder(Foreign):
    """torch's own encoder layers, with dropout and a mask."""

    def prepare(self) -> None:
        self.embed = nn.Embedding(20, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 8, 0.1, batch_first=True)
        self.net = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def train_dataloader(self) -> Any:
        return loader(words(), table()[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, y = batch
        return F.cross_entropy(self.head(self.net(self.embed(ids), src_key_padding_mask=ids < 5).mean(1)), y)


@case
class Bag(Foreign):
    """A layer without a derivative in forward mode."""

    def prepare(self) -> None:
        self.net = nn.EmbeddingBag(20, CLASSES)

    def train_dataloader(self) -> Any:
        return loader(words(), table()[1])


@case
class SparseRows(Foreign):
    """Sparse gradients, with the optimizer that takes no others."""

    def prepare(self) -> None:
        self.embed = nn.Embedding(20, FEATURES, sparse=True)

    def train_dataloader(self) -> Any:
        return loader(words(1)[:, 0], table()[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, y = batch
        return F.cross_entropy(self.embed(ids)[:, :CLASSES], y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SparseAdam(self.embed.parameters(), lr=0.05)


@case
class Complex(Foreign):
    """A spectral layer with complex weights."""

    def prepare(self) -> None:
        self.spectrum = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    digits = 1e-5

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(torch.fft.irfft(torch.fft.rfft(x) * self.spectrum, n=FEATURES), y)


@case
class Temperature(Foreign):
    """A parameter without dimensions, and uncertainty weights beside."""

    def prepare(self) -> None:
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.weights = nn.ParameterList([torch.zeros(()), torch.zeros(1)])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        a, b = self.weights
        logits = self.net(x) * self.scale.exp()
        first, second = F.cross_entropy(logits, y), logits.square().mean()
        return first * torch.exp(-a) + a + (second * torch.exp(-b) + b).sum()


@case
class SpectralNorm(Foreign):
    """A vector that power iterations move in each forward pass."""

    def prepare(self) -> None:
        self.net[0] = parametrizations.spectral_norm(self.net[0])
        self.net[2] = parametrizations.weight_norm(self.net[2])


@case
class OldWeightNorm(Foreign):
    """The older way, by hooks that assign the weight before each forward pass."""

    def prepare(self) -> None:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(self.net[0])


@case
class FrozenBackbone(Foreign):
    """Trains its head only; the backbone's BatchNorm goes on counting."""

    def prepare(self) -> None:
        self.net = nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES))
        self.net[:2].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


@case
class Experts(Foreign):
    """Sends each row to the better of two experts."""

    def prepare(self) -> None:
        self.gate = nn.Linear(FEATURES, 2)
        self.experts = nn.ModuleDict({name: mlp(4) for name in ("first", "second")})
        self.net = nn.Identity()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        weights = self.gate(x).softmax(1)
        best = weights.argmax(1)
        logits = torch.zeros(len(x), CLASSES).to(x)
        for i, expert in enumerate(self.experts.values()):
            rows = (best == i).nonzero().squeeze(1)
            if len(rows):
                logits = logits.index_add(0, rows, weights[rows, i : i + 1] * expert(x[rows]))
        return F.cross_entropy(logits, y)


@case
class Hypernetwork(Foreign):
    """Makes the weights of another network, and calls it with them."""

    def prepare(self) -> None:
        self.base = nn.Linear(FEATURES, CLASSES).requires_grad_(False)
        self.net = nn.Linear(2, CLASSES * FEATURES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        made = {"weight": self.base.weight + self.net(x[0, :2]).view(CLASSES, FEATURES), "bias": self.base.bias}
        return F.cross_entropy(torch.func.functional_call(self.base, made, (x,)), y)


@case
class NotRegistered(Foreign):
    """A head in a plain list, which only the optimizer knows."""

    def prepare(self) -> None:
        self.heads = [nn.Linear(CLASSES, CLASSES)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.heads[0].to(self.dtype)(self.net(x)), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.parameters(), *self.heads[0].parameters()], lr=0.05)


@case
class HalfOfIt(Foreign):
    """The optimizer holds the last layer only, although nothing is frozen."""

    def configure_optimizers(self) -> Any:
        return torch.optim.RMSprop(self.net[2].parameters(), lr=0.01)


@case
class Groups(Foreign):
    """Groups of parameters with rates of their own, and a scheduler for each step."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters(), "lr": 0.01}, {"params": self.net[2].parameters()}]
        optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.01, 0.05], total_steps=6)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@case
class Straight(Foreign):
    """Quantizes its weights, with a gradient that passes straight through."""

    rough = True  # finite differences see through what stops gradients

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        first, last = self.net[0], self.net[2]
        rounded = first.weight + ((first.weight * 8).round() / 8 - first.weight).detach()
        return F.cross_entropy(last(torch.tanh(F.linear(x, rounded, first.bias))), y)


@case
class Euler(Foreign):
    """A neural differential equation, in steps of its own."""

    def prepare(self) -> None:
        self.field = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Softplus())
        self.net = nn.Linear(FEATURES, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        for _ in range(4):
            x = x + 0.25 * self.field(x)
        return self.loss(x, y)


@case
class NoNetwork(Foreign):
    """Parameters of the LightningModule itself, and nothing else."""

    def prepare(self) -> None:
        self.net = nn.Identity()
        self.users, self.items = nn.Parameter(torch.randn(ROWS, 3)), nn.Parameter(torch.randn(FEATURES, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.users @ self.items.T, batch[0])
