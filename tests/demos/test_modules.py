"""The demo classifier trains, logs and schedules as it says; the demo networks have the shapes they say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn

from lightning_bpfree.demos.data import DigitsDataModule
from lightning_bpfree.demos.modules import MLP, Classifier, SmallCNN, SmallTransformer

SHAPES = [(1, 8, 8), (1, 28, 28), (1, 1, 40), (3, 5, 7)]
ACTIVATIONS = ["relu", "gelu", "tanh", "hardswish"]


def trainer(**kwargs: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", devices=1, **{**quiet, **kwargs})


# ---------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_networks_give_logits(shape: tuple[int, int, int], activation: Any) -> None:
    x = torch.randn(3, *shape)
    nets: list[nn.Module] = [SmallTransformer(shape, 7, dim=16, depth=1, heads=2)]
    for norm in ("none", "layer", "batch"):
        nets.append(MLP(math.prod(shape), [9, 5], 7, activation, norm))
    for norm in ("none", "group", "batch"):
        nets.append(SmallCNN(shape, [4, 6, 12], 7, norm, activation))  # type: ignore[arg-type]
    for net in nets:
        assert net(x).shape == (3, 7)
        assert net.eval()(x[:1]).shape == (1, 7)


def test_mlp_without_hidden_layers_is_linear() -> None:
    net = MLP(64, [], 10)
    assert [tuple(p.shape) for p in net.parameters()] == [(10, 64), (10,)]


@pytest.mark.parametrize("shape", SHAPES)
def test_cnn_sees_every_pixel_and_pools_to_a_small_head(shape: tuple[int, int, int]) -> None:
    net = SmallCNN(shape, [8, 8], 10, activation="tanh")
    x = torch.randn(2, *shape, requires_grad=True)
    net(x).square().sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).all())
    assert net.head.in_features <= 8 * 16


def test_cnn_averages_whole_windows_and_the_rest_at_the_edge() -> None:
    net = SmallCNN((1, 5, 7), [2], 10)
    pool = net.features[-1]
    assert torch.equal(pool(torch.ones(1, 2, 5, 7)), torch.ones(1, 2, 3, 4))


@pytest.mark.parametrize("patch", [(1, 6), (2, 3), (4, 2)])
def test_transformer_tokens_are_the_patches(patch: tuple[int, int]) -> None:
    net = SmallTransformer((3, 4, 6), dim=8, heads=2, depth=1, patch=patch)
    seen: list[torch.Tensor] = []
    net.embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 3, 4, 6)
    net(x)
    assert torch.equal(seen[0], F.unfold(x, patch, stride=patch).transpose(1, 2))


def test_transformer_layers_start_out_different_and_rows_are_the_default_tokens() -> None:
    net = SmallTransformer((1, 28, 28), depth=2)
    first, second = net.encoder.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    assert net.position.shape == (28, 64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(0), "in_features=0: give a whole number of at least 1"),
        (lambda: MLP(4, [3, -1]), r"hidden=\[3, -1\]: give a list of whole numbers of at least 1"),
        (lambda: MLP(4, activation="swish"), "activation='swish': choose 'relu'"),  # type: ignore[arg-type]
        (lambda: MLP(4, norm="group"), "norm='group': choose 'none'"),  # type: ignore[arg-type]
        (lambda: SmallCNN((8, 8)), r"in_shape=\(8, 8\): give a list of 3"),  # type: ignore[arg-type]
        (lambda: SmallCNN((1, 0, 8)), r"in_shape=\(1, 0, 8\): give a list of 3"),
        (lambda: SmallCNN(channels=[]), r"channels=\[\]: give a list of whole numbers of at least 1"),
        (lambda: SmallCNN(channels=[0]), r"channels=\[0\]: give a list of whole numbers of at least 1"),
        (lambda: SmallCNN(norm="layer"), "norm='layer': choose 'none'"),  # type: ignore[arg-type]
        (lambda: SmallTransformer((1, 8, 8), patch=(3, 8)), "patch is 3 x 8.*8 x 8"),
        (lambda: SmallTransformer(patch=(0, 8)), r"patch=\(0, 8\): give a list of 2"),
        (lambda: SmallTransformer(dim=30, heads=4), "dim is 30 and heads 4"),
        (lambda: SmallTransformer(depth=0), "depth=0: give a whole number of at least 1"),
        (lambda: SmallTransformer(dropout=1.0), r"dropout=1\.0: give a number in \[0"),
        (lambda: MLP(64)(torch.zeros(2, 1, 28, 28)), r"MLP was built for .*\('B', 64\), got \(2, 784\)"),
        (lambda: SmallCNN()(torch.zeros(2, 64)), r"SmallCNN was built for .*\('B', 1, 8, 8\), got \(2, 64\)"),
        (lambda: SmallTransformer()(torch.zeros(2, 1, 8, 4)), "SmallTransformer was built for"),
        (lambda: Classifier(MLP(), lr=0.0), r"lr=0\.0: give a positive number"),
        (lambda: Classifier(MLP(), num_classes=1), "num_classes=1: give a whole number of at least 2"),
        (lambda: Classifier(MLP(), momentum=1.0), r"momentum=1\.0: give a number in \[0"),
        (lambda: Classifier(MLP(), weight_decay=-0.1), r"weight_decay=-0\.1: give a number of at least 0"),
        (lambda: Classifier(MLP(), warmup_steps=-1), "warmup_steps=-1: give a whole number of at least 0"),
        (lambda: Classifier(MLP(), label_smoothing=1.5), r"label_smoothing=1\.5: give a number in \[0"),
        (lambda: Classifier(MLP(), optimizer="lion"), "optimizer='lion': choose 'sgd'"),  # type: ignore[arg-type]
        (lambda: Classifier(MLP(), lr_schedule="linear"), "lr_schedule='linear': choose 'constant' or 'cosine'"),  # type: ignore[arg-type]
    ],
)
def test_bad_sizes_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------- classifier


@pytest.mark.parametrize(
    ("net", "optimizer", "lr"),
    [
        (lambda: MLP(64, [64], 10), "sgd", 0.1),
        (lambda: SmallCNN((1, 8, 8), [8, 16], 10, norm="group"), "adam", 0.01),
        (lambda: SmallTransformer((1, 8, 8), 10, dim=32, depth=1), "adamw", 0.005),
    ],
)
def test_one_epoch_on_digits_is_far_above_chance(net: Any, optimizer: Any, lr: float) -> None:
    torch.manual_seed(0)
    data, model = DigitsDataModule(batch_size=16), Classifier(net(), optimizer=optimizer, lr=lr)
    run = trainer(max_epochs=1)
    run.fit(model, data)
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert set(logged) == {"train_loss", "train_acc", "val_loss", "val_acc"}
    assert logged["val_acc"] > 0.7
    assert logged["val_loss"] < 0.7 * math.log(10)
    assert 0.3 < logged["train_acc"] < 1


def test_logged_values_are_means_over_all_samples_without_smoothing() -> None:
    # 143 = 2 * 64 + 15 samples: a mean over batches would not do.
    data, model = DigitsDataModule(), Classifier(MLP(64, [32], 10), label_smoothing=0.5)
    run = trainer()
    for split in ("val", "test"):
        result = (run.validate if split == "val" else run.test)(model, data, verbose=False)[0]
        x, y = data.dataset(split).tensors
        with torch.no_grad():
            logits = model(x)
        assert result[f"{split}_loss"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
        assert result[f"{split}_acc"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))


def test_training_loss_is_smoothed() -> None:
    data, model = DigitsDataModule(batch_size=2000), Classifier(MLP(64, [32], 10), label_smoothing=0.5)
    run = trainer(max_steps=1, limit_val_batches=0)
    data.setup()
    x, y = data.dataset("train").tensors
    with torch.no_grad():
        want = float(F.cross_entropy(model(x), y, label_smoothing=0.5))
    run.fit(model, data)
    assert float(run.callback_metrics["train_loss"]) == pytest.approx(want, rel=1e-5)


def test_prediction_gives_probabilities_for_pairs_and_bare_inputs() -> None:
    data, model = DigitsDataModule(), Classifier(MLP())
    pairs = torch.cat(trainer().predict(model, data))  # type: ignore[arg-type]
    x = data.dataset("test").tensors[0]
    bare = torch.cat(trainer().predict(model, [x]))  # type: ignore[arg-type]
    assert pairs.shape == (359, 10)
    torch.testing.assert_close(pairs.sum(1), torch.ones(359))
    torch.testing.assert_close(pairs, bare)


@pytest.mark.parametrize(
    ("name", "kind", "extra"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9}),
        ("adam", torch.optim.Adam, {}),
        ("adamw", torch.optim.AdamW, {}),
    ],
)
def test_optimizer_and_its_settings(name: Any, kind: type, extra: dict[str, float]) -> None:
    model = Classifier(MLP(), lr=0.3, optimizer=name, momentum=0.9, weight_decay=0.01)
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer) is kind
    for key, value in {"lr": 0.3, "weight_decay": 0.01, **extra}.items():
        assert optimizer.param_groups[0][key] == value
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in MLP().parameters()
    )


class Rates(Callback):
    """Records the learning rate that each step uses."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize(("schedule", "warmup"), [("cosine", 0), ("cosine", 3), ("constant", 3)])
