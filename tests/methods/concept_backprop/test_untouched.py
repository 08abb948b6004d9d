"""A network that is looked at is what it would be had nobody looked: bit for bit, under every rule, in every mode."""

import copy
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from problems import Problem, fitted, loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_bpfree as bpf
from lightning_bpfree.methods.concept_backprop.change import ChangeSettings, change_concept
from lightning_bpfree.methods.concept_backprop.concepts import Concept
from lightning_bpfree.methods.concept_backprop.detection import collect_activations, detect_concepts
from lightning_bpfree.methods.concept_backprop.probe import LinearProbe


class Validated(Problem):
    def validation_step(self, batch, index):
        pass

    def test_step(self, batch, index):
        pass


CONCEPTS = {"first": lambda x, y: x[:, 0] > 0, "class 0": lambda x, y: y == 0}
QUICK = ChangeSettings(steps=3)


def analysis(**settings):
    options = {
        "layers": ["net.inner", "net.act"],
        "forward": "net",
        "change": QUICK,
        "pictures": False,
        "num_inputs": 4,
    }
    return bpf.ConceptBackprop(CONCEPTS, **{**options, **settings})


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def trained(*callbacks, data="val", seed=3, **settings):
    """Train a module with dropout, BatchNorm, tied and frozen weights on shuffled batches."""
    pl.seed_everything(seed)
    module = Validated()
    owner = torch.Generator().manual_seed(5)
    train = DataLoader(loader().dataset, batch_size=16, shuffle=True, generator=owner)
    val = loader(seed=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(module, train, val)
    ends = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), owner.get_state()
    return module, trainer, ends


