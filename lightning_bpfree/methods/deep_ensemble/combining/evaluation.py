"""The answers of an ensemble's network: the combined outputs of all members."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_bpfree.core.forward_ad import plain_attention
from lightning_bpfree.methods.deep_ensemble.combining.combination import Combination
from lightning_bpfree.methods.deep_ensemble.members import Members
from lightning_bpfree.methods.deep_ensemble.vectorized.per_member import AtWork


class Evaluation:
    """Computes the members' outputs, side by side if that works, and keeps their predictions for reports.

    Args:
        members: the members.
        combination: of their outputs.
        at_work: who is computing.
        side_by_side: whether to try all at once.
    """

    def __init__(self, members: Members, combination: Combination, at_work: AtWork, side_by_side: bool) -> None:
        self.members, self.combination, self.at_work = members, combination, at_work
        self.side_by_side = side_by_side
        self.predictions: Tensor | None = None
        self.combined: Tensor | None = None

    def __call__(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return the ensemble's output."""
        outputs = self.outputs(forward, args, kwargs)
        combined = self.combination.combined(outputs)
        place = self.combination.place(outputs[0])
        self.predictions = torch.stack([tree_flatten(output)[0][place] for output in outputs]).detach()
        self.combined = tree_flatten(combined)[0][place].detach()
        return combined

    def outputs(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
        """Return every member's output."""
        if self.side_by_side:
            try:
                return self._all_at_once(forward, args, kwargs)
            except Exception:  # in turn, either it works or it says what is wrong
                self.side_by_side = False
            finally:
                self.at_work.index = None
        outputs = []
        for member in range(self.members.count):
            self.at_work.member = member
            try:
                with self.members.at_work(member):
                    outputs.append(forward(*args, **kwargs))
            finally:
                self.at_work.member = 0
        return outputs

    def _all_at_once(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
        shape: list[Any] = []

        def one(params: Any, buffers: Any, index: Tensor) -> Any:
            self.at_work.index = index
            with self.members.placed(params, buffers) as left, plain_attention():
                output = forward(*args, **kwargs)
            leaves, spec = tree_flatten(output)
            shape[:] = [spec, leaves]
            return [leaf for leaf in leaves if isinstance(leaf, Tensor)], left

        params, buffers = self.members.stacks(), self.members.buffer_stacks()
        index = torch.arange(self.members.count, device=next(iter(params.values())).device)
        tensors, left = vmap(one, randomness="error")(params, buffers, index)
        self.members.take_buffers(left)
        spec, leaves = shape
        outputs = []
        for member in range(self.members.count):
            given = iter(tensor[member] for tensor in tensors)
            outputs.append(tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], spec))
        return outputs
