"""What a reversible stack refuses, and hostile use that it survives."""

import contextlib
import copy
import gc
import io
import pickle
import random
import re

import pytest
import reversible_problems as rp
import torch
from reversible_problems import WIDTH, small
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lightning_bpfree.methods.reversible_recompute.coupling import ReversibleBlock
from lightning_bpfree.methods.reversible_recompute.recomputation import ReconstructionError
from lightning_bpfree.methods.reversible_recompute.sequential import ReversibleSequential

in_both = pytest.mark.parametrize("schedule", rp.REVERSIBLE)
in_all = pytest.mark.parametrize("schedule", rp.SCHEDULES)

# --- arguments ---

BAD = [("schedule", "fast"), ("enter", "twice"), ("fusion", "glue"), ("fusion", "concat_linear"), ("buffer_every", 0)]
BAD += [("max_error", 0.0), ("max_error", float("nan")), ("check_every", 0), ("store_last", -1)]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_settings(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}") + ".*(choose|give)"):
        small(1, **{name: value})


def test_bad_blocks():
    line = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(ValueError, match="at least one"):
        ReversibleSequential([])
    with pytest.raises(ValueError, match=r"blocks=.*give a list of ReversibleBlocks"):
        ReversibleSequential([ReversibleBlock(line, line), line])
    with pytest.raises(ValueError, match="block 1 is a Linear"):
        ReversibleSequential(block for block in (ReversibleBlock(line, line), line))
    for scale in ((0.0, 1.0), (1.0, -1.0), (float("inf"), 1.0), (1.0,)):
        with pytest.raises(ValueError, match="scale="):
            ReversibleBlock(line, line, scale=scale)


ROW = torch.zeros(2, WIDTH)
BAD_STREAMS = {
    r"streams are \(2, 8\).*\(3, 8\)": (ROW, torch.zeros(3, WIDTH)),
    "two streams of one shape, type": (ROW, ROW.double()),
    "on cpu.*on meta": (ROW, ROW.to("meta")),
    "floating-point": (ROW.long(), None),
    r"halves dimension -1 of shape \(2, 7\), which is odd": (ROW[:, :7], None),
}


@in_all
@pytest.mark.parametrize("said", BAD_STREAMS)
def test_bad_streams(said, schedule):
    x1, x2 = BAD_STREAMS[said]
    with pytest.raises(ValueError, match=said):
        small(1, enter="split" if x1.shape[1] % 2 else "duplicate", schedule=schedule)(x1, x2)


BAD_BRANCHES = {
    r"of block 0 makes shape \(1, 8\) of \(2, 8\)": lambda line, x: line(x)[:1],
    "keeps the shape": lambda line, x: line(x).mean(),
    "of block 0 returns tuple": lambda line, x: (line(x), None),
    r"changes its input in place.*inplace=False": lambda line, x: line(x.relu_()),
    "float64": lambda line, x: line(x).double(),
}


@in_all
@pytest.mark.parametrize("place", ["f", "g"])
@pytest.mark.parametrize("said", BAD_BRANCHES)
def test_bad_branches(said, place, schedule):
    branches = {"f": nn.Linear(WIDTH, WIDTH), "g": nn.Linear(WIDTH, WIDTH), place: rp.Does(BAD_BRANCHES[said])}
    net = ReversibleSequential([ReversibleBlock(**branches)], schedule)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=said):
        net(ROW + 1, ROW + 2)


# --- changes between forward and backward ---

CHANGES = {
    "first output": (lambda net, mask, outs: outs[0].add_(1), r"out-of-place operation \(y = y \+ 1"),
    "second output": (lambda net, mask, outs: outs[1].mul_(2), "out-of-place"),
    "mask": (lambda net, mask, outs: mask.fill_(-1), "pass a copy"),
    "mask in a tuple": (lambda net, mask, outs: mask.fill_(-1), "pass a copy"),
    "weight": (lambda net, mask, outs: net[0].g[1].weight.mul_(2), "in place"),
    "buffer": (lambda net, mask, outs: net[1].f.table.add_(1), "a buffer of block 1 was changed in place"),
    "mode": (lambda net, mask, outs: net.eval(), "mode of block 1"),
    "mode of a part": (lambda net, mask, outs: net[1].g[3].eval(), "mode"),
}
CASES = [(name, schedule) for name in CHANGES for schedule in rp.REVERSIBLE]


