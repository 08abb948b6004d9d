"""What cannot work is refused before the first batch, or at it, with the cure in the message."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import Problem, fitted, loader
from torch import nn

import lightning_bpfree as bpf
from lightning_bpfree.methods.concept_backprop.concepts import Concept
from lightning_bpfree.methods.concept_backprop.detection import collect_activations, detect_concepts
from lightning_bpfree.methods.concept_backprop.layers import find_layers, pooled

with torch.random.fork_rng():
    torch.manual_seed(0)
    NET = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    X = torch.randn(60, 6)
FIRST = Concept("first", lambda x, y: x[:, 0] > 0)


def look(concepts, layers="1", batches=None, net=NET, **settings):
    callback = bpf.ConceptBackprop(concepts, layers, change=None, **settings)
    return callback.analyze(net, [(X, X)] if batches is None else batches)


def test_layers_that_do_not_exist_name_the_nearest():
    module = Problem()
    with pytest.raises(ValueError, match=r"'net.iner' is not a submodule of Problem.*'net.inner'"):
        find_layers(module, "net.iner")
    with pytest.raises(ValueError, match=r"layers=\[\]"):
        find_layers(module, [])


def test_layers_are_refused_before_anything_is_trained():
    module = Problem()
    with pytest.raises(ValueError, match=r"'net.iner' is not a submodule"):
        fitted(module, loader(), bpf.ConceptBackprop({"first": lambda x, y: x[:, 0] > 0}, "net.iner"))
    assert module.evaluations == 0


@pytest.mark.parametrize(
    ("label", "kind", "match"),
    [
        (lambda x, y: torch.ones(len(x)), "binary", "one class only: 60 with it and 0 without"),
        (lambda x, y: torch.arange(len(x)) < 3, "binary", "too few examples: 3 with it and 57 without"),
        (lambda x, y: torch.zeros(len(x)), "continuous", "one value only"),
        (lambda x, y: torch.ones(len(x) - 1), "binary", r"labels of shape \(59,\) for 60 samples"),
        (lambda x, y: x[:, 0], "binary", "kind='continuous'"),
        (lambda x, y: x[:, 0] * torch.inf, "continuous", "infinite labels"),
        (lambda x, y: torch.full((len(x),), torch.nan), "continuous", "too few examples in 0 samples"),
    ],
)
def test_labels_that_no_probe_can_learn(label, kind, match):
    with pytest.raises(ValueError, match=match):
        look(Concept("c", label, kind=kind))


def test_concepts_that_are_none():
    with pytest.raises(ValueError, match="give one of label=, key= and examples=, not none"):
        Concept("c")
    with pytest.raises(ValueError, match="not label and key"):
        Concept("c", lambda x, y: y, key="y")
    with pytest.raises(ValueError, match="3 labels for 4 examples"):
        Concept("c", examples=(torch.zeros(4, 2), torch.zeros(3)))
    with pytest.raises(ValueError, match="without '/'"):
        Concept("a/b", key="y")
    with pytest.raises(ValueError, match="each with a name of its own"):
        bpf.ConceptBackprop([FIRST, FIRST], "1")


def test_batches_of_other_forms():
    batch = {"x": X, "y": X[:, 0] > 0}
    report = look({"first": "y"}, batches=[batch], inputs="x")
    assert report.detections["first", "1"].samples == 60
    with pytest.raises(ValueError, match=r"a mapping with keys \['x', 'y'\]"):
        look({"first": "y"}, batches=[batch])
    with pytest.raises(ValueError, match=r"'first': the batch has no 'z'; it has \['x', 'y'\]"):
        look({"first": "z"}, batches=[batch], inputs="x")
    with pytest.raises(ValueError, match="no batch"):
        look(FIRST, batches=[])


def test_examples_of_ones_own_are_looked_at_beside_the_data():
    own = torch.randn(40, 6)
    concepts = [FIRST, Concept("own", examples=(own, own[:, 1] > 0))]
    samples = collect_activations(NET, [(X, X)], "1", concepts)
    assert samples.features["1"].shape == (100, 5)
    assert samples.labels["own"][:60].isnan().all()
    found = detect_concepts(samples, concepts)
    assert (found["first", "1"].samples, found["own", "1"].samples) == (60, 40)


def test_shapes_that_change_between_batches():
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(0, 0))
    batches = [(torch.randn(30, 2, length), torch.zeros(30)) for length in (8, 9)]
    concept = Concept("c", lambda x, y: x[:, 0, 0] > 0)
    with pytest.raises(ValueError, match=r"changes its shape between batches \(18, 21 features.*pool='mean'"):
        collect_activations(net, batches, "0", [concept], whole=False)
    pooled_rows = collect_activations(net, batches, "0", [concept], pool=lambda h: h.mean(2), whole=False)
    assert pooled_rows.features["0"].shape == (60, 3)
    with pytest.raises(ValueError, match="pool='last' takes no activations"):
        pooled(torch.zeros(2, 3), "last")


def test_layers_that_do_not_run_or_run_twice_or_swallow_samples():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.part, self.unused = nn.Linear(6, 6), nn.ModuleList([nn.Linear(6, 6)])

        def forward(self, x):
            return self.part(self.part(x))

    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(6, 6)

        def forward(self, x):
            return self.part(x.repeat(3, 1))[: len(x)]

    with pytest.raises(ValueError, match="runs twice in one forward pass"):
        look(FIRST, "part", net=Twice())
    with pytest.raises(ValueError, match=r"\['unused'\] do not run"):
        look(FIRST, "unused", net=Twice())
    with pytest.raises(ValueError, match=r"gives \(180, 6\) for 60 samples"):
        look(FIRST, "part", net=Folds())


def test_modules_without_a_forward():
    class Headless(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = NET

    with pytest.raises(ValueError, match=r"has no forward of its own.*\['net'\]"):
        look(FIRST, "net.1", net=Headless())
    assert look(FIRST, "net.1", net=Headless(), forward="net").detections["first", "net.1"].samples == 60
    with pytest.raises(ValueError, match="forward='head': no such submodule"):
        look(FIRST, "net.1", net=Headless(), forward="head")


def test_images_out_of_range():
    callback = bpf.ConceptBackprop(FIRST, "1", parameterization=bpf.AdditiveChange(0.0, 1.0))
    with pytest.raises(ValueError, match=r"out of the range low=0.0, high=1.0"):
        callback.analyze(NET, [(X, X)])


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")
def test_fits_without_the_data_that_is_asked_for():
    with pytest.raises(MisconfigurationException, match=r"no such data loader.*data='train'"):
        fitted(Problem(), loader(), bpf.ConceptBackprop(FIRST, "net.inner", forward="net"))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"max_samples": 0}, "max_samples=0"),
        ({"num_inputs": 0}, "num_inputs=0"),
        ({"data": "test"}, "data='test'"),
    ],
)
def test_arguments_out_of_range(settings, match):
    with pytest.raises(ValueError, match=match):
        bpf.ConceptBackprop(FIRST, "1", **settings)


def test_layers_of_changes_are_among_those_with_probes():
    with pytest.raises(ValueError, match=r"layer='0' is not among the layers \['1'\]"):
        bpf.ConceptBackprop(FIRST, "1", change_layer="0").analyze(NET, [(X, X)])


def test_sensitivity_needs_an_output_and_a_pool_that_can_be_turned_round():
    with pytest.raises(ValueError, match="cannot be turned round"):
        look(FIRST, probe=bpf.ProbeSettings(pool=lambda h: h.abs()))
    assert look(FIRST, probe=bpf.ProbeSettings(pool=lambda h: h.abs()), sensitivity=False).detections
