"""Modules that nobody here wrote, or that are written as people do write them, train as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from foreign_problems import (
    RULES,
    DictBatch,
    Small,
    Wrapped,
    assert_slopes_are_backprops,
    assert_trains,
    compiled,
    language_data,
    tokens,
    vector_data,
    vectors,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from lightning.pytorch.utilities import CombinedLoader
from problems import fitted
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_bpfree as bpf

every_rule = pytest.mark.parametrize("rule", RULES)


# --- modules that train ----------------------------------------------------------------------------------------------


class OfflineTransformer(LightningTransformer):
    """Lightning's demonstration of a language model, small, without its download."""

    def __init__(self) -> None:
        super().__init__(vocab_size=20)
        self.model = Transformer(vocab_size=20, ninp=8, nhid=8, nlayers=1)

    def prepare_data(self) -> None:
        pass


class OfflineLSTM(LightningLSTM):
    """Lightning's demonstration of a recurrent model, which carries its hidden state from batch to batch."""

    def __init__(self) -> None:
        super().__init__(vocab_size=20)
        self.model = SimpleLSTM(vocab_size=20, ninp=8, nhid=8, nlayers=2)

    def prepare_data(self) -> None:
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)  # its own learning rate is 20


class Roberta(Small):
    """A Hugging Face masked language model: sdpa attention, dropout, the head tied to the embedding."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        from transformers import RobertaConfig, RobertaForMaskedLM

        sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "max_position_embeddings": 16}
        self.model = RobertaForMaskedLM(
            RobertaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, attn_implementation="sdpa", **config)
        )
        self.model.train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss


class Named(Dataset):
    """Rows as dictionaries, which the default collate function turns into a batch that is one."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: column[row] for name, column in self.columns.items()}


def masked_data() -> DataLoader:
    words = 3 + tokens(12, 9, vocabulary=17)  # 0 to 2 are special
    masked, labels, attention = words.clone(), words.clone(), torch.ones_like(words)
    masked[:, 2] = 2
    masked[::2, -2:] = 1  # padding
    labels[::2, -2:] = -100
    attention[::2, -2:] = 0
    return DataLoader(Named(input_ids=masked, labels=labels, attention_mask=attention), batch_size=4)


class LSTMClassifier(Small):
    """Bidirectional, two layers, dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 5, num_layers=2, dropout=0.2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        hidden, _ = self.lstm(x.unsqueeze(-1))
        return F.cross_entropy(self.head(hidden[:, -1]), y)


class TwoLoaders(DictBatch):
    """Takes one batch of each of two loaders."""

    def training_step(self, batch: dict[str, list[Tensor]], batch_idx: int) -> Tensor:
        x, y = batch["labeled"]
        (unlabeled,) = batch["unlabeled"]
        entropy = torch.distributions.Categorical(logits=self.net(unlabeled)).entropy().mean()
        return F.cross_entropy(self.net(x), y) + 0.1 * entropy


def two_loaders() -> CombinedLoader:
    x, y = vectors()
    unlabeled = DataLoader(TensorDataset(x.flip(0)), batch_size=4)
    return CombinedLoader({"labeled": DataLoader(TensorDataset(x, y), batch_size=8), "unlabeled": unlabeled})


class Positional(DictBatch):
    """A training step with neither batch index nor standard names."""

    def training_step(self, rows: list[Tensor]) -> Tensor:
        x, y = rows
        return F.cross_entropy(self.net(x), y)


class WithArguments(DictBatch):
    """A training step with the index of the loader and a default argument."""

    def training_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        assert dataloader_idx == 0
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class NonReentrant(DictBatch):
    """Activation checkpointing as torch recommends it."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(checkpoint(self.net, x, use_reentrant=False), y)


class PartlyFrozen(DictBatch):
    """The first layer does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


MODULES: dict[str, tuple[Callable[[], pl.LightningModule], Callable[[], Any]]] = {
    "boring": (BoringModel, lambda: BoringModel().train_dataloader()),
    "lightning_transformer": (OfflineTransformer, language_data),
    "lightning_lstm": (OfflineLSTM, language_data),
    "roberta": (Roberta, masked_data),
    # Without dropout the attention takes a fused kernel, which has no forward derivative, wherever it may.
    "roberta_fused": (lambda: Roberta(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), masked_data),
    "lstm_classifier": (LSTMClassifier, vector_data),
    "dict_batch": (DictBatch, lambda: DataLoader(Named(x=vectors()[0], y=vectors()[1]), batch_size=8)),
    "two_loaders": (TwoLoaders, two_loaders),
    "positional": (Positional, vector_data),
    "with_arguments": (WithArguments, vector_data),
    "non_reentrant": (NonReentrant, vector_data),
    "partly_frozen": (PartlyFrozen, vector_data),
}
every_module = pytest.mark.parametrize("name", MODULES)


@every_rule
@every_module
def test_trains(name, rule):
    make, data = MODULES[name]
    assert_trains(make(), data(), RULES[rule]())


@every_rule
@every_module
def test_slopes_are_those_of_backprop(name, rule):
    make, data = MODULES[name]
    assert_slopes_are_backprops(make(), data(), rule)


@every_rule
def test_padding_row_of_an_embedding_stays_untouched(rule):
    class Padded(Small):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 4, padding_idx=0), nn.Linear(4, 20)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            words, following = batch
            return F.cross_entropy(self.head(self.embedding(words)).flatten(0, 1), following.flatten())

    module = Padded()
    fitted(module, language_data(), RULES[rule]())
    assert torch.equal(module.embedding.weight[0], torch.zeros(4))


# --- other front doors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["backprop", *RULES])
def test_trainer_and_module_of_pytorch_lightning(rule):
    import pytorch_lightning as standalone

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def run(package: Any) -> tuple[dict[str, Tensor], float, dict[str, float]]:
        torch.manual_seed(3)
        body = {"training_step": training_step, "configure_optimizers": Small.configure_optimizers}
        module = type("Module", (package.LightningModule,), body)()
        module.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))
        watch = bpf.GradientAlignment(every_n_steps=1)
        trainer = package.Trainer(
            accelerator="cpu",
            max_epochs=2,
            callbacks=[bpf.Backprop() if rule == "backprop" else RULES[rule](), watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        trainer.fit(module, vector_data())
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return module.state_dict(), watch.mean_cosine, metrics

    found, expected = run(standalone), run(pl)
    assert all(torch.equal(found[0][name], expected[0][name]) for name in expected[0])
    assert found[1:] == expected[1:]
    assert found[2]["bpfree/active"] == 1.0


@pytest.mark.parametrize("rule", ["backprop", "zeroth_order"])
def test_compiled_module(rule):
    def run(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
        torch.manual_seed(3)
        module = Wrapped(lambda layer: layer)
        made = bpf.Backprop() if rule == "backprop" else bpf.ZerothOrder(2)
        fitted(wrap(module), vector_data(), made, max_epochs=4)
        return module.state_dict()

    eager, compiled_once = run(lambda module: module), run(compiled)
    for name, value in eager.items():
        assert torch.equal(compiled_once[name], value), name  # the backend "eager" runs the same kernels


@pytest.mark.parametrize("rule", ["forward_gradient", "one_by_one"])
def test_compiled_module_is_refused_by_forward_gradients(rule):
    with pytest.raises(MisconfigurationException, match=r"cannot train through torch\.compile"):
        fitted(compiled(Wrapped(lambda layer: layer)), vector_data(), RULES[rule]())