@pytest.mark.parametrize(("name", "schedule"), [*CASES, ("weight", "checkpoint")])
def test_what_changes_between_forward_and_backward(name, schedule):
    change, said = CHANGES[name]
    blocks = [ReversibleBlock(rp.Attention(), rp.feed_forward(0.5)) for _ in range(2)]
    net, mask = ReversibleSequential(blocks, schedule), torch.zeros(5, 5)
    net[1].f.register_buffer("table", torch.zeros(1))
    outs = net(*rp.streams(dtype=torch.float), mask=(mask,) if "tuple" in name else mask)
    with torch.no_grad():
        change(net, mask, outs)
    with pytest.raises(RuntimeError, match=said):
        rp.two_sided(outs).backward()


def test_a_fused_output_that_is_a_stream_may_not_change_either():
    out = small(2, fusion="second")(ROW)
    with torch.no_grad():
        out.add_(1)
    with pytest.raises(RuntimeError, match="out-of-place"):
        out.sum().backward()


# --- context ---


@pytest.mark.parametrize("frozen", [False, True])
def test_tensors_of_the_context_get_gradients(frozen):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small(3, rp.Shifted).double()
            self.position = nn.Parameter(torch.ones(WIDTH, dtype=torch.double))
            self.net.requires_grad_(not frozen)

        def forward(self, x1, x2, memory):
            return self.net(x1, x2, shift=self.position.sin() + 1, memory=memory.exp())

    rp.equal_gradients(Net, *rp.streams(3, WIDTH), torch.randn(WIDTH, dtype=torch.double))


def test_bad_context():
    tensor = torch.ones(WIDTH, requires_grad=True)
    with pytest.raises(TypeError, match="keyword argument 'masks'; its branches take holder, memory, shift"):
        small(1, rp.Shifted).double()(ROW.double(), masks=None)
    for holder in ((tensor, 1), [tensor], {"a": tensor}):
        with pytest.raises(ValueError, match="holder holds a tensor that needs a gradient within a"):
            small(1, rp.Shifted).double()(ROW.double(), holder=holder)
    with pytest.raises(TypeError, match="its branches take none"):
        small(1)(ROW, mask=None)


# --- transforms ---


@in_both
def test_derivatives_that_are_refused(schedule):
    net, x = small(2, schedule=schedule), torch.randn(3, WIDTH, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"differentiable once.*schedule='autograd'"):
        torch.autograd.grad(net(x).sum(), x, create_graph=True)
    for transform in (torch.func.grad(lambda x: net(x).sum()), torch.func.vmap(net)):
        with pytest.raises(RuntimeError, match=r"within a transform of torch\.func.*schedule='autograd'"):
            transform(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="schedule='autograd'"):
        net(forward_ad.make_dual(x.detach(), x.detach()))


@in_both
def test_transforms_without_a_graph(schedule):
    net, (x, v) = small(3, schedule=schedule).double(), rp.streams(3, WIDTH)
    expected = torch.autograd.functional.jvp(lambda x: sum(rp.Loop(net)(x, x)) / 2, x, v)
    with torch.no_grad():
        out, tangent = torch.func.jvp(net, (x,), (v,))
        torch.testing.assert_close(torch.func.vmap(net)(x), out, rtol=1e-10, atol=1e-10)  # batched products
    assert torch.equal(out, expected[0])
    torch.testing.assert_close(tangent, expected[1], rtol=1e-10, atol=1e-10)  # forward mode against reverse mode


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it
@in_both
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("part", ["whole", "branches"])
def test_compiled(part, backend, schedule):
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), rp.stack(3, schedule=schedule), nn.Linear(WIDTH, 2)).double()
    x, compiled = rp.streams()[0], torch.compile(net, backend=backend) if part == "whole" else net
    expected = rp.outcome(net, x)
    for block in net[1] if part == "branches" else ():
        block.f, block.g = torch.compile(block.f, backend=backend), torch.compile(block.g, backend=backend)
    assert rp.relative(rp.outcome(compiled, x).grads, expected.grads) < 1e-12
    # Compiled modules seem to take any keyword argument.
    net[1](x, mask=torch.zeros(5, 5, dtype=x.dtype)).sum().backward()
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("way", [checkpoint, torch.autograd.graph.save_on_cpu, torch.autograd.detect_anomaly])
def test_within_other_machinery_of_autograd(way):
    class Net(rp.Twice):
        def forward(self, x1, x2):
            return checkpoint(self.net, x1, x2, use_reentrant=False) if way is checkpoint else self.net(x1, x2)

    with contextlib.nullcontext() if way is checkpoint else way():
        rp.equal_gradients(Net, *rp.streams())


