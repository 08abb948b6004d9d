"""Local guesses on networks of several kinds, their costs, and what is refused."""

import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import Problem, fitted, loader
from projection_problems import FROZEN, SPACES, chain, data_in, flat, head_of, step, steps
from torch import nn

from lightning_bpfree import ForwardGradient, GradientAlignment, LocalLoss, ScalarSyncStrategy
from lightning_bpfree.core.blocks import cut
from lightning_bpfree.demos.nets import MLP, SmallCNN, SmallTransformer
from lightning_bpfree.training.checks import check_fit

# --- networks --------------------------------------------------------------------------------------------------------

NETWORKS = {
    "mlp": (lambda: MLP(64, [16, 12], 3), 1),
    "cnn": (lambda: SmallCNN((1, 8, 8), [4, 8], 3, norm="group"), ["features.*"]),
    "transformer": (
        lambda: SmallTransformer((1, 8, 8), 3, dim=8, depth=2, heads=2, dropout=0.2),
        [["embed", "position", "encoder.layers.0"], "encoder.layers.1"],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "how",
    [
        {"guess": LocalLoss},
        {"guess": LocalLoss, "space": "activations"},
        {"guess": partial(LocalLoss, update="reset"), "target": LocalLoss, "scope": "tensor"},
        {"target": LocalLoss, "space": "activations"},
    ],
    ids=["weights", "activations", "two losses", "random local"],
)
def test_networks(name, how):
    net, blocks = NETWORKS[name]
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 1, 8, 8, generator=generator), torch.randint(3, (16,), generator=generator)
    heads = {"cnn": "cnn", "mlp": "mlp"}.get(name, "linear")
    made = {k: v if isinstance(v, str) else v(heads, blocks=blocks) for k, v in how.items()}
    torch.manual_seed(0)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    module, alignment = Problem(net(), lr=0.01), GradientAlignment(every_n_steps=1)
    fitted(module, data, ForwardGradient(**made, seed=1), alignment)
    assert len(module.gradients) == 2
    assert all(bool(grad.isfinite().all()) for grad in module.gradients[1].values())
    assert all(float(grad.abs().sum()) > 0 for grad in module.gradients[1].values())
    assert alignment.mean_cosine > 0.1 or "guess" not in how  # one random direction is worth little


def test_costs():
    for how, cost in [
        ({"guess": LocalLoss(num_classes=3)}, 3 + 2 * 3),
        ({"guess": LocalLoss(num_classes=3), "scope": "network"}, 3 + 3),
        ({"guess": LocalLoss(num_classes=3), "scope": "tensor"}, 3 + 4 * 3),
        ({"guess": LocalLoss(num_classes=3), "space": "activations"}, 1 + 2 * 3 + 3),
        ({"space": "activations", "scope": "network", "num_directions": 4}, 1 + 4 * 3 + 3),
        ({"guess": LocalLoss(num_classes=3), "target": "local"}, 3),
        ({"target": LocalLoss(num_classes=3)}, 1 + 3),
        ({"target": LocalLoss(num_classes=3), "space": "activations"}, 3),
    ]:
        rule = ForwardGradient(**how)
        steps(rule)
        assert rule.record.forward_evals == cost, how
        if how.get("scope") == "network":
            assert f"({cost} forwards)" in rule.describe()["a step"]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_ranks_cannot_exchange_a_few_numbers_for_it():
    assert ForwardGradient().exchanges_scalars
    rule, module = ForwardGradient(guess=LocalLoss()), Problem()
    assert not rule.exchanges_scalars
    assert not ForwardGradient(blocks=1).exchanges_scalars
    trainer = types.SimpleNamespace(strategy=ScalarSyncStrategy())
    with pytest.raises(MisconfigurationException, match=r"not a function of a few numbers.*strategy='ddp'"):
        check_fit(rule, ["ForwardGradient"], trainer, module)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"space": "outputs"}, "space='outputs': choose 'weights' or 'activations'"),
        ({"scope": "layer"}, "scope='layer'"),
        ({"target": "above"}, "target='above': give 'global'"),
        ({"space": "activations", "scope": "tensor"}, "Use scope='block'"),
        ({"space": "activations", "scope": "network", "target": "local"}, "Use scope='block'"),
        ({"guess": LocalLoss(), "num_directions": 2}, "a guess is one direction"),
        ({"guess": LocalLoss(), "directions": "rademacher"}, "a guess is one direction"),
        ({"guess": LocalLoss(blocks=2), "target": LocalLoss()}, "blocks and network differ"),
        ({"guess": LocalLoss(), "blocks": 2}, "leave blocks and network of the rule out"),
        ({"blocks": 1, "orthogonal": True}, "orthogonal=True.*leave them out"),
        ({"space": "activations", "chunk_size": 4}, "chunk_size=4"),
    ],
)
def test_arguments_that_are_unknown_or_contradict_each_other(how, message):
    with pytest.raises(ValueError, match=message):
        ForwardGradient(**how)


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_batch_norm_behind_a_block_is_refused_for_slopes_of_samples():
    def fit(**how):
        net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        if how.pop("evaluated", False):
            net[3].eval()
        fitted(Problem(net), loader(), ForwardGradient(**how))

    with pytest.raises(MisconfigurationException, match=r"3 \(BatchNorm1d\) mixes samples.*GroupNorm"):
        fit(space="activations")
    with pytest.raises(MisconfigurationException, match="space='weights'"):
        fit(guess=LocalLoss(), space="activations")
    fit(guess=LocalLoss())
    fit(space="activations", target="local")
    fit(space="activations", evaluated=True)


class Early(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(4))
        self.first, self.second, self.last = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x * self.scale)) + self.shift)))


