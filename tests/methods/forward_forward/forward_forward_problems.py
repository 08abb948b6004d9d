"""Problems and losses written down plainly, for the tests of Forward-Forward."""

from __future__ import annotations

import torch
from problems import Problem, fitted, loader

from lightning_bpfree.demos.nets import MLP
from lightning_bpfree.methods.forward_forward.goodness import contrast, goodness, rescaled
from lightning_bpfree.methods.forward_forward.negatives import overlaid


def next_label(inputs, labels):
    """Negative labels that everyone can compute."""
    return (labels + 1) % 3


def problem(depth: int = 3, width: int = 8, lr: float = 0.0, **settings) -> Problem:
    torch.manual_seed(0)
    return Problem(MLP(6, [width] * depth, 3), lr=lr, **settings)


def gradients(rule, module=None, data=None, **settings):
    module = problem() if module is None else module
    fitted(module, loader(rows=16) if data is None else data, rule, **settings)
    return module.gradients[0]


def losses_by_hand(module, blocks, temperature=1.0, rows=16):
    """Every block's loss and its layers, written as a loop."""
    x, y = next(iter(loader(rows=rows)))
    z = torch.cat([overlaid(x, y, 3), overlaid(x, next_label(x, y), 3)])
    start = 0
    for size in blocks:
        part = module.net.layers[start : start + 2 * size]
        z = part(rescaled(z.detach()))
        yield contrast(goodness(z), threshold=z.shape[1], temperature=temperature), part
        start += 2 * size


def by_hand(module, blocks, temperature=1.0):
    found = {}
    for loss, part in losses_by_hand(module, blocks, temperature):
        grads = torch.autograd.grad(loss, list(part.parameters()))
        found |= {f"net.layers.{name}": g for (name, _), g in zip(part.named_parameters(), grads, strict=True)}
    return found
