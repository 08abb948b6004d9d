"""A module, or a rule, that is copied, pickled or saved during a fit is whole, loads again, and holds no fit."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from conformance import Case
from problems import CALLS, Problem, fitted, loader
from shipped import cases
from torch import nn

import lightning_bpfree as bpf

RULES = cases("RULES")


class During(pl.Callback):
    """Calls a function inside of a fit: between two batches, and at the end of the epoch."""

    def __init__(self, function) -> None:
        self.function, self.made = function, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if batch_idx == 1:
            self.made.append(self.function(module))

    def on_train_epoch_end(self, trainer, module) -> None:
        self.made.append(self.function(module))


def saved(thing) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def loaded(data: bytes):
    return torch.load(io.BytesIO(data), weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": lambda thing: loaded(saved(thing)),
}


def scores(module: Problem, x: torch.Tensor) -> torch.Tensor:
    module.eval()
    with torch.no_grad():
        found = module.net(x)
    module.train()
    return found


def in_a_fit(rule, module, data, function):
    during = During(function)
    fitted(module, data, rule, during)
    return during.made


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", [name for name in RULES if name.startswith(("forward_forward", "team"))])
def test_a_copy_computes_the_same_and_is_independent(name, way):
    case, x = Case(RULES[name]), loader().dataset.tensors[0]
    module = case.problem()

    def copied(module):
        before = scores(module, x)
        made = WAYS[way](module)
        assert torch.equal(scores(made, x), before)
        return made, before

    for made, before in in_a_fit(case.make_rule(), module, case.problem.data(), copied):
        assert not {id(p) for p in made.modules()} & {id(p) for p in module.modules()}
        assert torch.equal(scores(made, x), before), "the fit went on with the original"


@pytest.mark.parametrize("name", ["ForwardForward", "TeamReinforce", "ForwardGradient", "EvolutionStrategy"])
def test_training_a_copy_moves_the_copy_alone(name):
    torch.manual_seed(0)
    module = Problem(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    make = getattr(bpf, name)
    (made, _) = in_a_fit(make(), module, loader(), copy.deepcopy)
    before, kept = [p.clone() for p in module.parameters()], [p.clone() for p in made.parameters()]
    CALLS[id(made)] = []
    made._metric_attributes = None  # in which Lightning keeps the ids of the original's metrics
    fitted(made, loader(), make())
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(kept, made.parameters(), strict=True))
    make().uninstall(made) if isinstance(make(), bpf.NetworkRule) else None
    assert "forward" not in made.net.__dict__


class Configured(Problem):
    """Holds its rule among its hyperparameters."""

    def __init__(self, rule=None) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
        self.save_hyperparameters()


SETTINGS = {
    "ForwardForward": {"label": "embedding", "peer_normalization": 0.1},
    "TeamReinforce": {"baseline": "critic", "exploration": "recurrent"},
    "ForwardGradient": {"guess": bpf.LocalLoss("linear")},
    "EvolutionStrategy": {"algorithm": "snes", "population_size": 4},
    "ZerothOrder": {},
    "Backprop": {},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_rule_among_hyperparameters_loads_again(name, tmp_path):
    rule = getattr(bpf, name)(**SETTINGS[name])
    module = Configured(rule)
    trainer = fitted(module, loader(), rule)
    for path in ("one.ckpt", "two.ckpt"):
        trainer.save_checkpoint(tmp_path / path)
    again = Configured.load_from_checkpoint(tmp_path / "two.ckpt", weights_only=False)
    assert type(again.hparams["rule"]) is type(rule)
    assert again.hparams["rule"].settings() == rule.settings()
    fitted(again, loader(), again.hparams["rule"])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_copy_of_a_rule_holds_no_fit(name):
    """Neither the Trainer nor anything of the user's module is in it, during the fit and after."""
    rule = getattr(bpf, name)(**SETTINGS[name])
    module = Configured()
    held = []

    class Spy(pickle.Pickler):
        def persistent_id(self, thing):
            if isinstance(thing, pl.Trainer) or any(thing is part for part in module.modules()):
                held.append(type(thing).__name__)
                return "held"
            return None

    def look(_):
        Spy(io.BytesIO()).dump(rule)
        return copy.deepcopy(rule)

    copies = in_a_fit(rule, module, loader(), look)
    look(module)
    assert held == []
    for made in copies:
        assert made.original_step is None
        fitted(Configured(), loader(), made)


@pytest.mark.filterwarnings("ignore:Made reversible")
@pytest.mark.parametrize("kind", ["LotteryTicket", "ReversibleRecompute"])
def test_a_copy_of_another_callback_holds_no_module(kind, tmp_path):
    module, held = _stacked(), []
    if kind == "LotteryTicket":
        own = bpf.LotteryTicket("magnitude", levels=1, dirpath=tmp_path)
    else:
        own = bpf.ReversibleRecompute("all")

    def look(_):
        class Spy(pickle.Pickler):
            def persistent_id(self, thing):
                if isinstance(thing, pl.Trainer) or any(thing is part for part in module.modules()):
                    held.append(type(thing).__name__)
                    return "held"
                return None

        Spy(io.BytesIO()).dump(own)

    in_a_fit(own, module, loader(), look)
    assert held == []


class Stacked(Problem):
    """A small transformer encoder, whose layers can be made reversible."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, norm_first=True, dropout=0.0)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        super().__init__(_Tokens(encoder))


class _Tokens(nn.Module):
    def __init__(self, encoder) -> None:
        super().__init__()
        self.first, self.encoder, self.head = nn.Linear(6, 8), encoder, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(self.first(x)[:, None])[:, 0])


def _stacked() -> Stacked:
    torch.manual_seed(0)
    return Stacked()


@pytest.mark.filterwarnings("ignore:Made reversible")
@pytest.mark.parametrize("way", WAYS)
def test_a_reversible_module_is_copied_whole(way):
    module, x = _stacked(), loader().dataset.tensors[0]
    recompute = bpf.ReversibleRecompute("all")
    for made in in_a_fit(recompute, module, loader(), lambda m: (WAYS[way](m), scores(m, x))):
        assert torch.equal(scores(made[0], x), made[1])
        before = [p.clone() for p in module.parameters()]
        kept = [p.clone() for p in made[0].parameters()]
        CALLS[id(made[0])] = []
        made[0]._metric_attributes = None  # in which Lightning keeps the ids of the original's metrics
        fitted(made[0], loader(), bpf.ReversibleRecompute())
        assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(kept, made[0].parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ForwardForward", "TeamReinforce", "ZerothOrder"])
def test_a_saved_module_loads_in_another_process(name, tmp_path):
    rule = getattr(bpf, name)(**SETTINGS[name])
    path, x = tmp_path / "module.pt", loader().dataset.tensors[0]
    module = Configured(rule)
    found = in_a_fit(rule, module, loader(), lambda m: (torch.save(m, path), scores(m, x))[1])
    code = (
        "import sys, torch, problems; m = torch.load(sys.argv[1], weights_only=False).eval(); "
        "print(float(m.net(problems.loader().dataset.tensors[0]).double().sum()))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert float(run.stdout) == pytest.approx(float(found[-1].double().sum()), rel=1e-12)
