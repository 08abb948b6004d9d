"""A reversible stack has the gradients and random numbers of plain autograd, and memory independent of its depth."""

import pytest
import reversible_problems as rp
import torch
from reversible_problems import WIDTH, agrees, outcome, relative, small, stack, streams
from torch import nn

from lightning_bpfree.methods.reversible_recompute.coupling import ReversibleBlock
from lightning_bpfree.methods.reversible_recompute.recomputation import ReconstructionError
from lightning_bpfree.methods.reversible_recompute.sequential import ReversibleSequential
from lightning_bpfree.methods.reversible_recompute.stream_fusion import FUSIONS, StreamFusion

in_both = pytest.mark.parametrize("schedule", rp.REVERSIBLE)
in_all = pytest.mark.parametrize("schedule", rp.SCHEDULES)

# Recovered inputs are off by rounding: 4e-16 in float64 and 3e-7 in float32 for 48 blocks, and a margin.
TOLERANCES = {torch.double: 1e-12, torch.float: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("depth", [1, 2, 3, 5, 8, pytest.param(48, marks=pytest.mark.slow)])
def test_gradients_are_those_of_autograd_and_of_a_loop_written_by_hand(depth, dtype):
    net, inputs = stack(depth, p=0.3).to(dtype), streams(dtype=dtype)
    by_hand = outcome(rp.Loop(net), *inputs)
    found = {}
    for net.schedule in rp.SCHEDULES:
        found[net.schedule] = outcome(net, *inputs)
        assert torch.equal(found[net.schedule].loss, by_hand.loss)
        assert torch.equal(found[net.schedule].state, by_hand.state)  # later random numbers are those of plain training
        assert relative(found[net.schedule].grads, by_hand.grads) < TOLERANCES[dtype]
    assert torch.equal(found["sequential"].grads, found["parallel"].grads)
    assert not torch.equal(outcome(net, *inputs, seed=2).loss, by_hand.loss)  # dropout did something


@pytest.mark.parametrize("enter", ["duplicate", "split"])
def test_one_input_is_fused_again(enter):
    x = torch.randn(2, 5, WIDTH if enter == "duplicate" else 2 * WIDTH, dtype=torch.double)
    net = stack(3, p=0.2, enter=enter).double()
    outcomes = []
    for net.schedule in rp.SCHEDULES:
        outcomes.append(outcome(net, x))
        assert relative(outcomes[-1].grads, outcomes[0].grads) < 1e-12
    torch.manual_seed(1)
    y1, y2 = rp.Loop(net)(*((x, x) if enter == "duplicate" else x.chunk(2, -1)))
    by_hand = (y1 + y2) / 2 if enter == "duplicate" else torch.cat((y1, y2), -1)
    assert torch.equal(by_hand.square().sum(), outcomes[0].loss)


BY_HAND = {"mean": lambda a, b: (a + b) / 2, "add": torch.add, "max": torch.maximum, "min": torch.minimum}
BY_HAND |= {"second": lambda a, b: b, "concat": lambda a, b: torch.cat((a, b), -1)}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_passes_gradients(fusion):
    def make():
        return small(2, fusion=StreamFusion(fusion, WIDTH)).double()

    rp.equal_gradients(make, streams(3, WIDTH)[0])
    net, pair = make(), streams(3, WIDTH)
    if fusion in BY_HAND:
        assert torch.equal(net.fusion(*pair), BY_HAND[fusion](*pair))


@in_both
@pytest.mark.parametrize("scale", [(0.5, 0.5), (0.5, 2.0), (3.0, 1.0)])
def test_scaled_skips(scale, schedule):
    # Errors grow by 1 / (s1 s2) = 4 a block: 4^3 machine epsilons of float64 are far below the tolerance.
    net, pair = stack(3, p=0.2, scale=scale, schedule=schedule).double(), streams()
    assert agrees(net, *pair)
    # The loop scales and then adds, in two steps.
    torch.testing.assert_close(outcome(net, *pair).loss, outcome(rp.Loop(net), *pair).loss, rtol=1e-10, atol=0)


KEPT = [{"store_last": n} for n in (1, 4, 5, 9)] + [{"buffer_every": n} for n in (1, 2, 3, 5, 9)]
KEPT += [{"buffer_every": 2, "store_last": 2}, {"max_error": 1e-6}, {"max_error": 1e-6, "buffer_every": 3}]


@pytest.mark.parametrize("settings", KEPT, ids=str)
def test_what_is_kept_changes_nothing(settings):
    def make():
        return small(5, lambda: rp.feed_forward(0.3), **settings).double()

    rp.equal_gradients(make, *streams())
    assert agrees(make(), *streams())


@in_all
def test_evaluation_mode(schedule):
    # Attention has a fused kernel for evaluation without a graph, which rounds differently.
    net, pair = stack(3, p=0.3, schedule=schedule).double().eval(), streams()
    assert agrees(net, *pair)
    assert all(map(torch.equal, net(*pair), rp.Loop(net)(*pair)))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found, by_hand = net(*pair), rp.Loop(net)(*pair)
        assert all(map(torch.equal, found, by_hand))
        assert not found[0].requires_grad


# --- several passes, parts of gradients ---


@in_both
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forward_passes_then_two_backward_passes(order, schedule):
    net, pairs = stack(3, p=0.4, schedule=schedule).double(), [streams(), streams()]
    apart = [outcome(rp.Loop(net), *pair, seed=seed).grads for seed, pair in enumerate(pairs)]
    leaves, losses = [[x.clone().requires_grad_() for x in pair] for pair in pairs], []
    for seed, pair in enumerate(leaves):
        torch.manual_seed(seed)
        losses.append(rp.two_sided(net(*pair)))
    for index in order:
        net.zero_grad()
        losses[index].backward()
        assert relative(rp.gradient(*leaves[index], *net.parameters()), apart[index]) < 1e-12


@in_both
def test_backward_twice_and_accumulation_over_micro_batches(schedule):
    net, (x1, x2) = stack(3, p=0.4, schedule=schedule).double(), streams()
    once = outcome(rp.Loop(net), x1, x2).grads
    torch.manual_seed(1)
    net.zero_grad()
    leaves = [x.clone().requires_grad_() for x in (x1, x2)]
    loss = rp.two_sided(net(*leaves))
    loss.backward(retain_graph=True)
    loss.backward()
    assert relative(rp.gradient(*leaves, *net.parameters()), 2 * once) < 1e-12
    net.eval().zero_grad()
    for a, b in zip(x1.split(1), x2.split(1), strict=True):
        rp.two_sided(net(a, b)).backward()
    apart = rp.gradient(*net.parameters())
    net.zero_grad()
    rp.two_sided(net(x1, x2)).backward()
    assert relative(apart, rp.gradient(*net.parameters())) < 1e-10  # sums over samples in another order


@in_both
@pytest.mark.parametrize("which", ["upper", "lower", "inputs", "both ends"])
def test_gradients_of_some_inputs_only(which, schedule):
    net, leaves = stack(4, p=0.3, schedule=schedule).double(), [x.requires_grad_() for x in streams()]
    lists = {"upper": list(net[3].parameters()), "lower": list(net[0].parameters()), "inputs": leaves}
    wanted = lists.get(which, [leaves[0], *net[3].g.parameters()])
    found = []
    for module in (rp.Loop(net), net):
        torch.manual_seed(1)
        loss = rp.two_sided(module(*leaves))
        grads = torch.autograd.grad(loss, wanted, retain_graph=True)
        # A pass that ended early leaves nothing behind that misleads a whole one.
        grads += torch.autograd.grad(loss, [*leaves, *net.parameters()])
        found.append(torch.cat([g.flatten() for g in grads]))
    assert relative(found[1], found[0]) < 1e-12


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_or_one_input_alone(which):
    net, pair = stack(3, p=0.2).double(), streams()
    for net.schedule in rp.REVERSIBLE:
        assert agrees(net, *pair, loss=lambda out: out[which].square().sum())
    for frozen in (False, True):
        net.requires_grad_(not frozen)
        found = []
        for module in (rp.Loop(net), net):
            net.zero_grad()
            leaves = [x.clone().requires_grad_(index == which) for index, x in enumerate(pair)]
            torch.manual_seed(1)
            rp.two_sided(module(*leaves)).backward()
            found.append(rp.gradient(*leaves, *net.parameters()))
        assert relative(found[1], found[0]) < 1e-12


@pytest.mark.parametrize("name", rp.PARTS)
def test_parts_that_are_shared_frozen_unused_or_nested(name):
    rp.equal_gradients(rp.PARTS[name], *streams())


@in_both
def test_a_frozen_stem_on_data_and_parameters_without_part(schedule):
    net, x = small(3, rp.Unused, schedule=schedule).double(), streams(3, WIDTH)[0]
    stem = nn.Linear(WIDTH, WIDTH).double().requires_grad_(False)
    net[0].requires_grad_(False)
    found = []
    for module in (rp.Loop(net), net):
        net.zero_grad()
        rp.two_sided(module(stem(x), stem(2 * x))).backward()
        assert net[0].f.weight.grad is net[1].f.never.grad is None
        found.append(rp.gradient(*net.parameters()))
    assert relative(found[1], found[0]) < 1e-12


def test_convolutions_split_along_their_channels():
    def make():
        branches = [nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)) for _ in range(4)]
        return ReversibleSequential(map(ReversibleBlock, branches[:2], branches[2:]), enter="split", dim=1).double()

    net, x = make(), torch.randn(2, 6, 4, 5, dtype=torch.double)
    assert torch.equal(net(x), torch.cat(rp.Loop(net)(x[:, :3], x[:, 3:]), 1))
    rp.equal_gradients(make, x)