# --- copies, hooks, exceptions ---


def test_copies_and_saved_states():
    net, pair = rp.stack(3, p=0.3, max_error=1.0, schedule="parallel").double(), rp.streams()
    assert list(net.state_dict()) == [f"{i}.{name}" for i in range(3) for name in net[i].state_dict()]
    expected, file = rp.outcome(net, *pair), io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    alive = rp.two_sided(net(*pair))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
        assert other.schedule == "parallel"
        assert torch.equal(rp.outcome(other, *pair).grads, expected.grads)
    alive.backward()
    assert [len(net), net[-1] is net[2], [*net][1] is net[1]] == [3, True, True]


@in_all
def test_hooks_of_modules(schedule):
    net, seen, pair = small(2, schedule=schedule).double(), [], rp.streams(3, WIDTH)
    net[0].f.register_full_backward_hook(lambda module, into, out: (3 * into[0],))
    for name in ("0.f", "1.g.1", ""):
        net.get_submodule(name).register_full_backward_hook(lambda m, i, o, name=name: seen.append(name))
    rp.outcome(net, *pair)
    assert seen == ["1.g.1", "0.f", ""]
    assert rp.agrees(net, *pair)
    net[1].register_forward_hook(lambda *args: seen.append("block"))
    with contextlib.suppress(RuntimeError):
        net(*pair)
        assert seen[-1] == "block"


@in_both
def test_an_aborted_backward_pass_leaks_nothing_and_can_be_repeated(schedule):
    net, pair, gone = small(4, schedule=schedule).double(), rp.streams(3, WIDTH), []
    expected = rp.outcome(rp.Loop(net), *pair).grads
    net.zero_grad()

    def fail_once(_):
        if not gone:
            raise KeyError(gone.append(1))

    net[2].f[1].weight.register_post_accumulate_grad_hook(fail_once)
    with rp.Live() as live:
        leaves = [x.clone().requires_grad_() for x in pair]
        loss = rp.two_sided(net(*leaves))
        with contextlib.suppress(KeyError):
            loss.backward(retain_graph=True)
        net.zero_grad()
        loss.backward()
        assert rp.relative(rp.gradient(*net.parameters()), expected[2 * 3 * WIDTH :]) < 1e-12
        gone.clear()
        loss = rp.two_sided(net(*leaves))
        with contextlib.suppress(KeyError):
            loss.backward()
        del loss, leaves
        net.zero_grad()
        torch.ones(1, requires_grad=True).sum().backward()  # torch's engine drops what was left when it runs next
    assert live.now == 0


def test_random_states_are_kept_where_numbers_are_drawn():
    def states(p):
        outs = rp.stack(3, p)(*rp.streams(dtype=torch.float))
        return outs and sum(type(o) is torch.Tensor and o.dtype == torch.uint8 for o in gc.get_objects())

    assert states(0.1) - states(0.0) == 3 * 2


# --- the check of recovered inputs ---


@pytest.mark.parametrize("buffer_every", [None, 2])
def test_measured_in_one_of_so_many_passes(buffer_every):
    net, measured = small(5, max_error=1.0, check_every=3, buffer_every=buffer_every), []
    for _ in range(7):
        net.recomputation._errors.clear()
        net(torch.randn(2, WIDTH)).sum().backward()
        measured.append(net.reconstruction_error is not None)
    assert measured == [True, False, False, True, False, False, True]


@pytest.mark.parametrize(("rows", "factor"), [(0, 1.0), (2, 0.0), (2, 1e-25), (2, 1e25), (512, 2e3)])
def test_inputs_of_any_size_are_measured(rows, factor):
    # The square of a norm may be 0 or infinite, a norm infinite in half precision; and 0 / 0 is no number.
    net, x = small(3, lambda: nn.Linear(WIDTH, WIDTH, bias=False), max_error=1e-2), torch.randn(rows, WIDTH) * factor
    net.half()(x.half()).sum().backward() if rows > 2 else net(x).sum().backward()
    assert (rows > 2) * 1e-6 <= net.reconstruction_error <= 1e-2  # half precision has three digits


@in_both
def test_foreign_random_numbers_are_caught_by_max_error(schedule):
    net = small(2, lambda: rp.Does(lambda line, x: line(x) * random.random()), schedule=schedule, max_error=1e-3)
    with pytest.raises(ReconstructionError, match="block 0"):
        net(torch.randn(2, WIDTH)).sum().backward()
