"""One ForwardForward rule over several fits and modules, and what it refuses."""

from __future__ import annotations

import copy
import types

import lightning.pytorch as pl
import pytest
import torch
from forward_forward_problems import problem
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import CallsTwice, NeverCalls, Problem, fitted, loader
from torch import nn

import lightning_bpfree as bpf
from lightning_bpfree.demos.nets import MLP
from lightning_bpfree.training.checks import check_fit

# --- one rule, several fits and modules ------------------------------------------------------------------------------


def test_a_fitted_module_can_be_fitted_again_by_another_rule_object_and_freed_from_a_copy():
    module = problem(lr=0.01)
    fitted(module, loader(), bpf.ForwardForward())
    fitted(module, loader(), bpf.ForwardForward())
    twin = copy.deepcopy(module.net)
    x = torch.randn(2, 6)
    bpf.ForwardForward(network="").uninstall(twin)
    assert torch.equal(twin(x), module.net.layers(x))
    assert not torch.equal(module.net(x), module.net.layers(x))


def test_another_rule_does_not_train_through_goodness_unnoticed():
    module, rule = problem(lr=0.01), bpf.ForwardForward()
    fitted(module, loader(), rule)
    with pytest.raises(MisconfigurationException, match=r"uninstall\(module\) first"):
        fitted(module, loader(), bpf.Backprop())
    rule.uninstall()
    fitted(module, loader(), bpf.Backprop())


def test_validating_before_the_fit_does_no_harm():
    class Tests(Problem):
        def test_step(self, batch, batch_idx):
            self.net(batch[0])

    torch.manual_seed(0)
    module, rule = Tests(MLP(6, [8, 8], 3), lr=0.1), bpf.ForwardForward(label="embedding", seed=5)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(callbacks=[rule], **options).test(module, loader(), verbose=False)
    before = rule.rule_state()["own"]["label_embedding"]["module"]["patterns"]
    fitted(module, loader(), rule)
    after = rule.rule_state()["own"]["label_embedding"]["module"]["patterns"]
    assert not torch.equal(before, after)


def test_a_second_module_starts_afresh_and_leaves_the_first_as_it_is():
    rule, one, two = bpf.ForwardForward(label="embedding"), problem(lr=0.1), Problem(MLP(6, [5, 5], 3), lr=0.1)
    fitted(one, loader(), rule)
    x = torch.randn(3, 6)
    expected = one.net(x)
    fitted(two, loader(), rule)
    assert torch.equal(one.net(x), expected)


def test_predictions_follow_the_rule_of_the_last_epoch():
    class Tests(Problem):
        def test_step(self, batch, batch_idx):
            self.seen = self.net(batch[0]), self.net.layers(batch[0])

    for window, by_goodness in (({"start_epoch": 5}, False), ({"stop_epoch": 1}, True), ({}, True)):
        torch.manual_seed(0)
        module = Tests(MLP(6, [8, 8], 3), lr=0.1)
        fitted(module, loader(), bpf.ForwardForward(**window)).test(module, loader(), verbose=False)
        assert torch.equal(*module.seen) != by_goodness


def test_factors_on_the_learning_rate_end_with_the_rules_epochs():
    plain, factored = problem(lr=0.1), problem(lr=0.1)
    fitted(plain, loader())
    fitted(factored, loader(), bpf.ForwardForward(start_epoch=1, learning_rates=[0, 1, 1]))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), factored.parameters(), strict=True))


def test_what_only_one_micro_batch_needs_learns_from_it():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.turn = nn.ModuleList([nn.Linear(6, 8), nn.Linear(6, 8)]), 0

        def forward(self, x):
            self.turn += 1
            return self.experts[self.turn % 2](x).relu()

    torch.manual_seed(0)
    module = Problem(nn.Sequential(Experts(), nn.Linear(8, 3)), lr=0.1)
    before = [p.clone() for p in module.net[0].parameters()]
    fitted(module, loader(rows=32), bpf.ForwardForward(["0"]), accumulate_grad_batches=2)
    assert not any(torch.equal(p, b) for p, b in zip(module.net[0].parameters(), before, strict=True))


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(2, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.one(x.view(len(x), 3, 2).transpose(0, 1)).mean(0))


class NoGraph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        with torch.no_grad():
            x = self.one(x)
        return self.head(x)


class Upstream(Problem):
    def __init__(self) -> None:
        super().__init__(MLP(6, [8], 3))
        self.before = nn.Linear(6, 6)

    def training_step(self, batch, index):
        return self.net(self.before(batch[0])).sum()