def test_learning_rate_follows_the_schedule(schedule: Any, warmup: int) -> None:
    rates, steps = Rates(), 9
    model = Classifier(MLP(), lr=0.2, lr_schedule=schedule, warmup_steps=warmup)
    run = trainer(max_steps=steps, limit_val_batches=0, callbacks=[rates])
    run.fit(model, DigitsDataModule())
    want = [0.2 * (k + 1) / warmup for k in range(warmup)]
    for k in range(steps - warmup):
        want.append(0.2 if schedule == "constant" else 0.1 * (1 + math.cos(math.pi * k / (steps - warmup))))
    assert rates.seen == pytest.approx(want)
    end = run.optimizers[0].param_groups[0]["lr"]
    assert end == pytest.approx(0.2 if schedule == "constant" else 0.0, abs=1e-12)


@pytest.mark.parametrize(("warmup", "limits"), [(5, {"max_steps": 5}), (0, {"max_epochs": -1})])
def test_a_cosine_with_no_room_is_refused(warmup: int, limits: dict[str, int]) -> None:
    model = Classifier(MLP(), lr_schedule="cosine", warmup_steps=warmup)
    with pytest.raises(ValueError, match=f"warmup_steps={warmup}.*max_epochs or max_steps"):
        trainer(**limits).fit(model, DigitsDataModule())
    trainer(fast_dev_run=warmup or 1).fit(model, DigitsDataModule())


