"""Small reversible stacks with all that makes recomputation hard, an independent loop to compare with, and memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_bpfree.methods.reversible_recompute.coupling import ReversibleBlock
from lightning_bpfree.methods.reversible_recompute.sequential import ReversibleSequential

SCHEDULES = ("autograd", "checkpoint", "sequential", "parallel")
REVERSIBLE = ("sequential", "parallel")
WIDTH = 8


class DropPath(nn.Module):
    """Stochastic depth: whole samples of a branch are dropped."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        keep = torch.rand(len(x), *[1] * (x.dim() - 1), dtype=x.dtype) >= self.p
        return x * keep / (1 - self.p)


class Attention(nn.Module):
    """Pre-norm self-attention, with a mask that the context gives."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attend = nn.MultiheadAttention(WIDTH, 2, dropout=p, batch_first=True)
        self.drop = nn.Sequential(nn.Dropout(p), DropPath(p))

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        x, mask = self.norm(x), mask[0] if isinstance(mask, tuple) else mask
        return self.drop(self.attend(x, x, x, attn_mask=mask, need_weights=False)[0])


def feed_forward(p: float = 0.0) -> nn.Sequential:
    layers = [nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(p), nn.Linear(2 * WIDTH, WIDTH)]
    return nn.Sequential(*layers, nn.Dropout(p), DropPath(p))


def stack(depth: int, p: float = 0.0, scale: tuple[float, float] = (1.0, 1.0), **settings: Any) -> ReversibleSequential:
    """A transformer of two streams, for inputs (batch, tokens, WIDTH)."""
    blocks = [ReversibleBlock(Attention(p), feed_forward(p), scale=scale) for _ in range(depth)]
    return ReversibleSequential(blocks, **settings)


def small(depth: int, make: Callable[[], nn.Module] | None = None, **settings: Any) -> ReversibleSequential:
    """A stack of small branches, for inputs (batch, WIDTH)."""
    make = make or (lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()))
    return ReversibleSequential([ReversibleBlock(make(), make()) for _ in range(depth)], **settings)


class Does(nn.Module):
    """A branch that does what a function of a linear layer and the input says."""

    def __init__(self, what: Callable[[nn.Linear, Tensor], Any]) -> None:
        super().__init__()
        self.what, self.line = what, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.what(self.line, x)


class Shifted(nn.Module):
    """A branch that multiplies by tensors of the context; a holder is a tuple of one, or an object with one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.line = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *, shift: Any = None, memory: Any = None, holder: Any = None) -> Tensor:
        x = self.norm(x)
        for given in (shift, memory, holder and (holder[0] if isinstance(holder, tuple) else holder.tensor)):
            x = x if given is None else x * given
        return self.line(x)


class Unused(nn.Linear):
    """A branch with a parameter that takes no part."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.never = nn.Parameter(torch.ones(1))


class Recurrent(nn.LSTM):
    """A branch that keeps a second list of its weights."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class Checkpointed(nn.Module):
    """A branch that is itself recomputed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Twice(nn.Module):
    """One stack two times in one loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = stack(3, p=0.3).double()

    def forward(self, x1: Tensor, x2: Tensor) -> Any:
        y1, y2 = self.net(x1, x2)
        return self.net(y2, y1 * x1)


def shared() -> ReversibleSequential:
    """One block three times, whose branches are one module."""
    branch = feed_forward(0.3)
    block = ReversibleBlock(branch, branch)
    return ReversibleSequential([block, ReversibleBlock(branch, Attention()), block, block]).double()


def frozen(*which: int, **settings: Any) -> ReversibleSequential:
    """Four blocks, some of them frozen."""
    net = stack(4, p=0.3, **settings).double()
    for index in which:
        net[index].requires_grad_(False)
    return net


def nested() -> nn.Sequential:
    """A branch with a reversible stack in it."""
    return nn.Sequential(feed_forward(0.3), small(2, lambda: feed_forward(0.2)))


