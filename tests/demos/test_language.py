"""Losses and accuracies are those of the predicted positions, each counted once; schedules meet the same losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from problems import fitted
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_bpfree as bpf
from lightning_bpfree.demos.language import LanguageModel
from lightning_bpfree.demos.masking import IGNORED

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")

TOKENS = 11


class Net(nn.Module):
    """Tokens see their neighbor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(TOKENS, 8), nn.Linear(16, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(torch.cat((x, x.roll(1, 1)), -1))


def batches(*counts: int, length: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Batches of three sequences, with so many labels in each batch."""
    generator, made = torch.Generator().manual_seed(0), []
    for count in counts:
        tokens = torch.randint(TOKENS, (3, length), generator=generator)
        labels = torch.full_like(tokens, IGNORED)
        places = torch.randperm(tokens.numel(), generator=generator)[:count]
        labels.view(-1)[places] = torch.randint(TOKENS, (count,), generator=generator)
        made.append((tokens, labels))
    return made


def loader(*counts: int) -> DataLoader[Any]:
    return DataLoader(batches(*counts), batch_size=None)  # type: ignore[arg-type]


def by_hand(model: LanguageModel, data: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean loss and accuracy by a loop over positions."""
    losses, right = [], []
    for tokens, labels in data:
        logits = model(tokens).detach()
        for row in range(len(tokens)):
            for place, label in enumerate(labels[row].tolist()):
                if label != IGNORED:
                    scores = logits[row, place]
                    losses.append(float(torch.logsumexp(scores, 0) - scores[label]))
                    right.append(int(scores.argmax()) == label)
    return sum(losses) / len(losses), sum(right) / len(right)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_logged_values_are_means_over_all_predicted_positions(stage: str) -> None:
    # batches with 2, 9 and 5 labels: a mean over batches, or over sequences, would not do
    model = LanguageModel(Net(), TOKENS)
    run = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    found = (run.validate if stage == "val" else run.test)(model, loader(2, 9, 5), verbose=False)[0]
    loss, accuracy = by_hand(model, batches(2, 9, 5))
    assert found == {f"{stage}_loss": pytest.approx(loss, rel=1e-5), f"{stage}_acc": pytest.approx(accuracy)}


class Losses(Callback):
    """What is logged and what is returned, at each step."""

    def __init__(self) -> None:
        self.logged: list[float] = []
        self.returned: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.logged.append(float(trainer.callback_metrics["train_loss"]))
        self.returned.append(float(outputs["loss"]))


def test_the_training_loss_is_logged_at_every_step() -> None:
    model, seen = LanguageModel(Net(), TOKENS, lr=1e-9), Losses()
    fitted(model, loader(2, 9, 5), seen)
    assert seen.logged == seen.returned
    want = [by_hand(model, [batch])[0] for batch in batches(2, 9, 5)]
    assert seen.logged == pytest.approx(want, rel=1e-5)


def test_other_positions_do_not_matter() -> None:
    model = LanguageModel(Net(), TOKENS, label_smoothing=0.2)
    (tokens, labels), *_ = batches(4)
    model.trainer = None
    model.log = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    loss = model.training_step((tokens, labels), 0)
    want = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, label_smoothing=0.2)
    torch.testing.assert_close(loss, want)


def test_prediction_gives_probabilities_of_tokens() -> None:
    model = LanguageModel(Net(), TOKENS)
    chances = model.predict_step(batches(4)[0], 0)
    assert chances.shape == (3, 6, TOKENS)
    torch.testing.assert_close(chances.sum(-1), torch.ones(3, 6))


@pytest.mark.parametrize(
    "rule", [bpf.ForwardGradient(2), bpf.ForwardGradient(4, chunk_size=4), bpf.ZerothOrder(2)], ids=["1", "4", "zo"]
)
def test_rules_without_backprop_can_train_it(rule: Any) -> None:
    model = LanguageModel(Net(), TOKENS, lr=0.01)
    before = model.net.head.weight.detach().clone()
    fitted(model, loader(9, 9), rule)
    assert not torch.equal(model.net.head.weight, before)


def test_optimizer_settings_are_those_of_the_classifier() -> None:
    model = LanguageModel(Net(), TOKENS, lr=0.3, optimizer="adamw", weight_decay=0.01)
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.3, 0.01)


def test_a_checkpoint_brings_its_settings_back(tmp_path: Path) -> None:
    model = LanguageModel(Net(), TOKENS, lr=0.3)
    fitted(model, loader(3)).save_checkpoint(tmp_path / "model.ckpt")
    again = LanguageModel.load_from_checkpoint(tmp_path / "model.ckpt", net=Net())
    assert dict(again.hparams) == dict(model.hparams)
    assert (again.vocab_size, again.hparams["lr"]) == (TOKENS, 0.3)
    assert torch.equal(again.net.head.weight, model.net.head.weight)


def test_configuration_files_can_name_it_with_its_data() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=LightningModule)
    parser.add_argument("--data", type=LightningDataModule)
    net = {"class_path": "torch.nn.Embedding", "init_args": {"num_embeddings": 129, "embedding_dim": 129}}
    args = {"net": net, "lr": 0.02, "optimizer": "adam", "lr_schedule": "cosine"}
    config = {
        "model": {"class_path": "lightning_bpfree.demos.language.LanguageModel", "init_args": args},
        "data": {
            "class_path": "lightning_bpfree.demos.text.StandardLibraryTextDataModule",
            "init_args": {"max_sequences": 8, "batch_size": 4},
        },
    }
    made = parser.instantiate_classes(parser.parse_object(config))
    run = fitted(made.model, made.data)
    assert run.global_step == 2
    # untrained, it is not far from guessing
    assert float(run.callback_metrics["val_loss"]) == pytest.approx(math.log(129), rel=0.5)
    with pytest.raises(Exception, match="num_classes"):  # a vocabulary has a name of its own
        parser.parse_object({"model": {**config["model"], "init_args": {**args, "num_classes": 129}}})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LanguageModel(Net(), 1), "vocab_size=1: give a whole number of at least 2"),
        (lambda: LanguageModel(Net(), TOKENS, lr=0.0), r"lr=0\.0: give a positive number"),
        (
            lambda: step(LanguageModel(Net(), 12)),
            r"logits of shape \(3, 6, 11\) for labels of shape \(3, 6\) and vocab",
        ),
        (lambda: step(LanguageModel(nn.Flatten(), 6)), r"logits of shape \(3, 6\) for labels of shape \(3, 6\)"),
        (lambda: step(LanguageModel(Net(), TOKENS), 0), "all labels of the batch are -100: .*mask some tokens"),
    ],
)
def test_bad_input_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def step(model: LanguageModel, count: int = 4) -> Tensor:
    return model.training_step(batches(count)[0], 0)