@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.parametrize("data", ["val", "train"])
def test_a_fit_is_the_same_with_and_without(data):
    plain, _, plain_ends = trained()
    looked, trainer, ends = trained(analysis(data=data))
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), looked.state_dict().values(), strict=True)
    )
    for before, after in zip(plain.gradients, looked.gradients, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(plain_ends[0], ends[0])
    assert plain_ends[1:3] == ends[1:3]
    assert torch.equal(plain_ends[3], ends[3])
    callback = trainer.callbacks[0]
    assert [record["epoch"] for record in callback.history] == [0, 1, 2]


class Restless(pl.LightningModule):
    """Moves whatever a forward pass can move."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5, momentum=0.5)
        self.last = nn.Linear(5, 3)
        self.accuracy = MulticlassAccuracy(3)
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.count += 1
        noise = torch.rand(()) + random.random() + np.random.rand()
        self.norm.train()  # some modules set their own mode
        self.log("noise", noise)
        logits = self.last(self.norm(self.first(x)) + 0 * noise)
        self.accuracy.update(logits, torch.zeros(len(x), dtype=torch.int64))
        return logits


def everything(module):
    numpy_state = np.random.get_state()
    return (
        state(module),
        {n: (p.requires_grad, None if p.grad is None else p.grad.clone()) for n, p in module.named_parameters()},
        {n: part.training for n, part in module.named_modules()},
        (module.calls, module.accuracy._update_count, module.accuracy.tp.clone()),
        (torch.get_rng_state(), random.getstate(), numpy_state[1].tolist(), numpy_state[2]),
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("inference", [False, True])
def test_nothing_moves_in_a_module_that_moves_everything(inference):
    module = Restless()
    module.last.requires_grad_(False)
    module.first.weight.grad = torch.randn(5, 6)
    module.norm.eval()
    x = torch.randn(60, 6)
    before = everything(module)
    with torch.inference_mode(inference):
        report = bpf.ConceptBackprop(
            {"first": lambda x, y: x[:, 0] > 0}, "first", change=QUICK, num_inputs=4, pictures=False
        ).analyze(module, [(x, x)])
    assert same(before, everything(module))
    assert report.changes["first"].changed.shape == (4, 6)


def test_an_error_leaves_nothing_behind_either():
    module, x = Restless(), torch.randn(4, 6)
    before = everything(module)

    def broken(module, x):
        module(x)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        collect_activations(module, [x], "last", forward=broken)
    assert same(before, everything(module))
    assert not module.first._forward_hooks


def test_modules_and_inputs_of_inference_mode():
    """Parameters and buffers that were made in inference mode cannot be differentiated through, and are not touched."""
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 5))
        net[2].weight = net[2].weight  # inference tensors all
        x = torch.randn(80, 6)
    own = {name: id(p) for name, p in net.named_parameters()}
    twin = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 5))
    twin.load_state_dict(net.state_dict())
    concepts = {"first": lambda x, y: x[:, 0] > 0}
    made = [
        bpf.ConceptBackprop(concepts, "2", change=QUICK, num_inputs=4, pictures=False).analyze(m, [(x, x)])
        for m in (net, twin)
    ]
    assert torch.equal(made[0].changes["first"].changed, made[1].changes["first"].changed)
    assert own == {name: id(p) for name, p in net.named_parameters()}
    assert all(p.is_inference() for p in net.parameters())


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_lightning_evaluates_in_inference_mode(stage):
    module = Validated()
    seen = []
    module.on_validation_epoch_end = module.on_test_epoch_end = lambda: seen.append(torch.is_inference_mode_enabled())
    callback = analysis()
    before = state(module)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=[callback]
    )
    getattr(trainer, stage)(module, loader(), verbose=False)
    assert seen == [True]
    assert same(before, state(module))
    assert callback.report.changes["first"].changed.shape == (4, 6)
    assert "bpfree/concept/first/net.act/score" in trainer.callback_metrics
    assert "bpfree/concept/first/reached" in trainer.callback_metrics


def test_layers_that_work_in_place():
    """What a layer gives is taken before the next one overwrites it, with and without gradients."""
    torch.manual_seed(0)
    inplace = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 2), nn.ReLU(inplace=True))
    plain = copy.deepcopy(inplace)
    plain[1], plain[3] = nn.ReLU(), nn.ReLU()
    x = torch.randn(60, 6)
    concept = [Concept("first", lambda x, y: x[:, 0] > 0)]
    for layers in (["0"], ["0", "1"], ["1"], ["0", "2"]):
        made = [collect_activations(net, [(x, x)], layers, concept) for net in (inplace, plain)]
        assert same(made[0].features, made[1].features)
        probes = [detect_concepts(part, concept)["first", layers[0]].probe for part in made]
        changes = [
            change_concept(net, x[:5], probe, QUICK, others=[probe])
            for net, probe in zip((inplace, plain), probes, strict=True)
        ]
        assert torch.equal(changes[0].changed, changes[1].changed)


def test_layers_that_return_tuples():
    torch.manual_seed(0)
    net = nn.LSTM(4, 5, batch_first=True)
    outer = nn.Sequential(net)
    x = torch.randn(50, 7, 4)
    concept = [Concept("last", lambda x, y: x[:, -1, 0] > 0)]
    samples = collect_activations(outer, [(x, x)], "0", concept, pool="last", whole=False)
    assert torch.equal(samples.features["0"], net(x)[0][:, -1].detach())


@pytest.mark.parametrize(
    "rule",
    [
        lambda: bpf.ForwardForward(prediction="readout"),
        lambda: bpf.EvolutionStrategy(population_size=4),
        lambda: bpf.ForwardGradient(),
    ],
    ids=["forward_forward", "evolution", "forward_gradient"],
)
@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")
def test_rules_train_on_as_if_nobody_looked_and_gradients_reach_the_input(rule):
    from lightning_bpfree.demos.modules import MLP, Classifier

    def run(*callbacks):
        pl.seed_everything(1)
        module = Classifier(MLP(6, [8, 8], 3), num_classes=3, lr=0.1)
        fitted(module, loader(shuffle=True), *callbacks, max_epochs=2)
        return module

    look = bpf.ConceptBackprop(
        CONCEPTS, ["net.layers.1", "net.layers.3"], data="train", change=ChangeSettings(steps=20), pictures=False
    )
    plain, looked = run(rule()), run(rule(), look)
    assert same(state(plain), state(looked))
    change = look.report.changes["first"]
    probe = look.report.detections["first", "net.layers.3"].probe
    absent = change.before < 0.5
    assert (change.after > change.before)[absent].float().mean() > 0.8  # some have no slope: their ReLUs are silent
    # through all blocks: Forward-Forward cuts the graph between them only while it trains
    deep = change_concept(looked, change.inputs, probe, ChangeSettings(steps=20))
    assert (deep.after > deep.before)[deep.before < 0.5].float().mean() > 0.8


def test_probes_of_all_layers_come_from_one_pass():
    calls = []
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
    net.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(90, 6)
    batches = [(part, part) for part in x.split(30)]
    concepts = [Concept("a", lambda x, y: x[:, 0] > 0), Concept("b", lambda x, y: x[:, 1] > 0)]
    samples = collect_activations(net, batches, "*", concepts)
    assert len(calls) == len(batches)
    assert len(detect_concepts(samples, concepts)) == 8
    assert torch.equal(samples.features["3"], torch.cat([net(part).detach() for part in x.split(30)]))


def test_a_pass_ends_at_the_layer():
    calls = []
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5))
    net[2].register_forward_hook(lambda *_: calls.append(1))
    probe = LinearProbe("c", "1", "binary", torch.ones(5), torch.tensor(0.0))
    change_concept(net, torch.randn(3, 6), probe, ChangeSettings(steps=7))
    assert len(calls) == 2  # outputs before and after


def test_a_shuffled_loader_takes_no_random_numbers():
    data = DataLoader(TensorDataset(torch.randn(50, 6), torch.arange(50) % 2), batch_size=20, shuffle=True)
    net = nn.Sequential(nn.Linear(6, 3))
    before = torch.get_rng_state()
    bpf.ConceptBackprop({"odd": lambda x, y: y == 1}, "0", change=None).analyze(net, data)
    assert torch.equal(before, torch.get_rng_state())
