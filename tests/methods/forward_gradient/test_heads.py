"""Heads of local losses fit every output, stay small, and let no sample see another."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_bpfree import LocalLoss
from lightning_bpfree.core.blocks import cut
from lightning_bpfree.demos.nets import SmallCNN
from lightning_bpfree.methods.forward_forward.label_embedding import LabelEmbedding
from lightning_bpfree.methods.forward_gradient.heads import HEADS

SHAPES = {"vector": (12,), "tokens": (5, 12), "map": (12, 7, 5), "one pixel": (12, 1, 1), "volume": (6, 3, 4, 5)}


@pytest.mark.parametrize("kind", ["linear", "mlp", "cnn"])
@pytest.mark.parametrize("name", SHAPES)
def test_heads_fit_and_keep_samples_apart(name, kind):
    shape = SHAPES[name]
    if kind == "cnn" and name in ("vector", "tokens"):
        with pytest.raises(ValueError, match="cnn"):
            HEADS[kind](shape, 3)
        return
    torch.manual_seed(0)
    head, x = HEADS[kind](shape, 3), torch.randn(4, *shape)
    whole = head(x)
    assert whole.shape == (4, 3)
    alone = torch.cat([head(x[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-6)  # other sums of float32 for another batch size


def test_a_linear_head_costs_less_than_a_tenth_of_its_block():
    net = SmallCNN((1, 28, 28), [16, 32], 10)
    x = torch.randn(8, 1, 28, 28)
    for block in cut(net, ["features.*"]).blocks:
        part = nn.Sequential(*block.modules)
        with FlopCounterMode(display=False) as of_block:
            x = part(x)
        head = LocalLoss().head(tuple(x.shape[1:]), 10, block)
        with FlopCounterMode(display=False) as of_head:
            head(x)
        assert of_head.get_total_flops() < 0.1 * of_block.get_total_flops()


def test_a_function_may_make_heads():
    made = LocalLoss(heads=lambda shape, classes: nn.Linear(shape[0], classes)).head((4,), 3, None)
    assert isinstance(made, nn.Linear)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"heads": "deep"}, "heads='deep': give 'linear'"),
        ({"update": "never"}, "update='never'"),
        ({"optimizer": "lion"}, "optimizer='lion'"),
        ({"lr": 0.0}, r"lr=0\.0: give a positive"),
        ({"num_classes": 1}, "num_classes=1: give a whole number of at least 2"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        LocalLoss(**arguments)


def test_the_neutral_label_is_the_mean_of_all():
    embedding, x = LabelEmbedding(3, (4,)), torch.zeros(2, 4)
    every = torch.stack([embedding(x, torch.full((2,), label)) for label in range(3)])
    torch.testing.assert_close(embedding(x, None), every.mean(0))
