"""Training steps of all members at once: one vmapped evaluation over stacked parameters."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_bpfree.core.forward_ad import plain_attention
from lightning_bpfree.core.replay.held_state import HeldState
from lightning_bpfree.core.replay.object_graph import walk
from lightning_bpfree.core.replay.random_streams import RandomStreams
from lightning_bpfree.core.replay.tensor_copies import TensorCopies
from lightning_bpfree.core.step import SkipBatchError, loss_of
from lightning_bpfree.core.vectorizing import first_line
from lightning_bpfree.methods.deep_ensemble.member_steps import MemberSteps, Step
from lightning_bpfree.methods.deep_ensemble.own_attributes import parts_beside_metrics
from lightning_bpfree.methods.deep_ensemble.vectorized.member_metrics import MemberMetrics
from lightning_bpfree.methods.deep_ensemble.vectorized.member_randomness import MemberRandomness


class NotStackableError(Exception):
    """The training step cannot run side by side; the message says why."""


class SideBySide(MemberSteps):
    """Evaluates a training step for all members in one call of torch.func.vmap."""

    def __post_init__(self) -> None:
        """Prepare metrics and random numbers for all members at once."""
        super().__post_init__()
        self.metrics = MemberMetrics(self.module, self.at_work)
        self.randomness = MemberRandomness(self.streams, self.at_work)

    def losses(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the members' losses ``(M,)`` with their graphs; None if the step skips the batch."""
        losses, buffers = self._evaluate(step, args, kwargs)
        self.members.take_buffers(buffers)
        return losses

    def _evaluate(self, step: Step, args: Any, kwargs: Any) -> tuple[Tensor | None, dict[str, Tensor]]:
        leaves, spec = tree_flatten((args, kwargs))
        dims: list[int | None] = [None] * len(leaves)
        if self.own_batches:
            args = (stacked_batch(args[0]), *args[1:])
            leaves, spec = tree_flatten((args, kwargs))
            in_batch = len(tree_flatten(args[0])[0])
            dims = [0 if i < in_batch and isinstance(leaf, Tensor) else None for i, leaf in enumerate(leaves)]
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        skipped = False
        shape: list[Any] = []

        def one(params: Any, buffers: Any, index: Tensor, tensors: list[Tensor]) -> Any:
            nonlocal skipped
            self.at_work.index = index
            own = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                own[place] = tensor
            own_args, own_kwargs = tree_unflatten(own, spec)
            with self.members.placed(params, buffers) as left, self.randomness:
                output = step(*own_args, **own_kwargs)
            try:
                loss = loss_of(output)
            except SkipBatchError:
                skipped, loss = True, torch.zeros(())
            shape[:] = tree_flatten(output if isinstance(output, dict) else {})
            return loss, left, self.log.tensors(), [leaf for leaf in shape[0] if isinstance(leaf, Tensor)]

        params, buffers = self.members.stacks(), self.members.buffer_stacks()
        index = torch.arange(self.members.count, device=next(iter(params.values())).device)
        tensor_dims = [dims[place] for place in places]
        with self.metrics.listening(), self.log.listening(), self._one_at_a_time(), plain_attention():
            run = vmap(one, in_dims=(0, 0, 0, tensor_dims), randomness="error")
            losses, left, logged, kept = run(params, buffers, index, [leaves[place] for place in places])
        self.log.replace(list(logged))
        first = iter(kept)
        output = [next(first)[0].detach() if isinstance(leaf, Tensor) else leaf for leaf in shape[0]]
        self.first_output = tree_unflatten(output, shape[1])
        return (None if skipped else losses), left

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.at_work.index = None

    def attempt(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Try one evaluation and its gradient, and leave no trace.

        Raises:
            NotStackableError: with the reason, if it does not work.
        """
        found, streams = walk(self.module), RandomStreams([self.streams.device])
        held, tensors = HeldState(found), TensorCopies(found.tensors)  # of metrics, among others
        before = [part.__dict__.copy() for part in parts_beside_metrics(self.module)]
        world, state = streams.save(), held.save()
        tensors.remember()
        try:
            with self.streams.rewound(), tensors.copies(), warnings.catch_warnings():
                # An operation without a batching rule is computed member by member, which a loop does better.
                warnings.filterwarnings("error", message="There is a performance drop")
                losses, _ = self._evaluate(step, args, kwargs)
                after = streams.save()
                if losses is not None:
                    leaves = [leaf for leaf in self.members.leaves() if leaf.requires_grad]
                    with torch.autocast(losses.device.type, enabled=False):  # as where Lightning goes backward
                        torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
            self._check_attributes(before)
        except NotStackableError:
            raise
        except Exception as error:
            raise NotStackableError(_why(error)) from error
        finally:
            held.load(state)
            streams.load(world)
            self.log.drop()
        if after["python"] != world["python"] or not _same(after["numpy"], world["numpy"]):
            raise NotStackableError(
                "training_step draws from Python's or NumPy's random stream, which vmap draws once for all members"
            )

    def _check_attributes(self, before: list[dict[str, Any]]) -> None:
        for part, saved in zip(parts_beside_metrics(self.module), before, strict=True):
            for key, value in part.__dict__.items():
                old = saved.get(key)
                if key in ("_parameters", "_buffers", "_modules") or value is old:
                    continue
                leaves = tree_flatten(value)[0] if isinstance(value, (Tensor, list, tuple, dict)) else []
                if any(isinstance(leaf, Tensor) and torch._C._functorch.is_batchedtensor(leaf) for leaf in leaves):
                    raise NotStackableError(
                        f"training_step keeps a tensor in {type(part).__name__}.{key}, which is none outside of vmap"
                    )


def _why(error: Exception) -> str:
    said = first_line(error)
    missing = re.search(r"batching rule for ([\w:]+)", said)
    if missing:
        return f"torch.func.vmap has no rule for {missing[1]}"
    if "random operation" in said:
        return "training_step draws random numbers of a kind that vmap cannot draw for each member"
    return said


def stacked_batch(batches: Any) -> Any:
    """Return M batches as one, whose tensors have M first.

    Raises:
        NotStackableError: where they differ in anything but the values of tensors.
    """
    flat = [tree_flatten(batch) for batch in batches]
    spec = flat[0][1]
    if any(other != spec for _, other in flat):
        raise NotStackableError("the members' batches differ in structure")
    leaves: list[Any] = []
    for values in zip(*(own for own, _ in flat), strict=True):
        if isinstance(values[0], Tensor):
            if len({value.shape for value in values}) != 1:
                raise NotStackableError("the members' batches differ in shape")
            leaves.append(torch.stack(values))
        elif all(value == values[0] for value in values):
            leaves.append(values[0])
        else:
            raise NotStackableError("the members' batches differ in values that are not tensors")
    return tree_unflatten(leaves, spec)


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return bool(a[2] == b[2] and (a[1] == b[1]).all())
