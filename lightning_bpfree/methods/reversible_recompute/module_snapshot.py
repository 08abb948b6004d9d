"""Snapshots of a module's weights and buffers, so that it can compute with them again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_bpfree.core.params import place
from lightning_bpfree.methods.reversible_recompute.refused import RefusedStackError


class Inventory:
    """The current parameters and buffers of a module, and its mode.

    Args:
        owner: the module.
        label: what messages call it.

    Examples:
        >>> import torch
        >>> net = nn.Linear(2, 1)
        >>> inventory = Inventory(net, "net")
        >>> _ = net.weight.data.add_(1.0), inventory.check()  # .data leaves no trace
        >>> with torch.no_grad():
        ...     _ = net.weight.add_(1.0)
        >>> inventory.check()
        Traceback (most recent call last):
            ...
        lightning_bpfree...RefusedStackError: a parameter of net was changed in place between forward and backward...
    """

    def __init__(self, owner: nn.Module, label: str) -> None:
        self.owner, self.label = owner, label
        self._modes = [(name, module, module.training) for name, module in owner.named_modules()]
        self.places: list[tuple[nn.Module, str, Tensor]] = []
        self.buffers: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        for _, module, _ in self._modes:
            self.places += [(module, key, p) for key, p in module._parameters.items() if p is not None]
            self.buffers += [(module._buffers, key, b) for key, b in module._buffers.items() if b is not None]
        self.parameters = list({id(p): p for _, _, p in self.places}.values())
        if any(map(is_lazy, self.parameters)):
            raise RefusedStackError(
                f"{label} has parameters without a shape (a lazy module?), which cannot be differentiated: run the "
                "stack once with schedule='autograd', which creates them."
            )
        self.trainable = [p for p in self.parameters if p.requires_grad]
        self._versions = list(map(version, self.parameters))
        self._settled = [version(b) for _, _, b in self.buffers]
        self._moves = [False] * len(self.buffers)

    # --- buffers of one evaluation ---

    def copies(self) -> list[Tensor]:
        """Return copies of the buffers; call before an evaluation."""
        self._settled = [version(b) for _, _, b in self.buffers]
        return [b.clone() for _, _, b in self.buffers]

    def moved(self, before: Sequence[Tensor]) -> list[bool]:
        """Return which buffers an evaluation has changed.

        Args:
            before: what :meth:`copies` returned before it.
        """
        now = [version(b) for _, _, b in self.buffers]
        # Batch normalization moves its statistics, and ``.data`` a tensor, without a trace in the version. Tables of
        # integers are not compared, for on an accelerator that would make the host wait.
        changed = [
            after != then or r.get(key) is not b or (b.is_floating_point() and not torch.equal(b, copy))
            for (r, key, b), after, then, copy in zip(self.buffers, now, self._settled, before, strict=True)
        ]
        self._settled = now
        self._moves = [a or b for a, b in zip(self._moves, changed, strict=True)]
        return changed

    # --- again ---

    def check(self) -> None:
        """Refuse to repeat an evaluation whose weights or mode are no longer what they were.

        Raises:
            RefusedStackError: if a parameter, or a buffer that the evaluation did not move, was changed in place, or
                the module was switched between training and evaluation.
        """
        changed = None
        if list(map(version, self.parameters)) != self._versions:
            changed = "parameter"
        elif any(
            not moves and version(b) != settled
            for (_, _, b), settled, moves in zip(self.buffers, self._settled, self._moves, strict=True)
        ):
            changed = "buffer"
        if changed is not None:
            raise RefusedStackError(
                f"a {changed} of {self.label} was changed in place between forward and backward, so that its inputs "
                "cannot be recomputed: call backward() before the optimizer's step, or use schedule='autograd'."
            )
        switched = [name for name, module, training in self._modes if module.training != training]
        if switched:
            raise RefusedStackError(
                f"the mode of {self.label}{'.' if switched[0] else ''}{switched[0]} (training or evaluation) was "
                "switched between the forward pass and the backward pass: call train() or eval() after backward()."
            )

    @contextlib.contextmanager
    def again(self, buffers: Sequence[Tensor | None] = (), aliases: bool = True) -> Iterator[list[Tensor]]:
        """Compute with the weights of then; buffers are left alone.

        Args:
            buffers: copies from which the buffers start, None for one that the evaluation does not move; empty if it
                moves none.
            aliases: whether the trainable parameters are stood in for by leaves of their own, so that neither hooks on
                parameters nor what they are computed from see a gradient.

        Yields:
            What stands in for :attr:`trainable`.
        """
        stand_ins = {id(p): _stand_in(p) for p in self.trainable} if aliases else {}
        weights = [(module, key, module._parameters.get(key)) for module, key, _ in self.places]
        kept = [(registry, key, registry.get(key)) for registry, key, _ in self.buffers]
        try:
            for module, key, then in self.places:
                place(module, key, stand_ins.get(id(then), then))
            for number, (registry, key, then) in enumerate(self.buffers):
                # Copies are put in the place of buffers rather than values into them: graphs may hold the buffers.
                copy = buffers[number] if buffers else None
                registry[key] = then if copy is None else copy.clone()
            with uncached():
                yield [stand_ins.get(id(p), p) for p in self.trainable]
        finally:
            for module, key, own in weights:
                place(module, key, own)
            for registry, key, buffer in kept:
                registry[key] = buffer

    @staticmethod
    def foreign(out: Tensor, known: Sequence[Tensor]) -> Tensor | None:
        """Return a leaf that ``out`` depends on otherwise than through ``known``; None if there is none.

        Args:
            out: computed with a graph.
            known: tensors that it may depend on.
        """
        mine = {id(tensor) for tensor in known}
        # Nodes themselves rather than their ids: those of nodes that are gone are given out again.
        seen = {tensor.grad_fn for tensor in known} | {None}
        todo: list[Any] = [out.grad_fn]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor) and id(leaf) not in mine:
                return leaf
            todo += [following for following, _ in node.next_functions]
        return None


def _stand_in(parameter: Tensor) -> Tensor:
    alias = parameter.detach()
    return nn.Parameter(alias) if type(parameter) is nn.Parameter else alias.requires_grad_()


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Compute parametrized weights again: those of ``torch.nn.utils.parametrize.cached`` belong to another graph."""
    cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = cached


def version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; 0 if that is not counted."""
    return 0 if tensor.is_inference() else tensor._version
