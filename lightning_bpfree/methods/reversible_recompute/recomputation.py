"""Recomputation of the activations of a reversible stack in the backward pass."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lightning_bpfree.core.arguments import NonNegativeInt, PositiveFloat, PositiveInt, check, checked
from lightning_bpfree.core.recompute_context import Autocast
from lightning_bpfree.methods.reversible_recompute.autograd_function import ReversibleFunction
from lightning_bpfree.methods.reversible_recompute.coupling import Coupling
from lightning_bpfree.methods.reversible_recompute.module_snapshot import Inventory
from lightning_bpfree.methods.reversible_recompute.refused import RefusedStackError
from lightning_bpfree.methods.reversible_recompute.tape import Block, Tape

Schedule = Literal["autograd", "checkpoint", "sequential", "parallel"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


class ReconstructionError(RuntimeError):
    """The inputs that a reversible stack recovered differ too much from the true ones for a correct gradient."""


class Recomputation:
    """Runs couplings in sequence, according to a schedule.

    Args:
        schedule: ``"autograd"``: all activations are stored; ``"checkpoint"``: the streams between blocks are stored,
            and every block runs again; ``"sequential"``: nothing but the output is stored, and each block's inputs are
            recovered from its outputs and differentiated, one block after the other; ``"parallel"``: the same, while
            the block below is recovered on a second CUDA stream beside the gradients of a block (PaReprop); on other
            devices the same operators run in the same order on one stream.
        buffer_every: keep the inputs of every n-th block, at least 1, and go on from those; None for none.
        max_error: largest relative error of recovered inputs that is let through, above 0; measured where inputs are
            kept, for which those of the first block are. None: not measured, unless inputs are buffered.
        check_every: measure in every n-th pass, at least 1.
        store_last: number of blocks at the top that store their activations as in plain autograd, at least 0. Needs
            their memory, and saves the time of recomputing them.

    Raises:
        ValueError: for arguments out of range.
    """

    @checked
    def __init__(
        self,
        schedule: Schedule = "sequential",
        buffer_every: PositiveInt | None = None,
        max_error: PositiveFloat | None = None,
        check_every: PositiveInt = 1,
        store_last: NonNegativeInt = 0,
    ) -> None:
        self.schedule = schedule
        self.buffer_every, self.max_error, self.check_every = buffer_every, max_error, check_every
        self.store_last = store_last
        self.passes = 0
        self._errors: dict[str, Tensor] = {}

    @property
    def schedule(self) -> Schedule:
        """How activations are recovered; may be set between two passes."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        check(type(self).__name__, "schedule", schedule, Schedule)
        self._schedule: Schedule = schedule

    @property
    def error(self) -> float | None:
        """The largest relative error of recovered inputs in the last pass that was measured; None if none was."""
        return max((float(error) for error in self._errors.values()), default=None)

    def run(
        self, couplings: Sequence[Coupling], x1: Tensor, x2: Tensor, context: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return the outputs of both streams.

        Args:
            couplings: the blocks.
            x1: first stream.
            x2: second stream, of the same shape.
            context: keyword arguments; each goes to the branches that name it.

        Raises:
            ValueError: if the streams differ in shape or type.
            RefusedStackError: under ``torch.func`` transforms that would need a graph of the recomputation.
        """
        _check_streams(x1, x2)
        _check_hooks(couplings)
        if Autocast.now(x1.device.type).enabled and x1.dtype in (torch.float16, torch.bfloat16):
            # A stream adds up all branches: in half precision it could not be recovered.
            x1, x2 = (x1.float(), x1.float()) if x1 is x2 else (x1.float(), x2.float())
        _check_context(context)
        if self.schedule == "autograd" or not torch.is_grad_enabled():
            return _plain(couplings, x1, x2, context)
        if self.schedule == "checkpoint":
            return _checkpointed(couplings, x1, x2, context)
        cut = max(0, len(couplings) - self.store_last)
        if cut:
            x1, x2 = self._reversible(couplings[:cut], x1, x2, context)
        return _plain(couplings[cut:], x1, x2, context)

    # Compiled code draws other random numbers than eager code, and a forward pass of the one must not be repeated by
    # the other: under torch.compile the stack runs eagerly. Branches that were compiled by themselves stay compiled.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _reversible(
        self, couplings: Sequence[Coupling], x1: Tensor, x2: Tensor, context: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
            raise RefusedStackError(
                f"schedule={self.schedule!r} within a transform of torch.func (grad, vjp, jvp, vmap) is not possible: "
                "its backward pass recomputes outside of the transform. Use schedule='autograd', or torch.no_grad() "
                "where no gradient is needed."
            )
        due = self.passes % self.check_every == 0
        self.passes += 1
        # Walking through graphs takes a hundredth of a step: passes 1, 2, 4, 8 and so on look for lost gradients.
        suspicious = self.passes & (self.passes - 1) == 0
        blocks = [Block(coupling, Inventory(coupling.owner, coupling.label), []) for coupling in couplings]
        given = [x1, x2, *(value for value in context.values() if isinstance(value, Tensor))]
        while blocks and not any(t.requires_grad for t in (*given, *blocks[0].inventory.trainable)):
            x1, x2 = blocks.pop(0).coupling.forward(x1, x2, context)  # frozen, down to the data: no gradient comes here
        every = self.buffer_every or len(blocks)
        buffered = frozenset([*range(every, len(blocks), every or 1), *([0] if due and self.max_error else [])])
        tape = Tape(context, x1, self.schedule == "parallel", buffered, self._drift if due else None, suspicious)
        tape.blocks = blocks
        for index in range(len(blocks)):
            top = index == len(blocks) - 1
            x1, x2 = ReversibleFunction.apply(tape, index, top, x1, x2, *tape.inputs(index))
        return x1, x2

    def _drift(self, label: str, recovered: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
        off = _norm(x - y for x, y in zip(kept, recovered, strict=True))
        size = _norm(kept)
        error = off / size.clamp_min(torch.finfo(size.dtype).tiny)
        self._errors[label] = error
        if self.max_error is not None and not float(error) <= self.max_error:
            raise ReconstructionError(
                f"the inputs of {label} were recovered with a relative error of {float(error):.2g}, above "
                f"max_error={self.max_error:g}: gradients would be wrong. Use buffer_every with a smaller number of "
                "blocks, scales nearer to 1, a higher precision, or schedule='checkpoint'."
            )


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    # In float64, for squares of small and of large numbers; Apple's devices have none.
    wide = [x.detach() if x.device.type == "mps" else x.detach().double() for x in tensors]
    total: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x) for x in wide]))
    return total


def _check_streams(x1: Tensor, x2: Tensor) -> None:
    if x1.shape != x2.shape or x1.dtype != x2.dtype or x1.device != x2.device:
        raise RefusedStackError(
            f"the streams are {tuple(x1.shape)} of {x1.dtype} on {x1.device} and {tuple(x2.shape)} of {x2.dtype} on "
            f"{x2.device}; a reversible stack needs two streams of one shape, type and device."
        )
    if not x1.is_floating_point():
        raise RefusedStackError(f"the streams are of {x1.dtype}; a reversible stack needs floating-point numbers.")


def _check_hooks(couplings: Sequence[Coupling]) -> None:
    for coupling in couplings:
        owner = coupling.owner
        kinds = (owner._forward_hooks, owner._forward_pre_hooks, owner._backward_hooks, owner._backward_pre_hooks)
        if not any(_in_use(hook) for hooks in kinds for hook in hooks.values()):
            continue
        message = (
            f"{coupling.label} of a reversible stack has hooks, which are not called: its branches run, not the block. "
            "Hook modules inside it or the whole stack; in transformers, turn off output_hidden_states."
        )
        if torch.is_grad_enabled():
            raise RefusedStackError(message)
        warnings.warn(message, stacklevel=4)  # a summary of the model hooks its layers, too
        return


def _in_use(hook: Any) -> bool:
    # transformers leaves its hooks on layers after one call with output_hidden_states; they collect when asked again.
    collector = getattr(sys.modules.get(getattr(hook, "__module__", "")), "_active_collector", None)
    return collector is None or bool(collector.get())


def _check_context(context: Mapping[str, Any]) -> None:
    for key, value in context.items():
        if isinstance(value, Tensor):
            continue
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(value)):
            raise RefusedStackError(
                f"{key} holds a tensor that needs a gradient within a {type(value).__name__}, where it would be lost: "
                "pass that tensor as a separate keyword argument."
            )


def _plain(couplings: Sequence[Coupling], x1: Tensor, x2: Tensor, context: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    for coupling in couplings:
        x1, x2 = coupling.forward(x1, x2, context)
    return x1, x2


def _checkpointed(
    couplings: Sequence[Coupling], x1: Tensor, x2: Tensor, context: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    for coupling in couplings:
        inventory = Inventory(coupling.owner, coupling.label)
        buffers = inventory.copies()
        again = functools.partial(_as_it_was, inventory, buffers)

        def contexts(again: Callable[[], Any] = again) -> Any:
            return contextlib.nullcontext(), _Repeatable(again)

        x1, x2 = checkpoint(coupling.forward, x1, x2, context, use_reentrant=False, context_fn=contexts)
        inventory.moved(buffers)
    return x1, x2


@contextlib.contextmanager
def _as_it_was(inventory: Inventory, buffers: Sequence[Tensor]) -> Iterator[None]:
    """Compute with the weights of then, and move buffers once; torch leaves both to the module."""
    inventory.check()
    with inventory.again(buffers, aliases=False):
        yield


class _Repeatable:
    """A context that can be entered several times: torch recomputes as often as it is asked."""

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self.make, self.stack = make, contextlib.ExitStack()

    def __enter__(self) -> None:
        self.stack.enter_context(self.make())

    def __exit__(self, *error: Any) -> bool | None:
        return self.stack.__exit__(*error)
