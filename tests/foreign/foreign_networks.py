"""Networks and data as those who use transformers have them, and the rules that train networks in blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_problems import Small
from lightning.pytorch import Callback
from problems import fitted
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_bpfree as bpf

CLASSES = 4


class Dicts(Dataset):
    """Samples as transformers' own collators give them."""

    def __init__(self, name: str, inputs: Tensor, labels: str = "labels") -> None:
        self.name, self.inputs, self.labels = name, inputs, labels
        self.y = torch.arange(len(inputs)) % CLASSES

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {self.name: self.inputs[index], self.labels: self.y[index]}


def texts(rows: int = 12) -> DataLoader:
    drawn = torch.randint(3, 30, (rows, 6), generator=torch.Generator().manual_seed(1))
    return DataLoader(Dicts("input_ids", drawn), batch_size=4)


def images(rows: int = 12) -> DataLoader:
    drawn = torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(Dicts("pixel_values", drawn), batch_size=4)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=30, max_position_embeddings=16, num_labels=CLASSES, **sizes)
    )


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=CLASSES, **sizes)
    )


class OwnLoss(Small):
    """Takes the loss that the network computes, as most do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(**batch).loss


class OutsideLoss(OwnLoss):
    """Takes the logits."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        batch = dict(batch)
        labels = batch.pop("labels")
        return F.cross_entropy(self.net(**batch).logits, labels)


class Tuples(OwnLoss):
    """Asks for tuples."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, logits = self.net(**batch, return_dict=False)
        assert logits.shape == (4, CLASSES)
        return loss


BERT_BLOCKS = [["bert.embeddings", "bert.encoder.layer.0"], "bert.encoder.layer.1"]
VIT_BLOCKS = [["vit.embeddings", "vit.layers.0"], "vit.layers.1"]
NETS = {"bert": (bert, texts, BERT_BLOCKS), "vit": (vit, images, VIT_BLOCKS)}


def rules(blocks: Any) -> dict[str, bpf.TrainingRule]:
    return {
        "goodness": bpf.ForwardForward(blocks, label="embedding", seed=1),
        "readout": bpf.ForwardForward(blocks, label="embedding", prediction="readout", seed=1),
        "hard": bpf.ForwardForward(blocks, label="embedding", negatives="hard", seed=1),
        "local": bpf.ForwardGradient(
            guess=bpf.LocalLoss(blocks=blocks, num_classes=CLASSES), target="local", blocks=None, seed=1
        ),
        "guess": bpf.ForwardGradient(guess=bpf.LocalLoss(blocks=blocks), seed=1),
        "team": bpf.TeamReinforce(num_samples=2, seed=1),
        "team_samples": bpf.TeamReinforce(num_samples=2, evaluation="samples", eval_samples=2, seed=1),
    }


class Kept(Callback):
    """What the network returned in training steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))


def trains(module: Small, loader: DataLoader, rule: bpf.TrainingRule, inside: tuple[str, ...]) -> None:
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    kept = Kept()
    fitted(module, loader, rule, kept, limit_val_batches=0)
    assert len(kept.losses) == len(loader)
    assert all(torch.isfinite(torch.tensor(kept.losses)))
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    for part in inside:
        assert any(part in name for name in moved), (part, moved)
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def vectors() -> DataLoader:
    drawn = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(Dicts("x", drawn, "label"), batch_size=4)


class Called(Small):
    def __init__(self, net: nn.Module, call: str = "x") -> None:
        super().__init__()
        self.net, self.call = net, call

    def val_dataloader(self) -> DataLoader:
        return vectors()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        scores = self.net(batch) if self.call == "dict" else self.net(batch["x"])
        return F.cross_entropy(scores, batch["label"])
