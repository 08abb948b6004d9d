"""Masks count exactly, put exact zeros, and are never inferred from values."""

import pytest
import torch

from lightning_bpfree.methods.lottery_ticket.masks import Masks


def some(seed: int = 0) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 4), "b": (2, 3, 2, 2)}
    return Masks({name: torch.rand(shape, generator=generator) > 0.4 for name, shape in shapes.items()})


def test_pruned_entries_become_exact_zeros():
    masks = Masks({"w": torch.tensor([True, False, False, False])})
    w = torch.tensor([float("nan"), float("nan"), float("inf"), -2.0])
    other = torch.ones(2)
    masks.apply_({"w": w, "bias": other})
    assert torch.equal(w[1:], torch.zeros(3))
    assert not torch.signbit(w[1:]).any()
    assert w[0].isnan()
    assert torch.equal(other, torch.ones(2))


def test_a_surviving_zero_survives():
    masks = Masks.dense({"w": torch.zeros(4)})
    assert masks.kept == 4


def test_counts():
    masks = some()
    assert masks.counts == {name: int(masks[name].sum()) for name in masks}
    assert masks.total == 12 + 24
    assert masks.kept == sum(masks.counts.values())
    assert masks.sparsity + masks.weights_left == 1
    assert list(masks) == ["a", "b"]
    assert str(masks.kept) in repr(masks)


def test_permuted_keeps_counts_and_global_streams():
    masks = some()
    before = torch.get_rng_state()
    one, same, other = masks.permuted(1), masks.permuted(1), masks.permuted(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert one == same
    assert one != other
    assert one != masks
    assert one.counts == masks.counts


def test_to_and_equality():
    masks = some()
    assert masks.to("cpu") is masks
    assert masks == some()
    assert masks != some(1)
    assert masks != "masks"
    assert masks.to("meta")["a"].device.type == "meta"


def test_bad_input():
    with pytest.raises(ValueError, match="at least one"):
        Masks({})
    with pytest.raises(ValueError, match=r"'w' is torch\.float32.*torch\.bool"):
        Masks({"w": torch.ones(2)})
    masks = some()
    with pytest.raises(ValueError, match=r"no tensors, for b"):
        masks.apply_({"a": torch.zeros(3, 4)})
    masks.apply_({"a": torch.zeros(3, 4)}, missing_ok=True)
    with pytest.raises(ValueError, match=r"'a' has shape \(4, 3\), and its mask \(3, 4\)"):
        masks.apply_({"a": torch.zeros(4, 3)}, missing_ok=True)
