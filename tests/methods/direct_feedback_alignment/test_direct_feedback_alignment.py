"""Direct feedback alignment: what reaches which block, and when it is backprop's gradient exactly."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from problems import Problem, fitted, loader
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lightning_bpfree as bpf

Net = Callable[[], nn.Module]
Gradients = list[dict[str, Tensor]]


def chain(*layers: nn.Module, widths: tuple[int, ...] = (6, 8, 7, 3)) -> nn.Sequential:
    """Linear layers, with ``layers`` between them."""
    found: list[nn.Module] = []
    for n, m in pairwise(widths):
        found += [nn.Linear(n, m), *copy.deepcopy(layers)]
    return nn.Sequential(*found[: len(found) - len(layers)])


def gradients(rule: bpf.TrainingRule | None, net: Net, **settings) -> Gradients:
    """What the optimizer gets in each step of a fit that moves nothing, in float64."""
    torch.manual_seed(0)
    module = Problem(net(), lr=0.0)
    fitted(module, loader(), *([] if rule is None else [rule]), precision="64-true", **settings)
    return module.gradients


def assert_close(found: Gradients, expected: Gradients) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            # Equal mathematics in float64, another order of products.
            torch.testing.assert_close(one[name], other[name], rtol=1e-10, atol=1e-12)


# --- when it is backprop ---


class Kept(nn.Sequential):
    """Remembers the last one that was made, for feedback from its own weights."""

    last: Kept

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        Kept.last = self


def own_weights(name: str, shape: tuple[int, ...]) -> Tensor:
    weight = Kept.last.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def products_behind(name: str, shape: tuple[int, ...]) -> Tensor:
    """The transposed product of all weights behind a block, which is the derivative of a linear network."""
    behind = [layer for key, layer in Kept.last.named_children() if int(key) > int(name.rpartition("..")[2])]
    product = torch.eye(shape[1], dtype=torch.float64)
    for layer in reversed([layer for layer in behind if isinstance(layer, nn.Linear)]):
        product = product @ layer.weight
    return product.T


def test_products_of_transposed_weights_are_backprop_in_a_linear_network():
    def net() -> nn.Module:
        return Kept(*chain(widths=(6, 8, 7, 5, 3)))

    rule = bpf.DirectFeedbackAlignment(matrices=products_behind)
    assert_close(gradients(rule, net), gradients(None, net))


def images() -> nn.Module:
    return Kept(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 2, padding=1, stride=(1, 2)),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(24, 5),
        nn.Dropout(0.3),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


@pytest.mark.parametrize("net", [lambda: Kept(*chain(nn.ReLU(inplace=True))), images], ids=["mlp", "convolutions"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_transposed_weights_from_layer_to_layer_are_backprop(net: Net, blocks: int):
    rule = bpf.DirectFeedbackAlignment(blocks, feedback="layerwise", matrices=own_weights)
    assert_close(gradients(rule, net), gradients(None, net))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_errors_pass_convolutions_as_in_backprop(kind: type[nn.Module]):
    dims = int(kind.__name__[4])
    size = (2, *[4] * dims)

    def net() -> nn.Module:
        torch.manual_seed(1)
        layers = [nn.Linear(6, torch.Size(size).numel()), nn.Unflatten(1, size)]
        layers += [kind(2, 4, 3, stride=2, padding=2, dilation=2, groups=2), nn.Tanh(), nn.Flatten()]
        width = nn.Sequential(*layers)(torch.zeros(1, 6)).shape[1]
        return Kept(*layers, nn.Linear(width, 3))

    rule = bpf.DirectFeedbackAlignment(feedback="layerwise", matrices=own_weights)
    assert_close(gradients(rule, net), gradients(None, net))


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_one_block_of_all_layers_is_backprop(feedback: str):
    """What runs behind the last block, or makes the output itself, gets its exact gradient."""

    def net() -> nn.Module:
        return chain(nn.Tanh())

    rule = bpf.DirectFeedbackAlignment([3], feedback=feedback)
    assert_close(gradients(rule, net), gradients(None, net))


# --- direct feedback, written out ---


@pytest.mark.parametrize("blocks", [1, [1, 1, 1]])
def test_every_block_gets_its_matrix_times_the_error(blocks):
    net = chain(nn.Tanh()).double()
    made: dict[str, Tensor] = {}

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        made[name] = torch.randn(shape, dtype=torch.float64)
        return made[name]

    rule = bpf.DirectFeedbackAlignment(blocks, matrices=drawn)
    module = Problem(net, lr=0.0)
    fitted(module, loader(rows=16), rule, precision="64-true")
    x, y = (tensor[:16] for tensor in loader(rows=16).dataset.tensors)
    activities = [x.double()]
    for layer in (net[0], net[2]):
        activities.append(torch.tanh(activities[-1] @ layer.weight.T + layer.bias))
    logits = (activities[-1] @ net[4].weight.T + net[4].bias).detach()
    error = (logits.softmax(1) - F.one_hot(y, 3)) / 16
    expected = {"net.4.weight": error.T @ activities[2], "net.4.bias": error.sum(0)}
    for key, name, before, after in (("net.0", "0..1", 0, 1), ("net.2", "2..3", 1, 2)):
        delta = (error @ made[name].T) * (1 - activities[after] ** 2)
        expected |= {f"{key}.weight": delta.T @ activities[before], f"{key}.bias": delta.sum(0)}
    assert set(made) == {"0..1", "2..3"}
    assert_close(module.gradients, [expected])


def test_other_feedback_for_one_block_leaves_the_others_alone():
    def drawn(of_second_block: int, name: str, shape: tuple[int, ...]) -> Tensor:
        seed = of_second_block if name == "2..3" else 0
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def of(seed: int) -> Gradients:
        return gradients(bpf.DirectFeedbackAlignment(matrices=partial(drawn, seed)), lambda: chain(nn.Tanh()))

    for one, two in zip(of(1), of(2), strict=True):
        assert {name for name in one if not torch.equal(one[name], two[name])} == {"net.2.weight", "net.2.bias"}


def test_a_sequence_gets_the_error_of_each_position():
    class Tokens(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 5))

        def training_step(self, batch):
            return F.cross_entropy(self.net(batch[0]).transpose(1, 2), batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    shapes = []

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        shapes.append(shape)
        return torch.ones(shape)

    data = DataLoader(TensorDataset(torch.randint(5, (8, 6))), batch_size=4)
    fitted(Tokens(), data, bpf.DirectFeedbackAlignment(matrices=drawn))
    assert shapes == [(4, 5), (4, 5)]  # of a position, once a fit


def test_the_loss_may_depend_on_the_output_in_any_way_and_on_more():
    class Beside(Problem):
        def __init__(self, net: nn.Module | None = None, lr: float = 0.0) -> None:
            super().__init__(chain(), lr)
            self.temperature = nn.Parameter(torch.ones(()))

        def training_step(self, batch, index):
            first, second = self.net(batch[0]), self.net(-batch[0])  # two calls: an error each
            first /= 2  # in place
            return F.cross_entropy(first * self.temperature, batch[1]) + second.square().mean().sqrt()

    def found(rule: bpf.TrainingRule | None) -> Gradients:
        torch.manual_seed(0)
        module = Beside()
        Kept.last = Kept(*module.net)
        fitted(module, loader(), *([] if rule is None else [rule]), precision="64-true")
        return module.gradients

    rule = bpf.DirectFeedbackAlignment(network="net", matrices=products_behind)
    assert_close(found(rule), found(None))


# --- the feedback of a fit ---


@pytest.mark.parametrize("feedback", ["direct", "layerwise"])
def test_feedback_is_a_function_of_the_seed_and_stays(feedback: str):
    def of(seed: int, epochs: int = 1) -> Gradients:
        rule = bpf.DirectFeedbackAlignment(feedback=feedback, seed=seed)
        return gradients(rule, lambda: chain(nn.Tanh()), max_epochs=epochs)

    one, again, other = of(1, epochs=2), of(1), of(2)
    for step in range(4):
        for name in one[0]:
            assert torch.equal(one[step][name], one[step + 4][name])  # the same batch an epoch later
            assert torch.equal(one[step][name], again[step][name])
    assert not torch.equal(one[0]["net.0.weight"], other[0]["net.0.weight"])
    assert torch.equal(one[0]["net.4.weight"], other[0]["net.4.weight"])


def test_feedback_is_distributed_like_initial_weights():
    rule = bpf.DirectFeedbackAlignment(scale=3.0)
    drawn = rule._matrices.get("0", (100, 300), fan_in=100, seed=0, like=torch.zeros(1))
    bound = 3.0 / 10
    assert float(drawn.abs().max()) <= bound
    # The variance of a uniform number is bound^2 / 3; of 30,000 squares, the mean is known to 4 * 0.9 / sqrt(30,000).
    assert float(drawn.square().mean()) == pytest.approx(bound**2 / 3, rel=0.021)


def test_nothing_stays_in_the_module():
    module = Problem(chain(nn.Tanh()))
    rule = bpf.DirectFeedbackAlignment()
    before = set(module.state_dict())
    fitted(module, loader(), rule)
    assert set(module.state_dict()) == before
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert "forward" not in part.__dict__


def test_blocks_can_have_learning_rates_of_their_own():
    torch.manual_seed(0)
    module = Problem(chain(nn.Tanh()))
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    fitted(module, loader(), bpf.DirectFeedbackAlignment(learning_rates=[0, 1]))
    moved = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"net.2.weight", "net.2.bias", "net.4.weight", "net.4.bias"}


def test_checkpointed_blocks_learn_and_reentrant_ones_are_refused():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.inside, self.reentrant = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8)), reentrant

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inside, x, use_reentrant=self.reentrant)

    def net(reentrant: bool) -> nn.Module:
        return nn.Sequential(Checkpointed(reentrant), nn.Tanh(), nn.Linear(8, 3))

    def plain() -> nn.Module:
        made = net(False)
        made[0].forward = made[0].inside
        return made

    rule = partial(bpf.DirectFeedbackAlignment, seed=0)
    assert_close(gradients(rule(), lambda: net(False)), gradients(rule(), plain))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        with pytest.raises(MisconfigurationException, match=r"block 0\.\.1 ran without a graph.*use_reentrant=False"):
            gradients(bpf.DirectFeedbackAlignment(), lambda: net(True))


def test_frozen_blocks_and_calls_without_a_graph_are_left_alone():
    class Teaches(Problem):
        def training_step(self, batch, index):
            with torch.no_grad():
                target = self.net(batch[0]).softmax(1)
            return F.cross_entropy(self.net(batch[0]), target)

    module = Teaches(chain(nn.Tanh()))
    module.net[0].requires_grad_(False)
    fitted(module, loader(), bpf.DirectFeedbackAlignment())
    assert all(
        set(step) == {f"net.{i}.{kind}" for i in (2, 4) for kind in ("weight", "bias")} for step in module.gradients
    )


# --- on the way to learning ---


def test_weights_come_to_align_with_the_feedback():
    """The claim of feedback alignment: the estimate comes within 90 degrees of backprop's gradient."""
    torch.manual_seed(0)
    cosines: list[float] = []

    class Keeps(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args) -> None:
            cosines.append(float(trainer.callback_metrics["bpfree/cosine_to_backprop/net.0"]))

    module = Problem(chain(nn.Tanh(), widths=(6, 32, 3)))
    rule = bpf.DirectFeedbackAlignment(seed=5)
    fitted(module, loader(), rule, bpf.GradientAlignment(every_n_steps=1, per_layer=True), Keeps(), max_epochs=20)
    # A random direction among the 7 * 32 parameters has a cosine of 0 +- 1 / sqrt(224); four times that is 0.27.
    assert abs(sum(cosines[:4]) / 4) < 0.27 < sum(cosines[-4:]) / 4