@pytest.mark.parametrize("how", [{"guess": LocalLoss}, {"space": "activations"}, {"target": LocalLoss}])
def test_parameters_that_a_cut_would_leave_without_gradient_are_refused(how):
    def fit(blocks, **more):
        made = {k: v if isinstance(v, str) else v(blocks=blocks) for k, v in how.items()}
        if not {"guess", "target"} & made.keys():
            made["blocks"] = blocks
        fitted(Problem(Early()), loader(), ForwardGradient(**made, **more))

    with pytest.raises(MisconfigurationException, match=r"net\.scale runs before the end of block first.*Put it into"):
        fit(["first", "second"])
    with pytest.raises(MisconfigurationException, match=r"net\.shift runs before the end of block second"):
        fit(["first", "second"], params=["net.shift", "net.*.weight"])
    with pytest.raises(MisconfigurationException, match=r"net\.shift runs before the end of block first\.\.second"):
        fit([["first", "second"]], params=["net.shift", "net.*.weight"])
    fit(["first", "second"], params="net.*.weight")
    fit([["scale", "first", "shift", "second"]])


def test_labels_and_blocks_that_do_not_fit():
    with pytest.raises(ValueError, match="labels: values from 0 to 2 in a batch, but there are 2 classes"):
        step(ForwardGradient(guess=LocalLoss(num_classes=2)))
    picks = LocalLoss(labels=lambda batch: batch[1].float())
    with pytest.raises(ValueError, match="needed are whole numbers"):
        step(ForwardGradient(guess=picks))
    with pytest.raises(ValueError, match="'nothing' matches no module"):
        step(ForwardGradient(guess=LocalLoss(blocks=["nothing"])))
    with pytest.raises(ValueError, match="overlap"):
        step(ForwardGradient(guess=LocalLoss(blocks=[["0", "2"], ["2"]])))

    class Twice(Problem):
        def training_step(self, batch, index):
            return super().training_step(batch, index) + super().training_step(batch, index)

    with pytest.raises(ValueError, match="runs twice"):
        step(ForwardGradient(guess=LocalLoss(num_classes=3)), kind=Twice)

    class Peeks(Problem):
        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1]) + self.net[0](batch[0]).square().mean() * 0

    with pytest.raises(ValueError, match="runs twice"):
        step(ForwardGradient(guess=LocalLoss(blocks=["0"], num_classes=3)), kind=Peeks)


def test_a_loss_that_reads_the_blocks_past_the_networks_output_is_noticed():
    class Side(Problem):
        def training_step(self, batch, index):
            hidden = self.net[:2](batch[0])
            return F.cross_entropy(self.net[4](self.net[2:4](hidden)), batch[1]) + hidden.square().mean()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            self.hidden = torch.tanh(self.first(x))
            return self.last(self.hidden)

    class Penalty(Problem):
        def training_step(self, batch, index):
            return super().training_step(batch, index) + self.net.hidden.square().mean()

    blocks = {"blocks": ["first"]}
    with pytest.raises(MisconfigurationException, match=r"calls the network, Sequential, 0 times.*network="):
        step(ForwardGradient(space="activations"), kind=Side)
    with pytest.raises(MisconfigurationException, match="depends on its blocks by another way"):
        step(ForwardGradient(space="activations", **blocks), kind=Penalty, net=Net().double())
    step(ForwardGradient(guess=LocalLoss(blocks=["first"])), kind=Penalty, net=Net().double())
    step(ForwardGradient(space="activations", target="local", **blocks), kind=Penalty, net=Net().double())


@pytest.mark.parametrize("how", [{"guess": LocalLoss()}, {"guess": LocalLoss(), "target": "local"}])
@pytest.mark.parametrize("space", SPACES)
def test_a_loss_that_is_cut_from_the_network_is_noticed(how, space):
    class Item(Problem):
        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1]).item()

    with pytest.raises(MisconfigurationException, match=r"comes from the loss to the network's output.*ZerothOrder"):
        step(ForwardGradient(**how, space=space), kind=Item)


@pytest.mark.parametrize("guess", [None, FROZEN()])
def test_slopes_of_samples_survive_a_loss_that_has_nothing_left_to_learn(guess):
    """In float32 the slope of a loss near zero is rounding; it must not be taken for another way to the loss."""
    net = chain(torch.float32)
    net[4].bias.data.copy_(torch.tensor([30.0, 0.0, 0.0]))
    data = data_in(torch.float32)
    data.dataset.tensors = (data.dataset.tensors[0], torch.zeros(16, dtype=torch.int64))
    made = step(ForwardGradient(guess=guess, space="activations", seed=1), net=net, data=data, dtype=torch.float32)
    assert float(flat(made).abs().max()) < 1e-6


def test_nan_is_not_learned_from():
    data = data_in(torch.float64)
    data.dataset.tensors[0][3] = float("nan")
    for space in SPACES:
        rule = ForwardGradient(guess=LocalLoss(num_classes=3), space=space)
        with pytest.raises(RuntimeError, match="No parameter has changed"):
            steps(rule, data=data)
        rule = ForwardGradient(guess=LocalLoss(num_classes=3), space=space, on_nonfinite="skip", seed=1)
        with pytest.warns(UserWarning, match="is skipped"):
            assert steps(rule, data=data) == [{}]
        assert all(bool(t.isfinite().all()) for t in head_of(rule).values())


def test_the_cut_is_let_go_after_the_fit():
    rule = ForwardGradient(guess=LocalLoss())
    step(rule)
    assert rule._local_guesses._cut is None
    assert cut(chain(), 1).blocks[0].name == "0..1"
