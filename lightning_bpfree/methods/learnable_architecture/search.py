"""The search: steps of the sizes along the gradient of loss and budget, until they are fixed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_bpfree.methods.learnable_architecture.architecture import Architecture
from lightning_bpfree.methods.learnable_architecture.continuous.convolution import sampled_kernels
from lightning_bpfree.methods.learnable_architecture.sizes.axes import refresh
from lightning_bpfree.methods.learnable_architecture.sizes.cost import Cost, deviation, settle
from lightning_bpfree.methods.learnable_architecture.tracing.probe import ExampleCall, quiet_evaluation

_MAX_NORM = 1.0  # of the gradient: far from the budget its square is steep


class Search:
    """Moves the sizes of one network, and brings its cost to a budget.

    Args:
        architecture: the sizes.
        cost: of the network, in the unit of the target.
        target: the budget.
        weight: weight of the budget's term in the loss.
        lr: learning rate of SGD for the sizes. Adam would move a size that costs little as fast as one that costs much,
            and momentum would carry the cost far beyond the budget.
        tolerance: relative, within which the cost is brought where the sizes are fixed.
        update_every: steps between two changes of the crops.
    """

    def __init__(
        self,
        architecture: Architecture,
        cost: Cost,
        target: float,
        *,
        weight: float,
        lr: float,
        tolerance: float,
        update_every: int = 1,
    ) -> None:
        self.architecture, self.cost, self.target = architecture, cost, target
        self.weight, self.lr, self.tolerance, self.update_every = weight, lr, tolerance, update_every
        self.parameters = [axis.size for axis in architecture.axes]
        self.optimizer = torch.optim.SGD(self.parameters, lr=lr)
        for parameter in self.parameters:
            parameter.moved_by_callback = True  # type: ignore[attr-defined]  # which training rules look for
        self.steps = 0
        self.fixed = False
        self.collapsed: dict[str, int] = {}
        """How often each size was brought back from below its smallest value."""
        self.history: list[dict[str, Any]] = []

    @property
    def over_budget(self) -> float:
        """The cost of the present crops over the budget."""
        return self.cost.number() / self.target

    def without_gradient(self) -> list[str]:
        """Return the names of sizes that no gradient has reached."""
        return [name for name, axis in self.architecture.named.items() if axis.size.grad is None]

    def step(self, scale: float = 1.0, left: float = 1.0) -> None:
        """Add the budget's gradient to that of the loss, and make a step of the sizes.

        Args:
            scale: by which the loss's gradient was multiplied (a gradient scaler's).
            left: factor on the learning rate, in [0, 1].
        """
        if self.fixed:
            self.optimizer.zero_grad()
            return
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                self.weight * deviation(self.cost, self.target), self.parameters, allow_unused=True
            )
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / scale
            parameter.grad = total if gradient is None else total + gradient
        finite = bool(torch.stack([p.grad.isfinite() for p in self.parameters if p.grad is not None]).all())
        if finite:  # as a gradient scaler leaves out such a step of the weights
            torch.nn.utils.clip_grad_norm_(self.parameters, _MAX_NORM)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * left
            self.optimizer.step()
        self.optimizer.zero_grad()
        for name, axis in self.architecture.named.items():
            if axis.clamp_():
                self.collapsed[name] = self.collapsed.get(name, 0) + 1
        self.steps += 1
        if self.steps % self.update_every == 0:
            refresh(self.architecture.axes)

    def fix(self) -> bool:
        """Bring the cost to the budget by small changes, and hold the sizes from now on; says whether it fits."""
        refresh(self.architecture.axes)
        self.fixed = True
        return settle(self.cost, self.architecture.axes, self.target, self.tolerance)

    def note(self, step: int) -> None:
        """Keep the present sizes for the picture of the search."""
        self.history.append({"step": step, "cost": self.over_budget, "shares": self.architecture.shares()})

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an exact resume needs, in plain values."""
        named = self.architecture.named
        return {
            "sizes": {name: float(axis.size.detach()) for name, axis in named.items()},
            "kept": {name: axis.kept for name, axis in named.items()},
            "steps": self.steps,
            "fixed": self.fixed,
            "target": self.target,
            "collapsed": dict(self.collapsed),
            "history": copy.deepcopy(self.history),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a state.

        Args:
            state: as :meth:`state_dict` returned it.

        Raises:
            ValueError: if it is of another network, or of other dims.
        """
        named = self.architecture.named
        if state["sizes"].keys() != named.keys():
            unknown = sorted(state["sizes"].keys() ^ named.keys())
            raise ValueError(
                f"LearnableArchitecture: the checkpoint's sizes are not those of this network ({', '.join(unknown[:5])}"
                "): resume with the network, dims and exclude= that it was made with."
            )
        with torch.no_grad():
            for name, axis in named.items():
                axis.size.fill_(state["sizes"][name])
                axis.set_kept(state["kept"][name])
        self.steps, self.fixed, self.target = state["steps"], state["fixed"], state["target"]
        self.collapsed, self.history = dict(state["collapsed"]), list(state["history"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


def seconds(network: nn.Module, call: ExampleCall, repeats: int = 5) -> float:
    """Return the time of one evaluation of an example, the shortest of several.

    Args:
        network: the network to evaluate.
        call: of it.
        repeats: at least 1.
    """
    on_cuda = any(p.is_cuda for p in network.parameters())
    wait: Callable[[], None] = torch.cuda.synchronize if on_cuda else lambda: None
    best = float("inf")
    with quiet_evaluation(network), sampled_kernels(network):
        call(network)
        for _ in range(repeats):
            wait()
            start = time.perf_counter()
            call(network)
            wait()
            best = min(best, time.perf_counter() - start)
    return best
