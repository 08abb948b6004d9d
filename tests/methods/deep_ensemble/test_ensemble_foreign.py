"""Ensembles of modules that nobody here wrote: transformers' models and Lightning's demos, unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from ensemble_problems import Snapshot
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel
from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from torch import nn
from torch.utils.data import DataLoader

import lightning_bpfree as bpf

WORDS, LENGTH, ROWS = 30, 6, 8


class Wrapped(pl.LightningModule):
    """A transformers model, as everybody wraps them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        out = self.model(**batch)
        self.log("train_loss", out.loss)
        return out.loss

    def validation_step(self, batch, batch_idx):
        out = self.model(**batch)
        self.log("val_loss", out.loss)
        self.log("val_acc", (out.logits.argmax(-1) == batch["labels"]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def words(labels: str = "class") -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, WORDS, (ROWS, LENGTH), generator=generator)
    targets = {"class": ids[:, 0] % 2, "token": ids % 2, "next": ids}[labels]
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": t} for i, t in zip(ids, targets, strict=True)
    ]


def images() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(ROWS, 3, 16, 16, generator=generator)
    return [{"pixel_values": x, "labels": torch.tensor(int(x.mean() > 0))} for x in pixels]


def hugging(name: str, config: str, **settings: Any) -> Callable[[], pl.LightningModule]:
    def make() -> pl.LightningModule:
        transformers = pytest.importorskip("transformers")
        return Wrapped(getattr(transformers, name)(getattr(transformers, config)(**settings)))

    return make


class TinyTransformer(LightningTransformer):
    """Lightning's demo, small, and without its download."""

    def __init__(self) -> None:
        super().__init__(4)
        self.model = Transformer(WORDS, 8, 2, 8, 1)

    def prepare_data(self) -> None:
        pass


class TinyLSTM(LightningLSTM):
    """Lightning's demo, small, and without its download."""

    def __init__(self) -> None:
        super().__init__(4)
        self.model = SimpleLSTM(WORDS, 8, 8, 2)

    def prepare_data(self) -> None:
        pass


SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
SMALL |= {"max_position_embeddings": 16}
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE = {"image_size": 16, "num_channels": 3}
VISION = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "patch_size": 8}
CASES: dict[str, tuple[Callable[[], pl.LightningModule], Any, dict[str, Any]]] = {
    "bert": (hugging("BertForSequenceClassification", "BertConfig", **SMALL, **DRY), words, {}),
    "bert_dropout": (hugging("BertForSequenceClassification", "BertConfig", **SMALL), words, {}),
    "roberta": (hugging("RobertaForSequenceClassification", "RobertaConfig", **SMALL, **DRY), words, {}),
    "electra": (
        hugging("ElectraForTokenClassification", "ElectraConfig", embedding_size=8, **SMALL, **DRY),
        lambda: words("token"),
        {"class_dim": -1},
    ),
    "distilbert": (
        hugging("DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=WORDS, dim=8, n_layers=1,
                n_heads=2, hidden_dim=8, dropout=0.0, attention_dropout=0.0),
        words,
        {},
    ),
    "gpt2": (
        hugging("GPT2LMHeadModel", "GPT2Config", vocab_size=WORDS, n_embd=8, n_layer=1, n_head=2, n_positions=16,
                attn_pdrop=0.0, bos_token_id=0, eos_token_id=0),
        lambda: words("next"),
        {"class_dim": -1, "targets": lambda batch: None},
    ),
    "llama": (
        hugging("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=1, **SMALL),
        lambda: words("next"),
        {"class_dim": -1, "targets": lambda batch: None},
    ),
    "vit": (hugging("ViTForImageClassification", "ViTConfig", **VISION, **IMAGE, **DRY), images, {}),
    "resnet": (
        hugging("ResNetForImageClassification", "ResNetConfig", num_channels=3, embedding_size=4, hidden_sizes=[4, 8],
                depths=[1, 1], layer_type="basic"),
        images,
        {},
    ),
    "poolformer": (
        hugging("PoolFormerForImageClassification", "PoolFormerConfig", num_channels=3, hidden_sizes=[4, 4, 4, 4],
                depths=[1, 1, 1, 1]),
        images,
        {},
    ),
    "boring": (BoringModel, lambda: list(torch.randn(ROWS, 32)), {"targets": lambda batch: None}),
    "demo": (
        lambda: DemoModel(out_dim=3),
        lambda: list(torch.randn(ROWS, 32)),
        {"targets": lambda batch: None},
    ),
    "lightning_transformer": (
        TinyTransformer,
        lambda: [(torch.arange(LENGTH), torch.arange(LENGTH) + 1)] * ROWS,
        {"targets": lambda batch: None},
    ),
    "lightning_lstm": (
        TinyLSTM,
        lambda: [(torch.arange(LENGTH), torch.arange(LENGTH) + 1)] * ROWS,
        {"targets": lambda batch: None},
    ),
}  # fmt: skip
STACKED = {"bert", "roberta", "electra", "distilbert", "gpt2", "llama", "boring", "demo"}


@pytest.mark.parametrize("case", CASES)
def test_a_module_from_elsewhere_becomes_an_ensemble(case):
    make, data, options = CASES[case]
    ensemble = bpf.DeepEnsemble(2, seed=3, **options)
    before = Snapshot(ensemble)
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[ensemble, before], num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    module = make()
    batches = DataLoader(data(), 4)
    validated = pl.utilities.model_helpers.is_overridden("validation_step", module)
    trainer.fit(module, batches, batches if validated else None)
    after = ensemble.member_states()
    for start, end in zip(before.states, after, strict=True):
        assert any(not torch.equal(start[name], end[name]) for name in start), "every member moves"
    assert any(not torch.equal(before.states[0][name], before.states[1][name]) for name in after[0]), "members differ"
    assert all(torch.isfinite(tensor).all() for state in after for tensor in state.values())
    assert ("side by side" in ensemble.route) == (case in STACKED), ensemble.route
    if case == "bert":
        assert {"val_loss", "val_acc", "val/cls/Acc", "val/member_1/NLL"} <= set(trainer.callback_metrics)
