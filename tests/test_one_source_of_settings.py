"""A setting that is set on the object is the one that training uses and `settings()` says, for rules and companions."""

from __future__ import annotations

import logging

import pytest
import torch
from conformance import assert_equal, state
from problems import Problem, fitted, loader
from torch import nn

import lightning_bpfree as bpf


def sequential() -> Problem:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return Problem(net, lr=0.05)


def trained(rule: bpf.TrainingRule) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = sequential()
    fitted(module, loader(rows=32), rule, max_epochs=2)
    return state(module)


GUESS = bpf.LocalLoss("mlp", blocks=1)
CHANGES = {
    "zeroth_order": (bpf.ZerothOrder, {}, {"sigma": 0.5, "num_directions": 2, "scheme": "forward"}),
    "forward_gradient": (bpf.ForwardGradient, {}, {"num_directions": 3, "directions": "rademacher", "chunk_size": 1}),
    "chunks": (bpf.ForwardGradient, {"num_directions": 4, "chunk_size": 1}, {"chunk_size": 2, "num_directions": 6}),
    "guess": (bpf.ForwardGradient, {}, {"guess": GUESS, "space": "activations"}),
    "no_guess": (bpf.ForwardGradient, {"guess": GUESS}, {"guess": None}),
    "target": (bpf.ForwardGradient, {"guess": GUESS}, {"target": "local", "space": "activations"}),
    "algorithm": (bpf.EvolutionStrategy, {"population_size": 8}, {"algorithm": bpf.SepCMAES(0.3), "maximize": True}),
    "population": (bpf.EvolutionStrategy, {}, {"population_size": 6, "mirrored": False, "chunk_size": 2}),
    "threshold": (bpf.ForwardForward, {}, {"threshold": 5.0, "temperature": 2.0, "length": "unit"}),
    "blocks": (bpf.ForwardForward, {}, {"blocks": 2, "learning_rates": [0.3]}),
    "readout": (bpf.ForwardForward, {}, {"prediction": "readout", "negatives": "hard"}),
    "embedding": (bpf.ForwardForward, {}, {"label": "embedding", "embedding_lr": 0.3, "peer_normalization": 0.1}),
    "unit": (bpf.TeamReinforce, {}, {"unit": "sign", "num_samples": 2, "units": "net.1"}),
    "credit": (bpf.TeamReinforce, {}, {"credit": "weight_max", "baseline": "critic", "critic_lr": 0.1}),
    "exploration": (bpf.TeamReinforce, {}, {"exploration": "boltzmann", "lateral_lr": 0.2, "learning_rates": 0.1}),
    "epochs": (bpf.Backprop, {}, {"start_epoch": 1, "params": "net.4.*"}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_attributes_are_what_training_uses(case):
    kind, start, changes = CHANGES[case]
    changed = kind(**start)
    for name, value in changes.items():
        setattr(changed, name, value)
    given = kind(**{**start, **changes})
    assert_equal(trained(changed), trained(given))
    assert changed.settings() == given.settings()
    if kind is not bpf.Backprop:  # there are no others to tell apart
        assert any(
            not torch.equal(a, b) for a, b in zip(trained(given).values(), trained(kind(**start)).values(), strict=True)
        )


@pytest.mark.parametrize("case", ["threshold", "blocks", "unit", "credit", "guess", "algorithm"])
def test_between_two_fits_as_well(case):
    kind, start, changes = CHANGES[case]
    rule = kind(**start)
    trained(rule)
    for name, value in changes.items():
        setattr(rule, name, value)
    again = kind(**{**start, **changes})
    again.load_state_dict({**rule.state_dict(), "streams": []}) if case != "algorithm" else None
    assert rule.settings() == again.settings()
    trained(rule)  # with what the new settings ask for


def test_a_setting_reaches_a_network_that_is_installed_already():
    torch.manual_seed(0)
    module, rule = sequential(), bpf.ForwardForward()
    rule.install(module)
    x = torch.randn(4, 6)
    before = module.net(x)
    rule.goodness = "mean"
    rule.install(module)
    other = sequential()
    other.load_state_dict(module.state_dict())
    bpf.ForwardForward(goodness="mean").install(other)
    assert torch.equal(module.net(x), other.net(x))
    assert not torch.equal(module.net(x), before)


@pytest.mark.parametrize(
    ("rule", "name", "value", "said"),
    [
        (bpf.ForwardForward(), "threshold", -1, "ForwardForward: threshold=-1: give a positive number"),
        (bpf.ZerothOrder(), "scheme", "forwrad", "ZerothOrder: scheme='forwrad': choose 'central' or 'forward'"),
        (bpf.EvolutionStrategy(), "population_size", 7, "population_size=7 is odd"),
        (bpf.TeamReinforce(), "num_samples", 1, "num_samples=1 with baseline='leave_one_out'"),
        (bpf.ForwardGradient(), "network", "nett", "network='nett' is not a part of Problem"),
        (bpf.Backprop(), "stop_epoch", 0, "stop_epoch=0"),
        (bpf.Backprop(), "start_epoch", float("nan"), "start_epoch=nan: give a whole number of at least 0"),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, bpf.TrainingRule) else None,
)
def test_attributes_are_checked_when_a_fit_starts(rule, name, value, said):
    setattr(rule, name, value)
    with pytest.raises(ValueError, match=said):
        fitted(sequential(), loader(), rule)


def test_the_settings_of_parts_are_checked_too():
    guess = bpf.LocalLoss()
    rule = bpf.ForwardGradient(guess=guess)
    guess.lr = -1.0
    with pytest.raises(ValueError, match=r"LocalLoss: lr=-1\.0: give a positive number"):
        fitted(sequential(), loader(), rule)
    unit = bpf.Gaussian()
    rule = bpf.TeamReinforce(unit=unit)
    unit.variance = 0.0
    with pytest.raises(ValueError, match=r"Gaussian: variance=0\.0"):
        fitted(sequential(), loader(), rule)


# --- nothing that is given is ignored -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bpf.ForwardGradient(guess=bpf.LocalLoss(), target=None), "target=None: give 'global', 'local' or a"),
        (lambda: bpf.ForwardGradient(guess=bpf.LocalLoss(), network="nett"), "blocks and network differ"),
        (lambda: bpf.ForwardGradient(labels=lambda batch: batch), "labels are for local losses"),
        (lambda: bpf.ForwardForward(epochs_per_block=2), "epochs_per_block=2 is for schedule='greedy'"),
        (lambda: bpf.ForwardForward(embedding_lr=0.1), "embedding_lr=0.1 is for label='embedding'"),
        (lambda: bpf.TeamReinforce(critic_lr=0.1), "critic_lr=0.1 with baseline='leave_one_out', which has no critic"),
        (lambda: bpf.TeamReinforce(lateral_lr=0.1), "lateral_lr=0.1 with exploration=Independent"),
        (lambda: bpf.TeamReinforce(negative_phase=True), "negative_phase=True with exploration=Independent"),
        (lambda: bpf.MapPropagation(guard=0.5), "guard=0.5 needs gate=True"),
        (lambda: bpf.LotteryTicket(keep=0.5, sparsities=[0.0, 0.5]), "with sparsities=.*which replaces them"),
        (lambda: bpf.ReversibleRecompute(max_error=0.1), "max_error=0.1 with stacks=None, which converts nothing"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_would_be_ignored_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("name", ["splitt", "find_unused_parameters"])
def test_the_strategy_takes_no_keyword_that_it_has_no_use_for(name):
    with pytest.raises(
        TypeError, match=f"ScalarSyncStrategy: {name}='directions': there is no such argument; nearest: "
    ):
        bpf.ScalarSyncStrategy(**{name: "directions"})
    assert bpf.ScalarSyncStrategy(process_group_backend="gloo").split == "data"


# --- companions -----------------------------------------------------------------------------------------------------


def test_a_lottery_ticket_goes_by_its_attributes(tmp_path, caplog):
    tickets = bpf.LotteryTicket("magnitude", levels=2, dirpath=tmp_path)
    tickets.levels, tickets.keep, tickets.scope = 3, 0.5, "layer"
    assert tickets.settings()["sparsities"] == "[0.0, 0.5, 0.75]"
    with caplog.at_level(logging.INFO):
        fitted(sequential(), loader(), tickets, max_epochs=3)
    assert [round(result["sparsity"], 2) for result in tickets.results] == [0.0, 0.5, 0.75]
    tickets.keep = 2.0
    with pytest.raises(ValueError, match=r"LotteryTicket: keep=2\.0: give a number in \(0, 1\)"):
        fitted(sequential(), loader(), tickets, max_epochs=3)


def test_reversible_recompute_goes_by_its_attributes():
    callback = bpf.ReversibleRecompute()
    callback.schedule, callback.stacks, callback.store_last = "checkpoint", ["net"], 1
    layer = nn.TransformerEncoderLayer(6, 2, 8, norm_first=True, batch_first=True)
    module = Problem(nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Sequential(layer), nn.Flatten(), nn.Linear(6, 3)))
    callback.stacks = ["net.1"]
    with pytest.warns(bpf.FunctionChangedWarning):
        fitted(module, loader(), callback)
    (stack,) = callback.conversion.stacks
    assert (stack.schedule, stack.recomputations[0].store_last) == ("checkpoint", 1)
    assert callback.settings()["store_last"] == 1
    callback.store_last = -1
    with pytest.raises(ValueError, match="ReversibleRecompute: store_last=-1"):
        fitted(module, loader(), callback)


def test_gradient_alignment_goes_by_its_attributes():
    alignment = bpf.GradientAlignment(1)
    alignment.every_n_steps = 2
    fitted(sequential(), loader(), bpf.Backprop(), alignment)
    assert alignment.measured == 2  # of 4 steps
    alignment.every_n_steps = 0
    with pytest.raises(ValueError, match="GradientAlignment: every_n_steps=0"):
        fitted(sequential(), loader(), bpf.Backprop(), alignment)