# --- memory ---


@in_all
def test_what_the_graph_saves(schedule):
    def saved(depth, schedule, **settings):
        net, x = stack(depth, schedule=schedule, **settings), torch.randn(2, 5, WIDTH)
        return rp.saved_bytes(lambda: net(x, x), net)

    sizes, stream = [saved(depth, schedule) for depth in (2, 4, 16, 48)], 2 * 5 * WIDTH * 4  # bytes
    if schedule in rp.REVERSIBLE:
        assert sizes == [2 * stream] * 4  # both outputs
        assert saved(16, schedule, buffer_every=4) == (2 + 3 * 2) * stream
        assert saved(8, schedule, store_last=8) == saved(8, "autograd")
    else:
        assert sizes[3] > 2 * sizes[2] > 4 * sizes[1] > 4 * sizes[0]


def alive(depth, schedule, **settings):
    """Bytes after the forward pass, at the peak, after the backward pass, and in the end."""
    net, stem = stack(depth, schedule=schedule, **settings), nn.Linear(WIDTH, WIDTH)
    for leaf in (*stem.parameters(), *net.parameters()):
        leaf.grad = torch.zeros_like(leaf)  # gradients are added in place, and not counted
    with rp.Live() as live:
        out = net(stem(torch.randn(2, 5, WIDTH)))
        between = live.now
        out.sum().backward()
        after = live.now
        del out
        return between, live.peak, after, live.now


