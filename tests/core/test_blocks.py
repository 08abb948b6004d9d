"""Cutting networks into blocks, and watching what crosses their borders."""

import pytest
import torch
from torch import nn

from lightning_bpfree.core.block_hooks import block_hooks
from lightning_bpfree.core.blocks import cut, find_network
from lightning_bpfree.core.labels import labels_of
from lightning_bpfree.demos.nets import MLP, SmallCNN, SmallTransformer


def names(network, blocks=1):
    return [block.name for block in cut(network, blocks).blocks]


def test_chains_are_cut_by_layers_and_other_modules_join_the_layer_before():
    net = MLP(8, [8, 8, 8], 3, norm="batch")
    assert names(net) == ["layers.0..layers.2", "layers.3..layers.5", "layers.6..layers.8"]
    assert names(net, 2) == ["layers.0..layers.5", "layers.6..layers.8"]
    assert names(net, [1, 2]) == ["layers.0..layers.2", "layers.3..layers.8"]
    assert names(net, [2, 2])[-1] == "layers.6..layers.9"  # sizes may cover the last layer
    assert list(cut(net).rest) == ["layers.9.weight", "layers.9.bias"]
    assert not cut(net, [2, 2]).rest


def test_what_runs_before_the_first_layer_belongs_to_it():
    assert names(nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))) == ["0..2"]


def test_nested_chains_are_one_chain():
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert names(nn.Sequential(inner, nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2))) == [
        "0.0..0.1",
        "1.0..1.1",
    ]


def test_patterns_take_outermost_modules_and_may_name_parameters():
    net = SmallTransformer()
    assert names(net, ["encoder.layers.*"]) == ["encoder.layers.0", "encoder.layers.1"]
    parts = cut(net, [["embed", "position", "encoder.layers.0"], "encoder.layers.1"])
    assert any(parameter is net.position for parameter in parts.blocks[0].parameters)
    assert set(parts.rest) == {"encoder.norm.weight", "encoder.norm.bias", "head.weight", "head.bias"}
    assert names(SmallCNN((1, 8, 8), [4, 4], norm="group"), ["features.*"]) == [
        "features.0..features.2",
        "features.3..features.6",
    ]


def test_a_function_may_cut():
    net = MLP(8, [8, 8], 3)
    assert names(net, lambda network: [list(network.layers[:4])]) == ["layers.0..layers.3"]


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        (0, "blocks=0: give a whole number of at least 1"),
        ([], r"blocks=\[\]: give a whole number of at least 1"),
        ([1, 5], r"asks for 6 layers.*has 3.*sum to 2 .* or 3"),
        (["layres.*"], r"'layres\.\*' matches no module; nearest: layers.*Modules with parameters: layers, layers\.0"),
        (["layers.0", "layers.*"], r"overlap.*Linear"),
        ([["layers.1"]], "has no parameters"),
    ],
)
def test_bad_cuts_list_the_modules(blocks, said):
    with pytest.raises(ValueError, match=said):
        cut(MLP(8, [8, 8], 3), blocks)


def test_networks_that_are_no_chain_ask_for_names():
    with pytest.raises(ValueError, match=r"SmallCNN does not show.*blocks=\[\['features\.0', 'features\.1'\], "):
        cut(SmallCNN())


def test_a_single_layer_cannot_be_cut():
    with pytest.raises(ValueError, match="has 1 layer"):
        cut(nn.Sequential(nn.Linear(2, 2)))


def test_watched_sees_every_border_once_and_cuts_off_whatever_else_crosses_it():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Bilinear(3, 3, 2)

        def forward(self, x):
            return self.two(self.one(x), self.one.weight.sum(0).expand(len(x), 3))

    net, seen = Skips(), []
    parts = cut(net, ["one", "two"])

    def enter(index, x):
        seen.append(("in", index))
        return x.detach()

    with block_hooks(parts.blocks, enter=enter, leave=lambda index, z: seen.append(("out", index)) or z) as ran:
        net(torch.randn(2, 3)).sum().backward()
    assert seen == [("in", 0), ("out", 0), ("in", 1), ("out", 1)]
    assert ran == [0, 1]
    assert net.one.weight.grad is None  # the second way into block two is cut off too
    assert not net.one._forward_hooks
    assert not net.one._forward_pre_hooks


def test_a_block_that_runs_twice_is_refused():
    layer = nn.Linear(2, 2)
    net = nn.Sequential(layer, layer)
    blocks = cut(net, ["0"]).blocks
    with (
        block_hooks(blocks, enter=lambda i, x: x, leave=lambda i, z: z),
        pytest.raises(ValueError, match="0 runs twice"),
    ):
        net(torch.zeros(1, 2))


def test_the_network_is_found_or_asked_for():
    one = nn.ModuleDict({"net": nn.Linear(2, 2), "loss": nn.MSELoss()})
    assert find_network(one)[0] == "net"
    two = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"2 children with parameters \(a, b\).*network='a'.*network=''"):
        find_network(two)
    assert find_network(two, "")[1] is two
    with pytest.raises(ValueError, match=r"network='c' is not a part.*a, b"):
        find_network(two, "c")


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"x": 1}, "batch is a dict.*labels=lambda"),
        ((0, torch.zeros(3)), "float32 of shape"),
        ((0, torch.zeros(2, dtype=torch.int64)), r"shape \(2,\); needed.*\(3,\)"),
        ((0, torch.tensor([0, 1, 4])), r"values from 0 to 4.*0 to 3"),
        ((0, torch.tensor([0, -1, 1])), "values from -1"),
        ((0, "labels"), "found str"),
    ],
)
def test_bad_labels_say_what_was_found(batch, said):
    with pytest.raises(ValueError, match=said):
        labels_of(batch, 3, 4)
