"""Networks that others wrote under rules that work on blocks: called by keywords, with labels, returning objects."""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from foreign_problems import Small
from lightning.fabric.utilities.exceptions import MisconfigurationException
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


@pytest.mark.parametrize("wanted", [OwnLoss, OutsideLoss, Tuples])
@pytest.mark.parametrize("rule", ["goodness", "readout", "hard", "local", "guess", "team", "team_samples"])
@pytest.mark.parametrize("net", NETS)
def test_transformers_train_under_rules_for_blocks(net: str, rule: str, wanted: type[OwnLoss]) -> None:
    make, data, blocks = NETS[net]
    parts = ("embeddings", "layer.0" if net == "bert" else "layers.0", "layer.1" if net == "bert" else "layers.1")
    trains(wanted(make()), data(), rules(blocks)[rule], parts if not rule.startswith("team") else ("embeddings",))


@pytest.mark.parametrize("rule", ["goodness", "readout", "team", "team_samples"])
def test_evaluation_returns_objects_too(rule: str) -> None:
    module, loader = OwnLoss(bert()), texts()
    fitted(module, loader, rules(BERT_BLOCKS)[rule], limit_val_batches=0)
    batch = next(iter(loader))
    module.eval()
    with torch.no_grad():
        with_labels, without = module.net(**batch), module.net(input_ids=batch["input_ids"])
        assert torch.allclose(with_labels.logits, without.logits) or rule == "team_samples"  # which draws
    assert with_labels.logits.shape == (4, CLASSES)
    assert without.loss is None
    assert with_labels.loss.dim() == 0
    if rule in ("goodness", "team"):
        assert torch.allclose(with_labels.loss, F.cross_entropy(with_labels.logits, batch["labels"]), atol=1e-5)


def test_feedback_alignment_takes_logits_and_refuses_an_inner_loss_with_the_cure() -> None:
    rule = bpf.DirectFeedbackAlignment(BERT_BLOCKS)
    module = OwnLoss(bert())
    with pytest.raises(MisconfigurationException, match=r"compute the loss in training_step.*\.logits"):
        fitted(module, texts(), rule, limit_val_batches=0)
    trains(OutsideLoss(bert()), texts(), bpf.DirectFeedbackAlignment(BERT_BLOCKS), ("layer.0", "layer.1"))


# --- outputs and calls of every form ---------------------------------------------------------------------------------


class Named(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclasses.dataclass
class Record:
    logits: Tensor
    features: Tensor


class Form(nn.Sequential):
    """Returns its scores in one form or another."""

    def __init__(self, form: str) -> None:
        super().__init__(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, CLASSES))
        self.form = form

    def forward(self, mask: Tensor | None = None, x: Tensor | None = None) -> Any:
        assert x is not None
        scores, features = super().forward(x if mask is None else x * mask), x.sum(1)
        if self.form == "dict":
            return {"logits": scores, "features": features}
        return Named(scores, features) if self.form == "named" else Record(scores, features)


class Keyword(Small):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.net = Form(form)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        output = self.net(x=batch["x"], mask=torch.ones(len(batch["x"]), 6))
        logits = output["logits"] if isinstance(output, dict) else output.logits
        return F.cross_entropy(logits, batch["label"])


def vectors() -> DataLoader:
    drawn = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(Dicts("x", drawn, "label"), batch_size=4)


@pytest.mark.parametrize("form", ["dict", "named", "record"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: bpf.ForwardForward(seed=1),
        lambda: bpf.ForwardForward(prediction="readout", seed=1),
        lambda: bpf.ForwardGradient(guess=bpf.LocalLoss(), target="local", seed=1),
        lambda: bpf.ForwardGradient(guess=bpf.LocalLoss(), space="activations", seed=1),
        lambda: bpf.TeamReinforce(seed=1),
    ],
)
def test_keywords_and_outputs_of_every_form(form: str, make: Any) -> None:
    trains(Keyword(form), vectors(), make(), ("net.0", "net.2"))


def test_the_same_call_by_position_gives_the_same_weights() -> None:
    """Keywords are another way to write a call, and no other call."""

    class Position(Keyword):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(nn.Sequential.forward(self.net, batch["x"]), batch["label"])

    class Plain(Small):
        def __init__(self, by_keyword: bool) -> None:
            super().__init__()
            self.by_keyword = by_keyword
            self.net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, CLASSES))

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            scores = self.net(input=batch["x"]) if self.by_keyword else self.net(batch["x"])
            return F.cross_entropy(scores, batch["label"])

    for make in (bpf.ForwardForward, bpf.TeamReinforce):
        found = []
        for by_keyword in (False, True):
            torch.manual_seed(0)
            module = Plain(by_keyword)
            fitted(module, vectors(), make(seed=1), limit_val_batches=0)
            found.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        assert torch.equal(*found), make.__name__


# --- refusals, whose cure works --------------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self, modules: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 12), nn.Linear(12, CLASSES)
        self.act = nn.ReLU() if modules else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        if self.act is None:
            return self.two(F.relu(h))
        return self.two(self.act(h))


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


class TakesDict(nn.Sequential):
    def forward(self, batch: Any = None, *, x: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        return super().forward(batch["x"] if x is None else x)


def test_activations_that_are_functions_are_refused_with_the_line_to_change() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"Functional\.forward, line \d+: return self\.two\(F\.relu.*nn\.ReLU\(\)"
    ):
        fitted(Called(Functional(modules=False)), vectors(), bpf.TeamReinforce(), limit_val_batches=0)
    trains(Called(Functional(modules=True)), vectors(), bpf.TeamReinforce(seed=1), ("one", "two"))


