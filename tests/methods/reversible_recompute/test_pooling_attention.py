"""Pooling attention against plain attention and plain pooling; stochastic depth; the parts of ReversibleMViT."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_bpfree.core.recompute_context import Draws
from lightning_bpfree.methods.reversible_recompute.models.mvit import ReversibleMViT, StageTransition
from lightning_bpfree.methods.reversible_recompute.models.pooling_attention import (
    DropPath,
    PoolingAttention,
    TokenPool,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, some dozens of operations on numbers of size 1
GRIDS = [(7, 5), (8, 6), (1, 3), (2, 9)]


def tokens(grid, dim=8, batch=2, **kwargs):
    return torch.randn(batch, grid[0] * grid[1], dim, dtype=torch.double, **kwargs)


def seen(module, *args):
    """Numbers are drawn from the global stream only where a module needs them."""
    before = Draws.now(torch.zeros(1))
    out = module(*args)
    return out, before.equals(Draws.now(torch.zeros(1)))


# --- pooling ---


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("q_stride", [1, 2, 3])
@pytest.mark.parametrize("kv_stride", [1, 4])
def test_a_side_of_n_tokens_becomes_one_of_n_over_the_stride_rounded_up(grid, q_stride, kv_stride):
    attention = PoolingAttention(8, 2, dim_out=12, q_stride=q_stride, kv_stride=kv_stride).double()
    out, new = attention(tokens(grid), grid)
    assert new == tuple(math.ceil(side / q_stride) for side in grid)
    assert out.shape == (2, new[0] * new[1], 12)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_kernel_of_equal_weights_is_the_mean_over_neighbors_row_by_row(grid, stride):
    pool = TokenPool(4, stride).double()
    pool.norm = nn.Identity()
    nn.init.constant_(pool.conv.weight, 1 / 9)
    x = torch.randn(2, 3, grid[0] * grid[1], 4, dtype=torch.double)
    out, new = pool(x, grid)
    for head in range(3):
        images = x[:, head].transpose(1, 2).reshape(2, 4, *grid)
        mean = F.avg_pool2d(images, 3, stride, 1)
        assert new == tuple(mean.shape[2:])
        torch.testing.assert_close(out[:, head], mean.flatten(2).transpose(1, 2), **EXACT)


def test_every_head_is_normalized_over_its_own_channels():
    out, _ = TokenPool(6).double()(torch.randn(2, 3, 20, 6, dtype=torch.double), (4, 5))
    torch.testing.assert_close(out.mean(3), torch.zeros_like(out.mean(3)), **EXACT)


# --- attention ---


def identity(attention):
    """Pools that change nothing: kernels that are 1 at their center, and no normalization."""
    for pool in (attention.pool_q, attention.pool_k, attention.pool_v):
        nn.init.dirac_(pool.conv.weight, groups=pool.conv.groups)
        pool.norm = nn.Identity()
    return attention


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_without_strides_and_with_identity_kernels_it_is_plain_attention(kernel):
    grid, plain = (3, 4), nn.MultiheadAttention(8, 2, batch_first=True).double()
    attention = identity(PoolingAttention(8, 2, kernel=kernel, residual=False).double())
    attention.qkv.load_state_dict({"weight": plain.in_proj_weight, "bias": plain.in_proj_bias})
    attention.proj.load_state_dict(plain.out_proj.state_dict())
    x = tokens(grid)
    torch.testing.assert_close(attention(x, grid)[0], plain(x, x, x)[0], **EXACT)


def test_the_residual_adds_the_pooled_queries_before_the_projection():
    grid, attention = (5, 3), PoolingAttention(8, 2, q_stride=2, kv_stride=2).double()
    x = tokens(grid)
    q = attention.qkv(x)[..., :8].unflatten(2, (2, 4)).transpose(1, 2)
    pooled = attention.pool_q(q, grid)[0].transpose(1, 2).flatten(2)
    whole = attention(x, grid)[0]
    attention.residual = False
    torch.testing.assert_close(whole - attention(x, grid)[0], pooled @ attention.proj.weight.T, **EXACT)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dim": 0}, "dim=0 and dim_out=0: give numbers of channels"),
        ({"dim_out": -2}, "dim_out=-2: give numbers of channels"),
        ({"heads": 3}, "heads=3: give a number that divides the 8 channels"),
        ({"heads": 0}, "heads=0"),
        ({"dim_out": 9}, "heads=2: give a number that divides the 9 channels"),
        ({"q_stride": 0}, "q_stride=0: give"),
        ({"kv_stride": -1}, "kv_stride=-1: give"),
        ({"kernel": 2}, "kernel=2: give an odd number"),
        ({"dropout": 1.0}, r"dropout=1\.0: give a share"),
    ],
)
def test_bad_arguments_of_attention(arguments, said):
    with pytest.raises(ValueError, match=said):
        PoolingAttention(**{"dim": 8, "heads": 2, **arguments})


def test_tokens_must_fill_the_grid():
    with pytest.raises(ValueError, match=r"x is \(2, 13, 8\) and grid=\(3, 4\).*class token"):
        PoolingAttention(8, 2)(torch.zeros(2, 13, 8), (3, 4))
    with pytest.raises(ValueError, match="stride=0"):
        TokenPool(4, 0)


# --- stochastic depth ---


def test_samples_are_dropped_whole_and_the_others_scaled():
    x = torch.randn(64, 3, 2)
    out = DropPath(0.75)(x)
    dropped = (out == 0).all(2).all(1)
    assert 0 < int(dropped.sum()) < 64
    assert torch.equal(out[~dropped], 4 * x[~dropped])  # 1 / (1 - 0.75), without rounding


def test_nothing_is_drawn_where_nothing_is_dropped():
    x = torch.randn(4, 3)
    for module in (DropPath(0.0), DropPath(0.5).eval()):
        out, undrawn = seen(module, x)
        assert out is x
        assert undrawn
    assert not seen(DropPath(0.5), x)[1]


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_bad_rates(rate):
    with pytest.raises(ValueError, match="rate="):
        DropPath(rate)


# --- transitions ---


@pytest.mark.parametrize("grid", GRIDS)
def test_the_skip_of_a_transition_is_max_pooled_onto_the_grid_of_the_queries(grid):
    step = StageTransition(8, 8, heads=2).double()
    for layer in (step.attention.proj, step.feed_forward[4]):  # both branches are 0 now
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = tokens(grid)
    out, new = step(x, grid)
    pooled = F.max_pool2d(x.transpose(1, 2).reshape(2, 8, *grid), 3, 2, 1)
    assert new == tuple(pooled.shape[2:])
    assert torch.equal(out, pooled.flatten(2).transpose(1, 2))


def test_a_transition_projects_where_the_width_changes_and_drops_branches_but_no_skip():
    assert isinstance(StageTransition(8, 8, 2).project, nn.Identity)
    step = StageTransition(8, 16, 2, drop_path=0.5).double()
    assert step.project.weight.shape == (16, 8)
    x = tokens((4, 4), batch=32)
    skip = step.project(step.pool(x.transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2))
    out = step(x, (4, 4))[0]
    bare = torch.isclose(out, skip, **EXACT).flatten(1).all(1)
    assert 0 < int(bare.sum()) < 32  # both branches are dropped for a quarter of the samples


# --- the whole model ---

SMALL = {"in_shape": (3, 20, 12), "num_classes": 5, "dim": 8, "depths": (1, 2), "heads": 2, "patch": 4}


@pytest.mark.parametrize("fusion", ["concat_linear", "concat", "mean"])
def test_the_model_is_what_its_parts_say(fusion):
    model = ReversibleMViT(**SMALL, fusion=fusion, last_fusion=fusion).double()
    images = torch.randn(2, 3, 20, 12, dtype=torch.double)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 15, 48)
    x = patches @ model.patches.weight.flatten(1).T + model.patches.bias + model.positions
    grid = (5, 3)
    for number, stage in enumerate(model.stages):
        if number:
            x, grid = model.transitions[0](x, grid)
        x1, x2 = x, x
        for block in stage:
            x1 = x1 + block.f.attention(block.f.norm(x2), grid)[0]
            x2 = x2 + block.g(x1)
        x = (x1 + x2) / 2 if fusion == "mean" else torch.cat((x1, x2), 2)
        x = stage.fusion.mlp(x) if fusion == "concat_linear" else x
    assert grid == (3, 2)
    torch.testing.assert_close(model(images), model.head(model.norm(x).mean(1)), **EXACT)


def test_widths_heads_strides_and_rates_from_stage_to_stage():
    model = ReversibleMViT(**{**SMALL, "depths": (1, 2, 1)}, kv_stride=4, drop_path=0.5)
    blocks = [list(stage) for stage in model.stages]
    attentions = [stage[0].f.attention for stage in blocks]
    assert [a.proj.in_features for a in attentions] == [8, 16, 32]
    assert [a.heads for a in attentions] == [2, 4, 8]
    assert [a.pool_k.conv.stride[0] for a in attentions] == [4, 2, 1]
    assert [t.attention.pool_q.conv.stride for t in model.transitions] == [(2, 2), (2, 2)]
    assert all(a.pool_q.conv.stride == (1, 1) for a in attentions)
    one, (two, three), four = ([block.f.drop_path.rate for block in stage] for stage in blocks)
    rates = [*one, model.transitions[0].drop_path.rate, two, three, model.transitions[1].drop_path.rate, *four]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert model.norm.weight.numel() == model.head.in_features == 64  # both streams
    narrow = ReversibleMViT(**SMALL, fusion="concat", last_fusion="mean")
    assert isinstance(narrow.transitions[0].project, nn.Identity)  # concat is the widening
    assert narrow.head.in_features == 16


def test_the_schedule_of_all_stages_is_set_at_once():
    model = ReversibleMViT(**SMALL, schedule="parallel", buffer_every=2, store_last=1)
    assert model.schedule == "parallel"
    assert {(s.recomputation.buffer_every, s.recomputation.store_last) for s in model.stages} == {(2, 1)}
    model.schedule = "autograd"
    assert [stage.schedule for stage in model.stages] == ["autograd", "autograd"]
    with pytest.raises(ValueError, match="schedule='fast'"):
        model.schedule = "fast"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"in_shape": (3, 20)}, r"in_shape=\(3, 20\): give a list of 3"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"dim": 9}, "dim=9 and heads=2"),
        ({"heads": 0}, "heads=0"),
        ({"depths": ()}, r"depths=\(\): give a list of whole numbers of at least 1"),
        ({"depths": (2, 0)}, r"depths=\(2, 0\)"),
        ({"depths": (1,) * 5}, "5 stages, but patch=4 leaves 5 tokens.*halved 3 times: give at most 4"),
        ({"patch": 8}, "patch=8: give a number that divides both sides"),
        ({"patch": 0}, "patch=0"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio=0\.0"),
        ({"kv_stride": 0}, "kv_stride=0"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"drop_path": -0.1}, r"drop_path=-0\.1"),
        ({"fusion": "sum"}, "fusion='sum'"),
        ({"last_fusion": "sum"}, "fusion='sum'"),
        ({"schedule": "fast"}, "schedule='fast'"),
        ({"buffer_every": 0}, "buffer_every=0"),
        ({"store_last": -1}, "store_last=-1"),
    ],
)
def test_bad_arguments_of_the_model(arguments, said):
    with pytest.raises(ValueError, match=said):
        ReversibleMViT(**{**SMALL, **arguments})


def test_images_have_one_shape():
    with pytest.raises(ValueError, match=r"images are \(1, 3, 12, 20\), but in_shape=\(3, 20, 12\)"):
        ReversibleMViT(**SMALL)(torch.zeros(1, 3, 12, 20))
