"""Modules that nobody here wrote, or that are written as people do write them, train under the rules or are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from lightning.pytorch.utilities import CombinedLoader
from problems import fitted
from shipped import cases
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_bpfree as bpf
from lightning_bpfree.core.directions import Directions
from lightning_bpfree.core.params import dot, norm

STEPS = 3

RULES: dict[str, Callable[[], bpf.TrainingRule]] = cases("ANY_MODULE")
every_rule = pytest.mark.parametrize("rule", RULES)


class Slopes(pl.Callback):
    """Compares every estimate with `mean_k <g, v_k> v_k`, for the gradient `g` of backprop on the same noise."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def setup(self, trainer, pl_module, stage) -> None:
        (self.rule,) = [callback for callback in trainer.callbacks if isinstance(callback, bpf.TrainingRule)]
        self.rule.observers.append(self)

    def due(self, trainer) -> bool:
        return True

    def observe(self, trainer, module, step, estimate) -> None:
        params = [slot.parameter for slot in step.trained]
        with torch.enable_grad():
            grads = torch.autograd.grad(step.loss(recorded=False), params, allow_unused=True, materialize_grads=True)
        truth = {slot.name: grad for slot, grad in zip(step.trained, grads, strict=True)}
        directions = Directions(step.params, self.rule.num_directions, step.seed)
        slopes = [float(dot(truth, v)) for v in directions]
        expected = {
            name: sum(slope * v[name] for slope, v in zip(slopes, directions, strict=True)) / len(slopes)
            for name in truth
        }
        found = estimate.resolved()
        difference = norm({name: found[name] - expected[name] for name in expected})
        # An inner product is rounded relative to |g| |v|, be it itself small or not.
        self.errors.append(float(difference / norm(truth) / max(norm(v) for v in directions) ** 2))


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


def assert_trains(module: pl.LightningModule, data: Any, rule: bpf.TrainingRule, **settings: Any) -> list[float]:
    """Train for a few steps: losses are finite, and all that is to be trained has moved."""
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    losses = Losses()
    fitted(module, data, rule, losses, limit_train_batches=STEPS, limit_val_batches=0, **settings)
    assert len(losses.values) == STEPS
    assert all(map(math.isfinite, losses.values))
    for name, parameter in module.named_parameters():
        assert bool(torch.isfinite(parameter).all()), name
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    return losses.values


def assert_slopes_are_backprops(module: pl.LightningModule, data: Any, rule: str) -> None:
    """Compare all estimates of a few steps with backprop, in float64."""
    slopes = Slopes()
    made = bpf.ZerothOrder(2, sigma=1e-5) if rule == "zeroth_order" else RULES[rule]()
    fitted(module, data, made, slopes, limit_train_batches=STEPS, limit_val_batches=0, precision="64-true")
    assert len(slopes.errors) == STEPS
    # Equal maths in float64. Zeroth order: what a central difference neglects, chiefly at the kinks of ReLU within
    # sigma |v| < 1e-3 of the parameters; other dropout noise in one of its evaluations gives 1e-2 and more.
    assert max(slopes.errors) < (1e-4 if rule == "zeroth_order" else 1e-10), slopes.errors


# --- modules that train ---


def tokens(rows: int, length: int, vocabulary: int = 20) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def language_data() -> DataLoader:
    drawn = tokens(12, 9)
    return DataLoader(TensorDataset(drawn[:, :-1], drawn[:, 1:]), batch_size=4)


def vectors(rows: int = 24, features: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, features, generator=generator)
    return x, (x @ torch.randn(features, 3, generator=generator)).argmax(1)


def vector_data() -> DataLoader:
    return DataLoader(TensorDataset(*vectors()), batch_size=8)


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


class Small(pl.LightningModule):
    """Base of the modules below."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


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


class DictBatch(Small):
    """Takes a dictionary and returns one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        logits = self.net(batch["x"])
        return {"loss": F.cross_entropy(logits, batch["y"]), "logits": logits.detach()}


