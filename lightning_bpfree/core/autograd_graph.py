"""Traversal of autograd's graph."""

from __future__ import annotations

from torch import Tensor


def reached(tensor: Tensor) -> list[Tensor]:
    """Return the leaves of the graph of ``tensor``."""
    if tensor.grad_fn is None:
        return [tensor]
    found, seen, waiting = [], set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where gradients of a leaf are accumulated
            found.append(node.variable)
        waiting += [following for following, _ in node.next_functions if following is not None]
    return found