def test_hyperparameters_are_saved_without_the_network() -> None:
    hparams = dict(Classifier(MLP(), lr=0.5).hparams)
    assert "net" not in hparams
    assert hparams["lr"] == 0.5


def test_configuration_files_can_name_everything() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=LightningModule)
    parser.add_argument("--data", type=LightningDataModule)
    demos = "lightning_bpfree.demos"
    nets = {
        "MLP": {"in_features": 64, "hidden": [8], "activation": "tanh"},
        "SmallCNN": {"in_shape": [1, 8, 8], "channels": [4, 8]},
        "SmallTransformer": {"in_shape": [1, 8, 8], "patch": [4, 4]},
    }
    modules = ["DigitsDataModule", "MNIST1DDataModule", "FashionMNISTDataModule", "MNISTDataModule"]
    for net, net_args in nets.items():
        args = {"net": {"class_path": f"{demos}.modules.{net}", "init_args": net_args}, "num_classes": 10, "lr": 0.01}
        for data in modules:
            config = {
                "model": {"class_path": f"{demos}.modules.Classifier", "init_args": args},
                "data": {"class_path": f"{demos}.data.{data}", "init_args": {"batch_size": 8, "train_size": 100}},
            }
            made = parser.instantiate_classes(parser.parse_object(config))
            assert made.model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
            assert (made.data.batch_size, made.data.train_size) == (8, 100)
