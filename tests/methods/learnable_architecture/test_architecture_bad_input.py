"""What cannot work is refused before the first batch, with the reason and a cure."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from searched_networks import Module, ResNet, loader, search, trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_bpfree as bpf
from lightning_bpfree.demos.nets import MLP, SmallTransformer


def refused(callback, module, *others: pl.Callback, data=None, **settings) -> str:
    with pytest.raises((MisconfigurationException, ValueError)) as found:
        trainer(callback, *others, **settings).fit(module, loader(6) if data is None else data)
    return str(found.value)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.between, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.between(self.grouped(self.first(x))).relu().mean((2, 3)))


class Mixing(nn.Module):
    """Mixes channels by code of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(torch.softmax(self.first(x), -1)).relu())


class Fixed(nn.Module):
    """Reads all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.crop = nn.Conv2d(1, 4, 3, padding=1), bpf.FrequencyCrop([8, 8])
        self.head = nn.Linear(4 * 64, 3)

    def forward(self, x):
        return self.head(self.crop(self.conv(x)).flatten(1))


def test_a_budget_below_the_smallest_network_says_the_smallest():
    said = refused(search(0.001), Module(MLP(6, [24, 16], 3)))
    smallest = 6 + 1 + 3
    assert f"the smallest network that these sizes allow takes {smallest}" in said
    assert "give a budget of at least that" in said
    said = refused(search(5000.0, relative=False), Module(MLP(6, [24, 16], 3)))
    assert "the largest network takes 576" in said


@pytest.mark.parametrize(
    ("net", "shape", "said"),
    [
        (Grouped(), (1, 8, 8), "grouped: a convolution in 4 groups of several channels"),
        (SmallTransformer((1, 4, 4), 3, dim=8, heads=2), (1, 4, 4), "nn.MultiheadAttention computes all its heads"),
        (Mixing(), (6,), "first (its channels are mixed by code outside of layers"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3)), (6,),
         "its weight is parametrized"),
        (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 4), nn.ReLU(),
                       nn.Linear(4, 3)), (6,), "a norm without weights"),
    ],
    ids=["grouped", "attention", "mixing", "parametrized", "norm without weights"],
)  # fmt: skip
def test_layers_that_cannot_be_masked_are_named(net, shape, said):
    message = refused(search(0.9, network="net"), Module(net), data=loader(*shape))
    assert said in message
    assert "strict=False" in message


def test_they_are_skipped_only_with_strict_false():
    callback = search(0.9, ("width",), network="net", strict=False, tolerance=0.1)
    with pytest.warns(UserWarning, match="leaves the width of some layers as it is: .*grouped"):
        trainer(callback, max_epochs=1).fit(Module(Grouped()), loader(1, 8, 8))
    assert list(callback.sizes) == ["width/between"]
    callback = search(0.9, ("width",), network="net", exclude=["first", "grouped"], tolerance=0.1)
    trainer(callback, max_epochs=1).fit(Module(Grouped()), loader(1, 8, 8))
    assert list(callback.sizes) == ["width/between"]


def test_sizes_that_there_are_not_are_named():
    module = Module(MLP(6, [8], 3))
    assert "'depth' needs lists of residual blocks" in refused(search(0.5, ("width", "depth")), module)
    assert "'kernel' needs ContinuousConv" in refused(search(0.5, ("kernel",)), Module(MLP(6, [8], 3)))
    assert "'resolution' needs FrequencyCrop" in refused(search(0.5, ("resolution",)), Module(MLP(6, [8], 3)))
    with pytest.raises(ValueError, match=r"dims=\(\): name at least one"):
        search(0.5, ())
    with pytest.raises(ValueError, match="dims=\\['height'\\]"):
        search(0.5, ["height"])


def test_a_resolution_that_a_layer_reads_whole_is_named():
    said = refused(search(0.5, ("resolution",), network="net"), Module(Fixed()), data=loader(1, 8, 8))
    assert "resolution/crop.0 cannot be lower, for a layer behind it needs all positions" in said
    assert "leave 'resolution' out of dims" in said


def test_two_callbacks_that_own_the_sizes_are_refused():
    module = Module(MLP(6, [8], 3))
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `LearnableArchitecture`"):
        trainer(search(0.5), search(0.5))  # by Lightning itself
    run = trainer(search(0.5))
    run.callbacks.append(search(0.5))
    with pytest.raises(MisconfigurationException, match="two callbacks own the sizes"):
        run.fit(module, loader(6))
    callback = search(0.5)
    trainer(callback, max_epochs=1).fit(module, loader(6))
    assert "another callback owns the sizes of this module already" in refused(search(0.5), module)
    callback.undo()
    trainer(search(0.5), max_epochs=1).fit(module, loader(6))


BESIDE = {
    "LotteryTicket": (lambda: bpf.LotteryTicket(levels=2, score="magnitude"), "prunes and rewinds weights"),
    "DeepEnsemble": (lambda: bpf.DeepEnsemble(2), "trains members whose sizes would differ"),
    "ReversibleRecompute": (lambda: bpf.ReversibleRecompute(), "recomputes blocks of one width"),
    "ForwardForward": (lambda: bpf.ForwardForward(), "trains each block by a loss of its own"),
    "TeamReinforce": (lambda: bpf.TeamReinforce(), "trains layers by rewards"),
    "DirectFeedbackAlignment": (lambda: bpf.DirectFeedbackAlignment(), "feedback matrices of fixed shapes"),
    "EvolutionStrategy": (lambda: bpf.EvolutionStrategy(), "evaluates a population in stacked tensors"),
    "StochasticWeightAveraging": (
        lambda: pl.callbacks.StochasticWeightAveraging(0.1),
        "averages networks of different sizes",
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_other_callbacks_that_cannot_work_are_refused_with_the_reason(name):
    make, reason = BESIDE[name]
    # First among the callbacks, so that it is the one that refuses.
    said = refused(search(0.5), Module(MLP(6, [8], 3)), make())
    assert f"LearnableArchitecture beside {name}, which" in said
    assert reason in said


def test_a_rule_that_leaves_the_sizes_out_is_refused():
    said = refused(search(0.5), Module(MLP(6, [8], 3)), bpf.ForwardGradient(2, params="net.*"))
    assert "no gradient of the loss reaches the sizes" in said
    assert "learnable_architecture.*" in said


def test_manual_optimization_is_refused():
    module = Module(MLP(6, [8], 3))
    module.automatic_optimization = False
    assert "needs automatic optimization" in refused(search(0.5), module)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(6), torch.tensor(0)


def test_an_example_of_the_inputs_is_asked_for():
    data = DataLoader(Endless(), 4)
    said = refused(search(0.5), Module(MLP(6, [8], 3)), data=data, limit_train_batches=2)
    assert "set example_input_array in the module, or give example_inputs=" in said
    said = refused(search(0.5, example_inputs=torch.zeros(1, 7)), Module(MLP(6, [8], 3)))
    assert "MLP was built for inputs of shape" in said
    assert "example_inputs=" in said
    module = Module(MLP(6, [8], 3))
    module.example_input_array = torch.zeros(1, 6)
    trainer(search(0.5), max_epochs=1, limit_train_batches=2).fit(module, data)
    said = refused(search(0.5, network="body"), Module(MLP(6, [8], 3)))
    assert "network='body' is not a part of Module; its children with parameters: net" in said


class NoForward(pl.LightningModule):
    """What many people write: a network, and a step that calls it."""

    def __init__(self, **others: nn.Module) -> None:
        super().__init__()
        self.net = MLP(6, [8], 3)
        for name, other in others.items():
            self.add_module(name, other)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def test_without_a_forward_the_only_network_is_found():
    callback = search(0.7, ("width",), tolerance=0.1)
    trainer(callback, max_epochs=2).fit(NoForward(loss=nn.CrossEntropyLoss()), loader(6))
    assert min(callback.sizes.values()) < 8
    said = refused(search(0.7), NoForward(head=nn.Linear(3, 3)))
    assert "NoForward has 2 children with parameters (net, head)" in said
    assert "network='net'" in said


def test_a_checkpoint_of_other_sizes_is_refused(tmp_path):
    path = tmp_path / "one.ckpt"
    run = trainer(search(0.7, network="net"), max_epochs=1)
    run.fit(Module(ResNet()), loader(1, 8, 8))
    run.save_checkpoint(path)
    with pytest.raises(ValueError, match="the checkpoint's sizes are not those of this network \\(depth/"):
        trainer(search(0.7, ("width", "depth"), network="net"), max_epochs=2).fit(
            Module(ResNet()), loader(1, 8, 8), ckpt_path=path, weights_only=True
        )


def test_a_size_that_collapses_is_clamped_and_logged(tmp_path):
    callback = search(0.5, fix_at=1.0)

    class Collapse(pl.Callback):
        def on_train_batch_start(self, run, module, batch, index) -> None:
            with torch.no_grad():
                callback.architecture.axes[0].size.fill_(-1.0)

    run = trainer(callback, Collapse(), max_epochs=1, log_every_n_steps=1, logger=pl.loggers.CSVLogger(tmp_path))
    run.logger.log_metrics = lambda *_, **__: None
    run.logger.save = lambda: None
    run.fit(Module(MLP(6, [24, 16], 3)), loader(6))
    assert callback.search.collapsed == {"width/net.layers.0": 4}
    assert run.logged_metrics["bpfree/architecture/collapsed"] == 4
    assert all(size >= 1 for size in callback.sizes.values())


def test_results_are_there_after_a_fit_only():
    callback = search(0.5)
    for look in (lambda: callback.sizes, lambda: callback.export(), lambda: callback.cost_over_budget):
        with pytest.raises(RuntimeError, match="finds its sizes when a fit starts"):
            look()
