"""Exact counts, nested masks, ties by position, and refusals that name the layer."""

import pytest
import torch

from lightning_bpfree.methods.lottery_ticket.masks import Masks
from lightning_bpfree.methods.lottery_ticket.pruning import magnitude, num_kept, random_scores, snip, snr, top_masks


def scores(seed: int, shapes=((40, 50), (20, 10), (300, 6))) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.rand(shape, generator=generator) for i, shape in enumerate(shapes)}


def test_twenty_levels_are_nested_and_counted_exactly():
    masks = None
    for level in range(20):
        sparsity = 1 - 0.8**level
        new = top_masks(scores(level), sparsity, masks)
        assert new.kept == round(4000 * (1 - sparsity))
        if masks is not None:
            assert not any((new[name] & ~masks[name]).any() for name in new)
        masks = new
    assert masks.kept == 58  # 1.44 %


def test_the_best_survive():
    given = scores(0)
    masks = top_masks(given, 0.7)
    flat = torch.cat([s.flatten() for s in given.values()])
    kept = torch.cat([m.flatten() for m in masks.values()])
    assert flat[kept].min() > flat[~kept].max()


def test_by_layer_every_layer_keeps_its_share():
    given = scores(0)
    masks = top_masks(given, 0.6, scope="layer")
    assert masks.counts == {name: num_kept(s.numel(), 0.6) for name, s in given.items()}
    nested = top_masks(scores(1), 0.9, masks, scope="layer")
    assert nested.counts == {name: num_kept(s.numel(), 0.9) for name, s in given.items()}
    assert not any((nested[name] & ~masks[name]).any() for name in nested)


def test_of_equal_scores_the_first_survive_in_exact_number():
    masks = top_masks({"a": torch.ones(5, 2), "b": torch.ones(10)}, 0.35)
    assert masks.kept == 13
    assert masks["a"].all()
    assert masks["b"].tolist() == [True] * 3 + [False] * 7


def test_pruned_weights_never_come_back_whatever_their_score():
    previous = Masks({"w": torch.tensor([True, True, False, False])})
    for score in (torch.tensor([1.0, 2.0, 9.0, float("nan")]), torch.tensor([0.0, 1e-30, float("inf"), 1.0])):
        assert top_masks({"w": score}, 0.75, previous)["w"].tolist() == [False, True, False, False]


def test_scores():
    mean, std = {"w": torch.tensor([-2.0, 1.0])}, {"w": torch.tensor([4.0, 0.5]), "other": torch.ones(1)}
    assert snr(mean, std)["w"].tolist() == [0.5, 2.0]
    assert magnitude(mean)["w"].tolist() == [2.0, 1.0]
    assert snip(mean, std)["w"].tolist() == [8.0, 0.5]
    half = {"w": torch.tensor([3.0], dtype=torch.bfloat16)}
    assert snr(half, {"w": torch.tensor([2.0])})["w"].dtype == torch.float32
    before = torch.get_rng_state()
    one, two = random_scores(mean, 1), random_scores(mean, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one["w"], random_scores(mean, 1)["w"])
    assert not torch.equal(one["w"], two["w"])


def test_a_layer_that_would_vanish_is_named_with_the_cure():
    given = {"big": torch.ones(90) * 2, "small": torch.ones(10)}
    with pytest.raises(ValueError, match=r"sparsity=0\.95 would prune all of small.*scope='layer'.*exclude="):
        top_masks(given, 0.95)
    assert top_masks(given, 0.9, scope="layer").counts == {"big": 9, "small": 1}
    with pytest.raises(ValueError, match="prune all of small"):
        top_masks(given, 0.96, scope="layer")
    with pytest.raises(ValueError, match="prune all of big, small"):
        top_masks(given, 0.999)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match=rf"sparsity={sparsity}.*\[0, 1\)"):
        top_masks({"w": torch.ones(4)}, sparsity)


def test_other_bad_input():
    with pytest.raises(ValueError, match="scope='layers'"):
        top_masks({"w": torch.ones(4)}, 0.5, scope="layers")
    with pytest.raises(ValueError, match="Scores of w are NaN"):
        top_masks({"w": torch.tensor([1.0, float("nan")])}, 0.5)
    previous = Masks({"w": torch.tensor([True, False, False, False])})
    with pytest.raises(ValueError, match=r"sparsity=0\.5 asks for 2 weights of w.*left 1.*stay pruned"):
        top_masks({"w": torch.ones(4)}, 0.5, previous)
