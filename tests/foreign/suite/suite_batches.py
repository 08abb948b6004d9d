"""Batches of every form, and steps that change them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from suite_base import CLASSES, FEATURES, Foreign, case, loader, of_items, table, words
from torch import Tensor, nn


@case
class LabelsPopped(Foreign):
    def train_dataloader(self) -> Any:
        return of_items(lambda x, y: {"inputs": x, "labels": y})

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        labels = batch.pop("labels")
        return F.cross_entropy(self.net(**{"input": batch.pop("inputs")}), labels)


@case
class KeysRenamed(LabelsPopped):
    """Moves entries of a nested dict, as adapters between data sets and models do."""

    def train_dataloader(self) -> Any:
        return of_items(lambda x, y: {"meta": {"ids": [0, 1]}, "fields": {"x": x, "target": y}})

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        fields = batch.pop("fields")
        fields["labels"] = fields.pop("target")
        batch["meta"]["ids"].pop()
        return F.cross_entropy(self.net(fields["x"]), fields["labels"])


@case
class Standardized(Foreign):
    """Standardizes its batch in place."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        x -= x.mean(0, keepdim=True)
        x /= x.std(0, keepdim=True) + 1e-3
        return self.loss(x, y)


@case
class TokensMasked(Foreign):
    """Masks tokens in place, by a draw, and learns to find them again."""

    def prepare(self) -> None:
        self.net = nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 20))

    def train_dataloader(self) -> Any:
        return loader(words(), words())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids, labels = batch
        chosen = torch.rand(ids.shape, dtype=torch.float32) < 0.4
        ids.masked_fill_(chosen, 2)
        labels[~chosen] = -100
        return F.cross_entropy(self.net(ids).flatten(0, 1), labels.flatten(), reduction="sum") / 20


@dataclasses.dataclass
class Sample:
    x: Tensor
    y: Tensor
    weight: Tensor | None = None


@case
class Dataclasses(Foreign):
    """Fills a field of the batch."""

    def train_dataloader(self) -> Any:
        return of_items(Sample)

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        assert batch.weight is None
        batch.weight = 1 + batch.x[:, 0].abs()
        losses = F.cross_entropy(self.net(batch.x), batch.y, reduction="none")
        return (losses * batch.weight).mean()


class Pair(NamedTuple):
    views: list[Tensor]
    target: dict[str, Tensor]


@case
class NamedTuples(Foreign):
    def train_dataloader(self) -> Any:
        return of_items(lambda x, y: Pair([x, x.flip(1)], {"y": y}))

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        second = batch.views.pop()
        return self.loss(batch.views[0], batch.target["y"]) + self.loss(second, batch.target["y"])


class Graph:
    """A batch as libraries for graphs have it: an object with attributes and methods of its own."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x.double(), y
        self.edge_index = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])

    def to(self, *_: Any, **__: Any) -> Graph:
        return self


@case
class Graphs(Foreign):
    """Passes messages along edges, and writes its features into the batch."""

    def train_dataloader(self) -> Any:
        return of_items(Graph)

    def training_step(self, batch: Graph, batch_idx: int) -> Tensor:
        source, target = batch.edge_index
        batch.x = batch.x.to(self.net[0].weight.dtype)
        batch.x = batch.x + torch.zeros_like(batch.x).index_add_(0, target, batch.x[source])
        return self.loss(batch.x, batch.y)


@case
class Strings(Foreign):
    """Text that the step itself makes numbers of."""

    def train_dataloader(self) -> Any:
        return of_items(lambda x, y: {"text": [f"row {int(i)} {'ab' * int(i)}" for i in y], "y": y})

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        lengths = torch.tensor([[len(text), text.count("a")] for text in batch["text"]], device=self.device)
        return self.loss(F.pad(lengths, (0, FEATURES - 2)).to(self.net[0].weight.dtype) / 9, batch["y"])


@case
class Ragged(Foreign):
    """Sequences of different lengths, which the step pads."""

    def train_dataloader(self) -> Any:
        return of_items(lambda x, y: ([row[: 2 + i] for i, row in enumerate(x)], y))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows, y = batch
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return self.loss(F.pad(padded, (0, FEATURES - padded.shape[1])), y)


@case
class Arrays(Foreign):
    """NumPy arrays, scaled in place."""

    def train_dataloader(self) -> Any:
        return of_items(lambda x, y: {"x": x.numpy(), "y": y.numpy()})

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        batch["x"] *= 2
        weight = self.net[0].weight
        return self.loss(torch.from_numpy(batch["x"]).to(weight), torch.from_numpy(batch["y"]))


@case
class TwoLoaders(Foreign):
    """Labeled and unlabeled batches, side by side."""

    def train_dataloader(self) -> Any:
        x, y = table()
        return CombinedLoader({"labeled": loader(x, y), "unlabeled": loader(x.flip(0))}, "min_size")

    def training_step(self, batch: dict[str, list[Tensor]], batch_idx: int) -> Tensor:
        entropy = torch.distributions.Categorical(logits=self.net(batch["unlabeled"][0])).entropy().mean()
        return self.loss(*batch["labeled"]) + 0.1 * entropy


@case
class AugmentedInAHook(Foreign):
    """Draws noise in a hook of the module, before the step."""

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        x, y = batch
        return [x + 0.1 * torch.randn_like(x), y]


@case
class SoftLabels(Foreign):
    """Mixes rows and labels, as mixup does."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        share = torch.distributions.Beta(0.5, 0.5).sample().to(x)
        order = torch.randperm(len(x))
        target = F.one_hot(y, CLASSES).to(x)
        mixed = share * target + (1 - share) * target[order]
        return F.cross_entropy(self.net(share * x + (1 - share) * x[order]), mixed)


@case
class ShuffledLoader(Foreign):
    """A loader that draws its order from torch's stream."""

    def train_dataloader(self) -> Any:
        return loader(*table(), shuffle=True)