class TwoLoaders(DictBatch):
    """Takes one batch of each of two loaders."""

    def training_step(self, batch: dict[str, list[Tensor]], batch_idx: int) -> Tensor:
        x, y = batch["labelled"]
        (unlabelled,) = batch["unlabelled"]
        entropy = torch.distributions.Categorical(logits=self.net(unlabelled)).entropy().mean()
        return F.cross_entropy(self.net(x), y) + 0.1 * entropy


def two_loaders() -> CombinedLoader:
    x, y = vectors()
    unlabelled = DataLoader(TensorDataset(x.flip(0)), batch_size=4)
    return CombinedLoader({"labelled": DataLoader(TensorDataset(x, y), batch_size=8), "unlabelled": unlabelled})


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


# --- what forward-mode AD cannot do is refused, and never a zero or a wrong gradient ---


class Bagged(Small):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(20, 4), nn.Linear(4, 20)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        words, following = batch
        return F.cross_entropy(self.head(self.bag(words)), following[:, -1])


class Wrapped(Small):
    """A classifier whose first layer has been treated."""

    def __init__(self, treat: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(treat(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class Reentrant(DictBatch):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(checkpoint(self.net, x.requires_grad_(), use_reentrant=True), y)


class Square(torch.autograd.Function):
    """An operation as extensions bring it: with a backward pass and no forward derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)


class Extended(DictBatch):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), Squares(), nn.Linear(8, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


def compiled(layer: nn.Module) -> nn.Module:
    return torch.compile(layer, backend="eager")


def compiled_in_place(layer: nn.Module) -> nn.Module:
    layer.compile(backend="eager")
    return layer


UNSUPPORTED: dict[str, tuple[Callable[[], pl.LightningModule], Callable[[], Any], str, str]] = {
    "embedding_bag": (Bagged, language_data, r"bag \(EmbeddingBag\)", "nn.Embedding"),
    "weight_norm": (
        lambda: Wrapped(nn.utils.parametrizations.weight_norm),
        vector_data,
        r"net\.0 \(ParametrizedLinear\)",
        "remove_parametrizations",
    ),
    "old_weight_norm": (lambda: Wrapped(nn.utils.weight_norm), vector_data, r"net\.0 \(Linear\)", "remove_weight_norm"),
    "spectral_norm": (
        lambda: Wrapped(nn.utils.parametrizations.spectral_norm),
        vector_data,
        r"net\.0 \(ParametrizedLinear\)",
        "remove_parametrizations",
    ),
    "old_spectral_norm": (lambda: Wrapped(nn.utils.spectral_norm), vector_data, r"net\.0 \(Linear\)", "spectral_norm"),
    "compiled": (lambda: Wrapped(compiled), vector_data, r"net\.0 is compiled", "_orig_mod"),
    "compiled_in_place": (lambda: Wrapped(compiled_in_place), vector_data, r"net\.0 is compiled", "ZerothOrder"),
    "reentrant": (Reentrant, vector_data, "use_reentrant=True", "use_reentrant=False"),
    "extension": (Extended, vector_data, r"net\.1 \(Squares\)", "ZerothOrder"),
}


@pytest.mark.parametrize("rule", ["forward_gradient", "one_by_one"])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_layer_is_named_with_its_cure(name, rule):
    make, data, layer, cure = UNSUPPORTED[name]
    module = make()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=layer) as caught:
        fitted(module, data(), RULES[rule]())
    assert cure in str(caught.value)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_layers_train_without_derivatives(name):
    make, data, _, _ = UNSUPPORTED[name]
    assert_trains(make(), data(), bpf.ZerothOrder(2))


@pytest.mark.parametrize("frozen", [False, True])
def test_unsupported_layer_that_does_not_train_is_no_obstacle(frozen):
    module = Bagged()
    module.bag.requires_grad_(not frozen)
    before = module.bag.weight.detach().clone()
    slopes = Slopes()
    rule = bpf.ForwardGradient(2) if frozen else bpf.ForwardGradient(2, params="head.*")
    fitted(module, language_data(), rule, slopes, precision="64-true")
    assert max(slopes.errors) < 1e-10  # equal maths in float64
    assert torch.equal(module.bag.weight.float(), before)


class OwnTarget(DictBatch):
    """Learns from its own output, through which no gradient is to flow."""

    def __init__(self, stop: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.stop = stop

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, _ = batch
        return F.mse_loss(self.net(x), self.stop(self.net, x.flip(1)))


@torch.no_grad()
def decorated(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


def in_no_grad(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def copied_in_no_grad(net: nn.Module, x: Tensor) -> Tensor:
    output = net(x)
    memory = torch.zeros_like(output)
    with torch.no_grad():
        memory.mul_(0.9)
        memory.copy_(output)
    return memory


def in_grad_disabled(net: nn.Module, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        return net(x)


STOPS = [lambda net, x: net(x).detach(), decorated, in_no_grad, copied_in_no_grad, in_grad_disabled]


@pytest.mark.parametrize("rule", ["forward_gradient", "one_by_one"])
@pytest.mark.parametrize("stop", STOPS, ids=["detach", "decorated", "no_grad", "copied", "grad_disabled"])
def test_stopped_gradients_stop_tangents(stop, rule):
    assert_slopes_are_backprops(OwnTarget(stop), vector_data(), rule)


@pytest.mark.parametrize("rule", ["backprop", *RULES])
def test_manual_optimization_is_refused(rule):
    class Adversarial(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.discriminator = nn.Linear(2, 6), nn.Linear(6, 1)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            x, _ = batch
            generator, discriminator = self.optimizers()
            fake = self.generator(torch.randn(len(x), 2))
            loss = F.softplus(self.discriminator(fake.detach())).mean() + F.softplus(-self.discriminator(x)).mean()
            discriminator.zero_grad()
            self.manual_backward(loss)
            discriminator.step()
            generator.zero_grad()
            self.manual_backward(F.softplus(-self.discriminator(fake)).mean())
            generator.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.discriminator)]

    made = bpf.Backprop() if rule == "backprop" else RULES[rule]()
    with pytest.raises(MisconfigurationException, match="Adversarial sets automatic_optimization=False") as caught:
        fitted(Adversarial(), vector_data(), made)
    assert "lightning_bpfree.functional" in str(caught.value)


# --- objectives without a derivative ---


class Accuracy(Small):
    """Maximises the accuracy itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y = batch
        return 1 - (self.net(x).argmax(1) == y).double().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class InNumPy(Accuracy):
    """Computes its loss outside of torch, and returns a Python float."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> float:
        x, y = (tensor.detach().numpy() for tensor in batch)
        logits = x @ self.net.weight.detach().numpy().T + self.net.bias.detach().numpy()
        right = np.take_along_axis(logits, y[:, None], 1)
        return float(np.maximum(0, 1 + logits - right).mean())


@pytest.mark.parametrize("module", [Accuracy, InNumPy])
def test_objective_without_derivative_trains(module):
    x, y = vectors(64)
    data = DataLoader(TensorDataset(x, y), batch_size=64)
    model = module()

    def accuracy() -> float:
        return float((model.net(x).argmax(1) == y).float().mean())

    before = accuracy()
    # A wide sigma, for the accuracy is flat within a narrow one.
    fitted(model, data, bpf.ZerothOrder(8, sigma=0.1), max_epochs=60)
    assert accuracy() > before + 0.3


@pytest.mark.parametrize("rule", ["forward_gradient", "one_by_one"])
@pytest.mark.parametrize("module", [Accuracy, InNumPy])
def test_objective_without_derivative_has_no_forward_gradient(module, rule):
    model = module()
    before = model.net.weight.detach().clone()
    with pytest.raises(MisconfigurationException, match="No tangent arrives at the loss") as caught:
        fitted(model, vector_data(), RULES[rule]())
    assert "ZerothOrder()" in str(caught.value)
    assert torch.equal(model.net.weight, before)


# --- other front doors ---


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
    with pytest.raises(MisconfigurationException, match=r"cannot go through torch\.compile"):
        fitted(compiled(Wrapped(lambda layer: layer)), vector_data(), RULES[rule]())