@pytest.mark.parametrize("make", [bpf.ForwardForward, bpf.TeamReinforce])
def test_a_dict_as_argument_is_refused_and_keywords_work(make: Any) -> None:
    def net() -> nn.Module:
        return TakesDict(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, CLASSES))

    class ByKeywords(Called):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(**batch), batch["label"])

    module = Called(net(), "dict")
    with pytest.raises(MisconfigurationException, match=r"Call it by keywords, network\(\*\*batch\)"):
        fitted(module, vectors(), make(), limit_val_batches=0)
    fitted(module, vectors(), bpf.Backprop(), limit_val_batches=0)  # nothing was left behind
    trains(ByKeywords(net()), vectors(), make(seed=1), ("net.0",))


# --- a fit that fails leaves nothing behind --------------------------------------------------------------------------


class Fails(Callback):
    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.fail)

    def fail(self, *_: Any, **__: Any) -> None:
        raise KeyError("outside")


def overridden(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if "forward" in part.__dict__ or part._forward_hooks]


HOOKS = ["on_fit_start", "on_sanity_check_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("make", [bpf.ForwardForward, bpf.TeamReinforce])
def test_a_fit_that_fails_before_it_trains_leaves_no_override(make: Any, hook: str) -> None:
    module = Called(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, CLASSES)))
    with pytest.raises(KeyError, match="outside"):
        fitted(module, vectors(), make(), Fails(hook))
    assert overridden(module) == []
    fitted(module, vectors(), bpf.Backprop(), limit_val_batches=0)


@pytest.mark.parametrize("make", [bpf.ForwardForward, bpf.TeamReinforce])
def test_a_fit_that_fails_goes_back_to_what_an_earlier_one_has_left(make: Any) -> None:
    module, rule = Called(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, CLASSES))), make(seed=1)
    fitted(module, vectors(), rule, limit_val_batches=0)
    before = overridden(module)
    assert before
    with pytest.raises(KeyError):
        fitted(module, vectors(), rule, Fails("on_train_start"), limit_val_batches=0)
    assert overridden(module) == before


# --- what is suggested works -----------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """No chain that shows its order, with two of them inside."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.classifier(self.features(pixel_values))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(30, 8), nn.LayerNorm(8)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)])
        self.head = nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.norm(self.embed(input_ids))
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Scores(OwnLoss):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        batch = dict(batch)
        labels = batch.pop("labels")
        output = self.net(**batch)
        return F.cross_entropy(getattr(output, "logits", output), labels)


SUGGESTED = {
    "convolutions": (Convolutions, images),
    "words": (Words, texts),
    "bert": (bert, texts),
    "vit": (vit, images),
}


@pytest.mark.parametrize("net", SUGGESTED)
@pytest.mark.parametrize("rule", ["goodness", "local"])
def test_the_suggested_blocks_work(net: str, rule: str) -> None:
    """What the message says is written into the call, and trains all but the layer of the output."""
    make, loader = SUGGESTED[net]
    module = Scores(make())
    given = rules(1)[rule]
    with pytest.raises(MisconfigurationException, match=r"name its blocks by patterns, such as blocks=\[") as refused:
        fitted(module, loader(), given, limit_val_batches=0)
    fitted(module, loader(), bpf.Backprop(), limit_val_batches=0)  # nothing was left behind
    said = re.search(r"such as blocks=(\[.*?\]), in the order", str(refused.value))
    assert said is not None
    blocks = ast.literal_eval(said[1])
    module = Scores(make())
    before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    fitted(module, loader(), rules(blocks)[rule], limit_val_batches=0)
    moved = {name for name, p in module.net.named_parameters() if not torch.equal(p, before[name])}
    named = [name for block in blocks for name in ([block] if isinstance(block, str) else block)]
    for name in named:
        if any(p.dim() > 1 for p in module.net.get_submodule(name).parameters()):
            assert any(other.startswith(name) for other in moved), name
    assert not {"head", "classifier"} & set(named)  # what makes the output is no block


def test_labels_written_over_the_input_of_a_convolution_are_warned_of() -> None:
    module = Scores(Convolutions())
    blocks = [["features.0", "features.1", "features.2"], ["features.3", "features.4"]]
    with pytest.warns(UserWarning, match="label='overlay'.*Pass label='embedding'"):
        fitted(module, images(), bpf.ForwardForward(blocks, num_classes=CLASSES), limit_val_batches=0)
    rule = bpf.ForwardForward(blocks, label="embedding", num_classes=CLASSES)
    fitted(Scores(Convolutions()), images(), rule, limit_val_batches=0)


def test_a_team_at_chance_is_told_once_what_to_try() -> None:
    drawn = torch.randn(600, 6, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(Dicts("x", drawn, "label"), batch_size=100)  # labels do not depend on the inputs

    class Still(Called):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Still(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, CLASSES)))
    with pytest.warns(UserWarning, match="25.0% are by chance. Try another learning rate") as heard:
        fitted(module, loader, bpf.TeamReinforce(seed=1), limit_val_batches=0, max_epochs=3)
    assert len([w for w in heard if "by chance" in str(w.message)]) == 1