def energy(line: nn.Linear, x: Tensor) -> Tensor:
    """A branch that is itself a derivative."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(line(x).tanh().square().sum(), x, create_graph=True)[0]


PARTS: dict[str, Callable[[], nn.Module]] = {
    "shared": shared,
    "unused parameter": lambda: small(3, Unused).double(),
    "no parameters": lambda: small(3, nn.Identity),
    "bottom frozen": lambda: frozen(0, 1),
    "middle frozen": lambda: frozen(1, 2),
    "top frozen": lambda: frozen(2, 3),
    "all frozen": lambda: frozen(0, 1, 2, 3),
    "frozen and buffered": lambda: frozen(0, 3, buffer_every=2),
    "recurrent": lambda: small(2, Recurrent).double(),
    "nested": lambda: small(2, nested).double(),
    "checkpoint within": lambda: small(3, lambda: Checkpointed(feed_forward(0.3))).double(),
    "twice": Twice,
    "derivative": lambda: small(2, lambda: Does(energy)).double(),
}


class Loop(nn.Module):
    """The equations of a stack once more, by plain autograd and without the package's couplings."""

    def __init__(self, of: ReversibleSequential) -> None:
        super().__init__()
        self.of = of

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.of:
            x1 = block.scale[0] * x1 + block.f(x2)
            x2 = block.scale[1] * x2 + block.g(x1)
        return x1, x2


class Outcome(NamedTuple):
    loss: Tensor
    grads: Tensor  # of the inputs and of all parameters, in one vector
    state: Tensor  # of the global random stream at the end


def two_sided(out: Any) -> Tensor:
    """A loss that tells the streams apart."""
    if isinstance(out, Tensor):
        return out.square().sum()
    return out[0].sin().sum() + 2 * out[1].square().sum()


def outcome(module: nn.Module, *inputs: Tensor, seed: int = 1, loss: Any = two_sided, **context: Any) -> Outcome:
    """One forward and backward pass."""
    torch.manual_seed(seed)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    module.zero_grad()
    value = loss(module(*leaves, **context))
    value.backward()
    return Outcome(value.detach(), gradient(*leaves, *module.parameters()), torch.get_rng_state())


def gradient(*tensors: Tensor) -> Tensor:
    """The gradients of all tensors in one vector; a missing one is zero."""
    return torch.cat([(torch.zeros_like(t) if t.grad is None else t.grad).flatten() for t in tensors])


def relative(a: Tensor, b: Tensor) -> float:
    """Relative distance of the whole vectors: parts may have a gradient of zero."""
    assert a.shape == b.shape
    return float((torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).detach())


def streams(*shape: int, dtype: torch.dtype = torch.double) -> tuple[Tensor, Tensor]:
    x1, x2 = torch.randn(2, *(shape or (3, 5, WIDTH)), dtype=dtype)
    return x1, x2


def agrees(net: ReversibleSequential, *inputs: Tensor, tolerance: float = 1e-12, **settings: Any) -> bool:
    """Whether a stack of two streams has the gradients of the loop written by hand."""
    found, by_hand = outcome(net, *inputs, **settings), outcome(Loop(net), *inputs, **settings)
    return relative(found.grads, by_hand.grads) < tolerance


def equal_gradients(make: Callable[[], nn.Module], *inputs: Tensor, tolerance: float = 1e-12, **context: Any) -> None:
    """Every schedule of a module that ``make`` builds gives the loss, gradients and random stream of plain autograd."""
    outcomes = {}
    for schedule in SCHEDULES:
        torch.manual_seed(0)
        module = make()
        for part in module.modules():
            if isinstance(part, ReversibleSequential):
                part.schedule = schedule
        outcomes[schedule] = outcome(module, *inputs, **context)
    plain = outcomes["autograd"]
    for schedule, found in outcomes.items():
        assert torch.equal(found.loss, plain.loss), schedule
        assert torch.equal(found.state, plain.state), schedule
        assert relative(found.grads, plain.grads) < tolerance, schedule
    assert torch.equal(outcomes["sequential"].grads, outcomes["parallel"].grads)


def saved_bytes(run: Callable[[], Any], module: nn.Module) -> int:
    """What the graph of ``run()`` stores beside parameters."""
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()  # alive until all is counted, so that no address is used twice
        total = sum(found.values())
    del out
    return total


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size: int) -> None:
        self.now -= size