def test_the_peak_does_not_grow_with_depth():
    peaks = {}
    for schedule in rp.SCHEDULES:
        counts = [alive(depth, schedule) for depth in (3, 9)]
        assert counts[0][2:] == counts[1][2:] == (2 * 5 * WIDTH * 4, 0)  # the output, and nothing
        assert (counts[0] == counts[1]) == (schedule in rp.REVERSIBLE)
        peaks[schedule] = counts[1][1]
    # One branch's graph at a time; both graphs of two blocks, which overlap; those of all blocks.
    assert peaks["sequential"] < peaks["parallel"] < peaks["autograd"]


@in_both
@pytest.mark.parametrize("settings", [{"max_error": 1.0}, {"buffer_every": 2}, {"store_last": 1}], ids=str)
def test_nothing_stays_alive_after_the_backward_pass(settings, schedule):
    _, _, after, end = alive(5, schedule, **settings)
    assert (after - end, end <= 2 * 8) == (2 * 5 * WIDTH * 4, True)  # the output, and measured errors


@in_both
def test_passes_that_end_early_leave_nothing(schedule):
    net, sizes = small(4, schedule=schedule), []
    with rp.Live() as live:
        loss = net(torch.randn(3, WIDTH, requires_grad=True)).sum()
        for _ in range(3):
            sizes.append(live.now)
            torch.autograd.grad(loss, net[3].f[1].weight, retain_graph=True)
    assert sizes == sizes[:1] * 3


# --- the check of recovered inputs ---


def contracted(depth, **settings):
    """Both skips scaled by 0.1: every block loses two digits."""
    blocks = [ReversibleBlock(rp.feed_forward(), rp.feed_forward(), scale=(0.1, 0.1)) for _ in range(depth)]
    return ReversibleSequential(blocks, max_error=1e-2, **settings)


@in_both
def test_inputs_that_cannot_be_recovered(schedule):
    pair = streams(dtype=torch.float)
    with pytest.raises(ReconstructionError, match=r"of block 0 .* above max_error=0\.01.*buffer_every"):
        contracted(12, schedule=schedule)(*pair)[0].sum().backward()
    net = contracted(12, schedule=schedule, buffer_every=2)
    net(*pair)[0].sum().backward()
    assert 1e-7 < net.reconstruction_error < 1e-2  # two blocks lose four of seven digits
    assert agrees(net.double(), *streams(), tolerance=1e-10)  # and four of sixteen


@in_both
def test_the_lowest_block_with_a_gradient_is_measured(schedule):
    net = contracted(12, schedule=schedule)
    net[0].requires_grad_(False)
    with pytest.raises(ReconstructionError, match="of block 1 "):
        net(*streams(dtype=torch.float))[0].sum().backward()


@in_both
def test_the_reconstruction_error_by_hand(schedule):
    net, (x1, x2) = contracted(2, schedule=schedule), streams(dtype=torch.float)
    x2 = 100 * x2  # one stream alone would have another relative error
    assert net.reconstruction_error is None
    with torch.no_grad():
        y1, y2 = net[0].inverse(*net[1].inverse(*rp.Loop(net)(x1, x2)))
        off = torch.cat((y1 - x1, y2 - x2)).norm() / torch.cat((x1, x2)).norm()
    net(x1, x2)[0].sum().backward()
    assert net.reconstruction_error == pytest.approx(float(off), rel=0.5)  # of rounding errors in another order
