"""torchmetrics objects within torch.func.vmap: they are updated with one member after another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_bpfree.methods.deep_ensemble.vectorized.per_member import AtWork, per_member


class MemberMetrics:
    """Lets the metrics of a module be called in vmap: each call counts every member, and gives every member's value.

    A metric is one object that all members share, as in sequence: its value over an epoch is that of all their
    predictions together.

    Args:
        module: the module.
        at_work: who is computing.
    """

    def __init__(self, module: nn.Module, at_work: AtWork) -> None:
        self.metrics = [part for part in module.modules() if isinstance(part, torchmetrics.Metric)]
        self.at_work = at_work
        self._counting = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Replace ``update`` and ``forward`` of all metrics in this context."""
        saved = [{key: metric.__dict__.get(key) for key in ("update", "forward")} for metric in self.metrics]
        for metric in self.metrics:
            for key in ("update", "forward"):
                metric.__dict__[key] = _Counting(self, getattr(metric, key))
        try:
            yield
        finally:
            for metric, own in zip(self.metrics, saved, strict=True):
                for key, value in own.items():
                    del metric.__dict__[key]
                    if value is not None:
                        metric.__dict__[key] = value

    def count(self, method: Any, args: Any, kwargs: Any) -> Any:
        """Call ``method`` once for each member."""
        if self._counting or self.at_work.index is None:
            return method(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        shape: list[Any] = []

        def each(_: Tensor, *stacks: Tensor) -> tuple[Tensor, ...]:
            values: list[list[Tensor]] = []
            for member in range(self.at_work.members):
                own = list(leaves)
                for place, stack in zip(places, stacks, strict=True):
                    own[place] = stack[member]
                own_args, own_kwargs = tree_unflatten(own, spec)
                result, result_spec = tree_flatten(method(*own_args, **own_kwargs))
                shape[:] = [result_spec, [isinstance(leaf, Tensor) for leaf in result], result]
                values.append([leaf for leaf in result if isinstance(leaf, Tensor)])
            stacked = [torch.stack(of_members) for of_members in zip(*values, strict=True)]
            return tuple(stacked) or (torch.zeros(self.at_work.members),)

        self._counting = True
        try:
            with torch.no_grad():
                tensors = [leaves[place].detach() for place in places]
                found = list(per_member(each, self.at_work, self.at_work.index, *tensors))
        finally:
            self._counting = False
        result_spec, are_tensors, result = shape
        return tree_unflatten(
            [found.pop(0) if is_tensor else leaf for is_tensor, leaf in zip(are_tensors, result, strict=True)],
            result_spec,
        )


class _Counting:
    """Stands in for one method of one metric."""

    def __init__(self, metrics: MemberMetrics, method: Any) -> None:
        self.metrics, self.method = metrics, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.metrics.count(self.method, args, kwargs)