@pytest.mark.parametrize(
    ("module", "blocks", "error", "said"),
    [
        (lambda: Problem(SequenceFirst()), ["one"], ValueError, r"gives \(3, 32, 8\) for 32 samples.*batch_first"),
        (lambda: Problem(NoGraph()), ["one"], MisconfigurationException, "one ran without a graph.*no_grad"),
        (Upstream, 1, MisconfigurationException, r"before\.weight.*in no block"),
    ],
)
def test_what_would_train_nothing_or_nonsense_is_refused(module, blocks, error, said):
    with pytest.raises(error, match=said):
        fitted(module(), loader(), bpf.ForwardForward(blocks, network="net"))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prediction": "logits"}, "prediction='logits': choose 'goodness' or 'readout'"),
        ({"goodness": "max"}, "goodness='max'"),
        ({"length": "layer"}, "length='layer'"),
        ({"negatives": "easy"}, "negatives='easy'.* or a function"),
        ({"label": "corner"}, "label='corner'"),
        ({"schedule": "random"}, "schedule='random'"),
        ({"threshold": 0.0}, r"threshold=0\.0: give a positive number"),
        ({"temperature": -1.0}, "temperature"),
        ({"peer_normalization": -0.1}, "peer_normalization"),
        ({"first_block": -1}, "first_block"),
        ({"epochs_per_block": 0}, "epochs_per_block"),
        ({"num_classes": 1}, "num_classes"),
        ({"label": "none"}, "label='none' with negatives='wrong_label'"),
        ({"negatives": "hybrid"}, "pass label='none'"),
        ({"label": "none", "negatives": "hybrid"}, "prediction='readout'"),
        ({"label": "embedding", "embedding_lr": 0.0}, "lr"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        bpf.ForwardForward(**arguments)


@pytest.mark.parametrize(
    ("rule", "error", "said"),
    [
        (lambda: bpf.ForwardForward(first_block=3), ValueError, "first_block=3: there are 3 blocks"),
        (lambda: bpf.ForwardForward(learning_rates=[1.0]), ValueError, "one factor for each of the 3 blocks"),
        (lambda: bpf.ForwardForward(learning_rates=[1, 1, -1.0]), ValueError, r"learning_rates=\[1, 1, -1"),
        (lambda: bpf.ForwardForward([2, 2], prediction="readout"), ValueError, "every layer is in a block"),
        (lambda: bpf.ForwardForward(params="net.layers.6.*"), MisconfigurationException, "nothing would be trained"),
        (lambda: bpf.ForwardForward(["layers.2", "layers.4"]), MisconfigurationException, "weight.*in no block"),
        (lambda: bpf.ForwardForward(["layers.2", "layers.0", "layers.4"]), ValueError, "in the order layers.0"),
        (lambda: bpf.ForwardForward(num_classes=2), ValueError, "values from 0 to 2"),
        (lambda: bpf.ForwardForward(num_classes=6), ValueError, "6 labels do not fit into inputs of 6 values"),
        (lambda: bpf.ForwardForward(negatives=lambda x, y: y), ValueError, "true labels"),
        (lambda: bpf.ForwardForward(negatives=lambda x, y: y.float()), ValueError, "returned torch.float32"),
        (lambda: bpf.ForwardForward(labels=lambda batch: batch[0]), ValueError, r"shape \(16, 6\)"),
        (lambda: bpf.ForwardForward(network="accuracy"), ValueError, "no parameters|has no two layers"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_with_the_cure(rule, error, said):
    with pytest.raises(error, match=said):
        fitted(problem(), loader(), rule())


def test_the_number_of_labels_is_asked_for_where_layers_disagree():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.head, self.other = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 5)

    with pytest.raises(ValueError, match=r"widths \[3, 5\] at its end; pass the number"):
        bpf.ForwardForward(["one"], network="").install(Two())
    with pytest.raises(ValueError, match="no linear layer"):
        bpf.ForwardForward(["0"], network="").install(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()))


def test_greedy_needs_an_end():
    with pytest.raises(MisconfigurationException, match="pass epochs_per_block"):
        fitted(problem(), loader(), bpf.ForwardForward(schedule="greedy"), max_epochs=-1, max_steps=2)


def test_one_call_a_step():
    for kind, said in ((CallsTwice, "more than once.*torch.cat"), (NeverCalls, "never called")):
        with pytest.raises(MisconfigurationException, match=said):
            fitted(kind(MLP(6, [8], 3)), loader(), bpf.ForwardForward())


def test_compiled_networks_are_refused():
    module = problem()
    module.net.layers.compile()
    with pytest.raises(MisconfigurationException, match=r"torch\.compile"):
        fitted(module, loader(), bpf.ForwardForward())


def test_scalar_sync_is_refused():
    trainer = types.SimpleNamespace(strategy=bpf.ScalarSyncStrategy())
    with pytest.raises(MisconfigurationException, match="strategy='ddp'"):
        check_fit(bpf.ForwardForward(), ["ForwardForward"], trainer, problem())
