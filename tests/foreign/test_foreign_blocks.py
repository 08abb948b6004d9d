"""Networks that others wrote under rules that work on blocks: called by keywords, with labels, returning objects."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from foreign_networks import (
    BERT_BLOCKS,
    CLASSES,
    NETS,
    Called,
    OutsideLoss,
    OwnLoss,
    Tuples,
    bert,
    rules,
    texts,
    trains,
    vectors,
)
from foreign_problems import Small
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from problems import fitted
from torch import Tensor, nn

import lightning_bpfree as bpf


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
